// AVX-512 with VBMI2 and VNNI: many rows times one token from registers, and panels of 16 rows side by side
// for several tokens.
#include <type_traits>
#include <utility>

#include "kernels/x86/avx512_tiles.h"

namespace losa {
namespace {

constexpr size_t kChunk = 16;  // groups whose scales are multiplied at once

// What the sums of rows are multiplied with, and what is added to them for the bias: of i4, scales of the
// weights times those of the activations, for two rows while the two before them are computed, because single
// floats out of what was stored in wholes wait until that has reached the cache. Of i8, the scales of the
// activations: that of a row is applied to its sum.
template <typename Row>
class Factors {
  static constexpr bool I4 = is_i4(Row::kLevels);
  static constexpr float kBias = Row::kLevels == Levels::kRaised ? 1.0f / 16 : 1.0f;  // of level + 8

 public:
  Factors(const losa_parts &p, const Activations &a, float *scratch)
      : halves_(static_cast<const uint8_t *>(p.scale.data)),
        there_(I4 ? weight_groups(p) : 0),
        scales_(a.scale),
        groups_(a.groups),
        stride_(round_up(a.groups, kChunk) + kChunk),
        biases_(scratch),
        rows_(scratch + stride_) {
    __m512 all = _mm512_setzero_ps();
    for (size_t g = 0; g < groups_; g += kChunk) {
      const __mmask16 some = first_of(groups_ - g);
      const __m512 bias = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(some, a.bias + g));
      const __m512 scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, scales_ + g), _mm512_set1_ps(kBias));
      _mm512_storeu_ps(biases_ + g, _mm512_mul_ps(scale, bias));
      all = _mm512_fmadd_ps(scale, bias, all);
    }
    if (!I4) {
      _mm512_storeu_ps(biases_, all);
    }
  }

  // Makes those of a row ready; four rows can be so at a time.
  template <typename Parity>
  void fill(size_t row) {
    if (!I4) {
      return;
    }
    float *start = rows_ + row % 4 * stride_;
    const uint8_t *halves = halves_ + 2 * row * there_;
    __m512 added = _mm512_setzero_ps();
    const auto chunk = [&](size_t g, __mmask16 weights, __mmask16 some) {
      const __m512 weight = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(weights, halves + 2 * g));
      fetch_ahead(halves + 2 * g);
      added = _mm512_fmadd_ps(weight, _mm512_loadu_ps(biases_ + g), added);
      const __m512 factor = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, scales_ + g), weight);
      _mm512_storeu_ps(start + kChunk + g, _mm512_mul_ps(factor, _mm512_set1_ps(1.0f / Parity::kScaled)));
    };
    size_t g = 0;
    for (; g + kChunk <= there_; g += kChunk) {
      chunk(g, 0xffff, 0xffff);
    }
    for (; g < groups_; g += kChunk) {
      chunk(g, first_of(there_ > g ? there_ - g : 0), first_of(groups_ - g));
    }
    _mm512_storeu_ps(start, added);
  }

  const float *of(size_t row) const { return I4 ? rows_ + row % 4 * stride_ + kChunk : scales_; }

  // Lanes whose sum is the bias of a row.
  __m512 start(size_t row) const { return _mm512_loadu_ps(I4 ? rows_ + row % 4 * stride_ : biases_); }

 private:
  static __mmask16 first_of(size_t count) {
    return static_cast<__mmask16>(count < kChunk ? (1u << count) - 1u : 0xffffu);
  }

  const uint8_t *halves_;
  size_t there_;  // groups of a row of weights; those of the activations may be more
  const float *scales_;
  size_t groups_, stride_;
  float *biases_, *rows_;
};

// What comes after two rows, per run of 128 positions of theirs.
template <typename Row>
class AfterPairs {
 public:
  AfterPairs(const losa_parts &p, const Matrix512 &m)
      : m_(m), rows_(p.rows), per_run_(m.runs), position_step_(per_run_.of(2 * m.position_bytes)) {}

  struct Pair {
    void next() {
      values.template next<Row::kLines>();
      if (Row::kMasked) {
        positions.template next<1>();
      }
    }
    Ahead values, positions;
  };

  // After the last two there is nothing.
  Pair of(size_t row) const {
    if (row + 2 >= rows_) {
      return {Ahead(m_.values), Ahead(m_.values)};
    }
    const size_t first = Row::start(m_, row), last = Row::start(m_, row + 2);
    const uint8_t *positions = m_.first_positions.bytes + row * m_.position_bytes;
    return {Ahead(m_.values + first, per_run_.of(last - first)), Ahead(positions, position_step_)};
  }

 private:
  const Matrix512 &m_;
  size_t rows_;
  PerStep per_run_;
  size_t position_step_;
};

// One block of two rows times one token: two independent chains of addresses keep more loads in flight.
template <bool Second, bool Whole, typename A, typename B>
inline __attribute__((always_inline)) void add_block(A &first, B &second, size_t block, const int8_t *q,
                                                     __m512i *acc0, __m512i *acc1) {
  const __m512i x = load512(q + block * kBlock);
  *acc0 = dot(*acc0, first.template next_scaled<Second, Whole>(block), x);
  *acc1 = dot(*acc1, second.template next_scaled<Second, Whole>(block), x);
}

// total += sums * factor; groups of 32 have two factors for a block.
template <bool Narrow>
inline __m512 scaled(__m512 total, __m512i sums, const float *factor) {
  const __m512 scale =
      Narrow ? _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(factor[0]), _mm512_set1_ps(factor[1]))
             : _mm512_set1_ps(factor[0]);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, total);
}

// Blocks `block` and the one after it, which are a run of 128 positions. Whole: both lie inside of the rows.
// Else the second may be missing. The factors are those of the run.
template <size_t Group, bool Whole, typename A, typename B>
inline __attribute__((always_inline)) void add_run(A &first, B &second, size_t block, bool more,
                                                   const int8_t *q, const float *factor0,
                                                   const float *factor1, __m512 *total0, __m512 *total1) {
  constexpr size_t half = kPadding / Group / 2;
  constexpr bool kNarrow = Group == 32;
  __m512i acc0 = _mm512_setzero_si512(), acc1 = acc0;
  add_block<false, Whole>(first, second, block, q, &acc0, &acc1);
  if (Group != kPadding) {
    *total0 = scaled<kNarrow>(*total0, acc0, factor0);
    *total1 = scaled<kNarrow>(*total1, acc1, factor1);
    acc0 = acc1 = _mm512_setzero_si512();
  }
  if (Whole || more) {
    add_block<true, Whole>(first, second, block + 1, q, &acc0, &acc1);
  } else if (Group != kPadding) {
    return;
  }
  *total0 = scaled<kNarrow>(*total0, acc0, factor0 + half);
  *total1 = scaled<kNarrow>(*total1, acc1, factor1 + half);
}

// Rows row0 and row1 times one token: y [2].
template <size_t Group, typename A, typename B>
inline void dot_two(const Matrix512 &m, const int8_t *q, const Factors<A> &factors,
                    typename AfterPairs<A>::Pair after, size_t row0, size_t row1, float *y) {
  constexpr size_t kPerRun = kPadding / Group;
  A first(m, row0);
  B second(m, row1);
  __m512 total0 = factors.start(row0), total1 = factors.start(row1);
  const float *factor0 = factors.of(row0), *factor1 = factors.of(row1);
  const size_t runs = m.runs, whole = A::whole_runs(m);
  size_t run = 0;
  for (; run < whole; ++run) {
    after.next();
    add_run<Group, true>(first, second, 2 * run, true, q, factor0, factor1, &total0, &total1);
    factor0 += kPerRun;
    factor1 += kPerRun;
  }
  if (run < runs) {
    add_run<Group, false>(first, second, 2 * run, 2 * run + 1 < m.blocks, q, factor0, factor1, &total0,
                          &total1);
  }
  y[0] = _mm512_reduce_add_ps(total0);
  y[1] = _mm512_reduce_add_ps(total1);
}

template <size_t Group, typename Row>
void matvec_rows(const losa_parts &p, const Matrix512 &m, const Activations &a, size_t begin, size_t end,
                 float *y, float *scratch) {
  using Even = typename Row::Even;
  using Odd = typename Row::Odd;
  constexpr bool kI4 = is_i4(Row::kLevels);
  Factors<Even> factors(p, a, scratch);
  const AfterPairs<Even> after(p, m);
  const auto fill_two = [&](size_t row) {
    if (row < end) {
      factors.template fill<Even>(row);
    }
    if (row + 1 < end) {
      factors.template fill<Odd>(row + 1);
    }
  };
  const auto scale_of = [&](size_t row) { return kI4 ? 1.0f : load_scale(p, row); };
  fill_two(begin);
  size_t row = begin;
  for (; row + 2 <= end; row += 2) {
    fill_two(row + 2);
    dot_two<Group, Even, Odd>(m, a.q, factors, after.of(row), row, row + 1, y + row);
    y[row] *= scale_of(row);
    y[row + 1] *= scale_of(row + 1);
  }
  if (row < end) {  // alone: the second result is dropped
    float twice[2];
    dot_two<Group, Even, Even>(m, a.q, factors, after.of(row), row, row, twice);
    y[row] = twice[0] * scale_of(row);
  }
}

void matvec_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                   float *scratch) {
  const losa_parts &p = t.parts;
  const Matrix512 matrix(t);
  with_rows(p, [&](auto tag) {
    using Row = typename decltype(tag)::Row;
    switch (activation_group(p)) {
      case 32:
        return matvec_rows<32, Row>(p, matrix, a, begin, end, y, scratch);
      case 64:
        return matvec_rows<64, Row>(p, matrix, a, begin, end, y, scratch);
      default:
        return matvec_rows<128, Row>(p, matrix, a, begin, end, y, scratch);
    }
  });
}

void matvec(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, void *scratch) {
  if (t.parts.layout == LOSA_TILED) {
    multiply_tiles(t.parts, a, begin, end, y, 0, scratch);
  } else if (is_integer(t.parts)) {
    matvec_levels(t, a, begin, end, y, static_cast<float *>(scratch));
  } else {
    matvec_values(t, a, begin, end, y);
  }
}

// A panel of levels holds 16 rows side by side: 4 positions of row 0, of row 1, ... of row 15, then the next
// 4 positions. One 32-bit broadcast of a token then meets 16 rows, and a lane is a row to the end.
constexpr size_t kLanes = 16;

inline void store_lane(__m512i factors, size_t block, size_t lane, uint8_t *panel) {
  alignas(64) uint32_t four[kLanes];
  _mm512_store_si512(four, factors);
  uint8_t *out = panel + block * kBlock * kLanes + 4 * lane;
  for (size_t i = 0; i < kLanes; ++i) {
    std::memcpy(out + i * 4 * kLanes, four + i, 4);
  }
}

template <typename Row>
void expand_lane(Row row, __m512i table, size_t blocks, size_t lane, size_t padded, uint8_t *panel) {
  for (size_t block = 0; block < padded / kBlock; block += 2) {  // `padded` is a multiple of two blocks
    const __m512i nothing = factors_of<Row::kLevels>(_mm512_setzero_si512(), false, table);
    store_lane(block < blocks ? row.template next<false, false>(block) : nothing, block, lane, panel);
    const size_t second = block + 1;
    store_lane(second < blocks ? row.template next<true, false>(second) : nothing, second, lane, panel);
  }
}

// 16 blocks side by side as their dwords one after the other: out [16, 16].
void store_columns(__m512i v[kLanes], uint8_t *out) {
  __m512i w[kLanes];
  for (size_t i = 0; i < kLanes; i += 2) {  // dwords of two rows, alternating
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (size_t i = 0; i < kLanes; i += 4) {  // a dword of four rows in every quarter
    v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
  }
  constexpr int kFirstThird = 0x88, kSecondFourth = 0xdd;  // quarters of both operands
  for (size_t i = 0; i < 4; ++i) {
    w[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], kFirstThird);
    w[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], kSecondFourth);
    w[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], kFirstThird);
    w[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], kSecondFourth);
  }
  for (size_t i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + 64 * i, _mm512_shuffle_i32x4(w[i], w[i + 8], kFirstThird));
    _mm512_storeu_si512(out + 64 * (i + 4), _mm512_shuffle_i32x4(w[i + 4], w[i + 12], kFirstThird));
    _mm512_storeu_si512(out + 64 * (i + 8), _mm512_shuffle_i32x4(w[i], w[i + 8], kSecondFourth));
    _mm512_storeu_si512(out + 64 * (i + 12), _mm512_shuffle_i32x4(w[i + 4], w[i + 12], kSecondFourth));
  }
}

// All 16 rows of a panel, block by block.
template <typename Row>
void expand_rows(const Matrix512 &m, size_t first, size_t padded, uint8_t *panel) {
  struct Two {
    typename Row::Even even;
    typename Row::Odd odd;
  };
  const auto two = [&](size_t row) { return Two{typename Row::Even(m, row), typename Row::Odd(m, row + 1)}; };
  Two rows[kLanes / 2] = {two(first),     two(first + 2),  two(first + 4),  two(first + 6),
                          two(first + 8), two(first + 10), two(first + 12), two(first + 14)};
  const __m512i nothing = factors_of<Row::kLevels>(_mm512_setzero_si512(), false, m.levels);
  const auto expand = [&](auto second, size_t block) {
    __m512i lanes[kLanes];
    for (size_t i = 0; i < kLanes; i += 2) {
      const bool there = block < m.blocks;
      lanes[i] = there ? rows[i / 2].even.template next<second, false>(block) : nothing;
      lanes[i + 1] = there ? rows[i / 2].odd.template next<second, false>(block) : nothing;
    }
    store_columns(lanes, panel + block * kBlock * kLanes);
  };
  for (size_t block = 0; block < padded / kBlock; block += 2) {  // `padded` is a multiple of two blocks
    expand(std::false_type(), block);
    expand(std::true_type(), block + 1);
  }
}

void expand_panel(const losa_tensor &t, const Matrix512 &m, size_t first, size_t rows, size_t padded,
                  uint8_t *panel) {
  if (t.parts.layout == LOSA_TILED) {
    panel_of_tile(t.parts, first / kTile, padded, panel);
    return;
  }
  with_rows(t.parts, [&](auto tag) {
    using Row = typename decltype(tag)::Row;
    if (rows == kLanes) {
      expand_rows<Row>(m, first, padded, panel);
      return;
    }
    for (size_t lane = 0; lane < kLanes; ++lane) {
      // Lanes without a row repeat the last one; their results are not stored.
      const size_t row = first + (lane < rows ? lane : rows - 1);
      if (row % 2 == 0) {
        expand_lane(typename Row::Even(m, row), m.levels, m.blocks, lane, padded, panel);
      } else {
        expand_lane(typename Row::Odd(m, row), m.levels, m.blocks, lane, padded, panel);
      }
    }
  });
}

// Weight scales of 16 rows for one group.
inline __m512 lane_scales(const losa_parts &p, size_t first, size_t rows, size_t g) {
  alignas(64) float scales[kLanes];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const size_t row = first + (lane < rows ? lane : rows - 1);
    if (p.value_type == LOSA_I8) {
      scales[lane] = load_scale(p, row);
    } else {
      scales[lane] = g < weight_groups(p) ? load_scale(p, scale_index(p, row, g)) : 0.0f;
    }
  }
  return _mm512_load_ps(scales);
}

template <typename Use, size_t... Index>
inline __attribute__((always_inline)) void unroll(std::index_sequence<Index...>, Use use) {
  (use(std::integral_constant<size_t, Index>()), ...);
}

// use(0), use(1), ...: written out, because the compiler keeps an array that a loop walks in memory.
template <int Count, typename Use>
inline __attribute__((always_inline)) void unrolled(Use use) {
  unroll(std::make_index_sequence<Count>(), use);
}

// Two panels of 16 rows times `Tokens` tokens, all groups: total [2, Tokens, 16]. The totals stay in memory,
// and this function by itself, because the sums of a group take all registers.
template <int Tokens>
__attribute__((noinline)) void tile(const uint8_t *const panel[2], const float *scales, size_t group,
                                    int shift, const Activations &a, size_t token, float *total) {
  std::memset(total, 0, 2 * Tokens * kLanes * sizeof(float));
  for (size_t g = 0; g < a.groups; ++g) {
    __m512i acc[2][Tokens];
    unrolled<Tokens>([&](auto k) {
      acc[0][k] = acc[1][k] = _mm512_set1_epi32(a.bias[(token + k) * a.groups + g] >> shift);
    });
    for (size_t i = g * group; i < (g + 1) * group; i += 4) {
      const __m512i w0 = load512(panel[0] + i * kLanes), w1 = load512(panel[1] + i * kLanes);
      unrolled<Tokens>([&](auto k) {
        int32_t four;
        std::memcpy(&four, a.q + (token + k) * a.padded + i, 4);
        const __m512i x = _mm512_set1_epi32(four);
        acc[0][k] = dot(acc[0][k], w0, x);
        acc[1][k] = dot(acc[1][k], w1, x);
      });
    }
    const __m512 s0 = _mm512_loadu_ps(scales + 2 * g * kLanes),
                 s1 = _mm512_loadu_ps(scales + (2 * g + 1) * kLanes);
    unrolled<Tokens>([&](auto k) {
      const __m512 x = _mm512_set1_ps(a.scale[(token + k) * a.groups + g]);
      float *t0 = total + k * kLanes, *t1 = t0 + Tokens * kLanes;
      const __m512 low = _mm512_cvtepi32_ps(acc[0][k]), high = _mm512_cvtepi32_ps(acc[1][k]);
      _mm512_storeu_ps(t0, _mm512_fmadd_ps(low, _mm512_mul_ps(s0, x), _mm512_loadu_ps(t0)));
      _mm512_storeu_ps(t1, _mm512_fmadd_ps(high, _mm512_mul_ps(s1, x), _mm512_loadu_ps(t1)));
    });
  }
}

// Stores the tile of rows [first, first + rows) and `Tokens` tokens.
template <int Tokens>
void store(const float *total, size_t first, size_t rows, size_t token, float *y, size_t ldy) {
  for (size_t k = 0; k < Tokens; ++k) {
    float *out = y + (token + k) * ldy + first;
    for (size_t half = 0; half < 2 && half * kLanes < rows; ++half) {
      const size_t left = rows - half * kLanes;
      std::memcpy(out + half * kLanes, total + (half * Tokens + k) * kLanes,
                  (left < kLanes ? left : kLanes) * sizeof(float));
    }
  }
}

template <int Tokens>
void tiles(const uint8_t *const panel[2], const float *scales, size_t group, int shift, const Activations &a,
           size_t *token, size_t first, size_t rows, float *y, size_t ldy) {
  for (; *token + Tokens <= a.tokens; *token += Tokens) {
    alignas(64) float total[2 * Tokens * kLanes];
    tile<Tokens>(panel, scales, group, shift, a, *token, total);
    store<Tokens>(total, first, rows, *token, y, ldy);
  }
}

void matmul_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t ldy,
                   uint8_t *scratch) {
  const losa_parts &p = t.parts;
  const Matrix512 matrix(t);
  const size_t group = activation_group(p);
  const int shift = p.layout == LOSA_TILED ? 0 : bias_shift(levels_of(p));
  auto *scales = reinterpret_cast<float *>(scratch + kPanelRows * a.padded);
  for (size_t first = begin; first < end; first += kPanelRows) {
    const size_t rows = end - first < kPanelRows ? end - first : kPanelRows;
    const size_t upper = rows > kLanes ? rows - kLanes : 0;
    const uint8_t *panel[2] = {scratch, scratch + (upper ? kLanes * a.padded : 0)};
    expand_panel(t, matrix, first, rows < kLanes ? rows : kLanes, a.padded, scratch);
    if (upper) {
      expand_panel(t, matrix, first + kLanes, upper, a.padded, scratch + kLanes * a.padded);
    }
    for (size_t g = 0; g < a.groups; ++g) {
      const __m512 low = lane_scales(p, first, rows < kLanes ? rows : kLanes, g);
      _mm512_storeu_ps(scales + 2 * g * kLanes, low);
      _mm512_storeu_ps(scales + (2 * g + 1) * kLanes, upper ? lane_scales(p, first + kLanes, upper, g) : low);
    }
    size_t token = 0;
    tiles<8>(panel, scales, group, shift, a, &token, first, rows, y, ldy);
    tiles<4>(panel, scales, group, shift, a, &token, first, rows, y, ldy);
    tiles<1>(panel, scales, group, shift, a, &token, first, rows, y, ldy);
  }
}

constexpr size_t kWorthPanels = 32;  // tokens; fewer multiply what is kept of a tile

void matmul(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t ldy,
            void *scratch) {
  if (t.parts.layout == LOSA_TILED && a.tokens < kWorthPanels) {
    multiply_tiles(t.parts, a, begin, end, y, ldy, scratch);
  } else if (is_integer(t.parts)) {
    matmul_levels(t, a, begin, end, y, ldy, static_cast<uint8_t *>(scratch));
  } else {
    matmul_values(t, a, begin, end, y, ldy, scratch);
  }
}

}  // namespace

const Target kAvx512Vnni = {"avx512vnni", quantize, matvec, matmul};

}  // namespace losa
