// AVX-512: many rows times one token from registers, and panels of 16 rows side by side for several tokens.
// Compiled twice, see avx512_rows.h.
#include <utility>

#include "ahead.h"
#include "avx512_rows.h"
#include "target.h"
#include "tiled_x86.h"

namespace losa {
namespace {

constexpr size_t kChunk = 16;  // groups whose scales are multiplied out at once

// Scale of the weights times scale of the activations, for the groups [first, first + kChunk) of a row.
class Factors {
 public:
  Factors(const losa_parts &p, size_t row)
      : halves_(p.value_type == LOSA_I4
                    ? static_cast<const uint8_t *>(p.scale.data) + 2 * row * weight_groups(p)
                    : nullptr),
        groups_(halves_ ? weight_groups(p) : 0),
        whole_(halves_ ? 1.0f : load_scale(p, row)) {}

  void fill(const float *activation_scales, size_t first, size_t count, float out[kChunk]) const {
    const auto used = static_cast<__mmask16>((1u << count) - 1u);
    const __m512 x = _mm512_maskz_loadu_ps(used, activation_scales + first);
    _mm512_storeu_ps(out, _mm512_mul_ps(x, weights(first, count)));
  }

 private:
  __m512 weights(size_t first, size_t count) const {
    if (halves_ == nullptr) {
      return _mm512_set1_ps(whole_);
    }
    const size_t left = groups_ - (first < groups_ ? first : groups_), there = count < left ? count : left;
    const auto used = static_cast<__mmask16>((1u << there) - 1u);
    fetch_ahead(halves_ + 2 * first);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(used, halves_ + 2 * first));
  }

  const uint8_t *halves_;
  size_t groups_;
  float whole_;
};

// What comes after two rows, per run of 128 positions of theirs. After the last two there is nothing.
class PairAhead {
 public:
  PairAhead(const losa_parts &p, const Matrix512 &m, size_t row) {
    if (row + 2 >= p.rows) {
      return;
    }
    const size_t runs = (m.blocks + 1) / 2;
    const bool i4 = p.value_type == LOSA_I4;
    if (p.layout == LOSA_DENSE) {
      const size_t bytes = i4 ? (m.columns + 1) / 2 : m.columns;
      values_ = Ahead(m.values + row * bytes, 2 * bytes, runs);
      return;
    }
    const size_t first = m.start(row, i4), last = m.start(row + 2, i4);
    values_ = Ahead(m.values + first, last - first, runs);
    positions_ = Ahead(m.positions_of(row).bytes, 2 * m.position_bytes, runs);
  }

  void next() {
    values_.next();
    positions_.next();
  }

 private:
  Ahead values_, positions_;
};

// One block of two rows times one token: two independent chains of addresses keep more loads in flight.
template <bool Second, typename A, typename B>
inline void add_block(A &first, B &second, size_t block, const int8_t *q, __m512i *acc0, __m512i *acc1) {
  const __m512i x = load512(q + block * kBlock);
  *acc0 = dot(*acc0, first.template next<Second>(block), x);
  *acc1 = dot(*acc1, second.template next<Second>(block), x);
}

// total += sums * factor; groups of 32 have two factors for a block.
template <bool Narrow>
inline __m512 scaled(__m512 total, __m512i sums, const float *factor) {
  const __m512 scale =
      Narrow ? _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(factor[0]), _mm512_set1_ps(factor[1]))
             : _mm512_set1_ps(factor[0]);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, total);
}

template <size_t Group>
inline __m512i start_of(const int32_t *bias) {
  return Group == 32 ? start_halves(bias[0], bias[1]) : start(bias[0]);
}

// Two rows times one token, 128 positions at a time: y [2].
template <size_t Group, typename A, typename B>
void dot_two(A first, B second, const Factors (&factors)[2], PairAhead ahead, size_t blocks,
             const Activations &a, float *y) {
  constexpr size_t kPerRun = kPadding / Group, kRuns = kChunk / kPerRun;
  constexpr bool kNarrow = Group == 32;
  __m512 total0 = _mm512_setzero_ps(), total1 = _mm512_setzero_ps();
  const size_t runs = (blocks + 1) / 2;
  for (size_t done = 0; done < runs; done += kRuns) {
    const size_t count = runs - done < kRuns ? runs - done : kRuns;
    float factor[2][kChunk];
    factors[0].fill(a.scale, done * kPerRun, count * kPerRun, factor[0]);
    factors[1].fill(a.scale, done * kPerRun, count * kPerRun, factor[1]);
    for (size_t i = 0; i < count; ++i) {
      const size_t block = 2 * (done + i), g = i * kPerRun, half = kPerRun / 2;
      ahead.next();
      const int32_t *bias = a.bias + (done + i) * kPerRun;
      __m512i acc0 = start_of<Group>(bias), acc1 = acc0;
      add_block<false>(first, second, block, a.q, &acc0, &acc1);
      const bool more = block + 1 < blocks;
      if (Group != kPadding) {
        total0 = scaled<kNarrow>(total0, acc0, factor[0] + g);
        total1 = scaled<kNarrow>(total1, acc1, factor[1] + g);
        if (!more) {
          break;
        }
        acc0 = acc1 = start_of<Group>(bias + half);
      }
      if (more) {
        add_block<true>(first, second, block + 1, a.q, &acc0, &acc1);
      }
      total0 = scaled<kNarrow>(total0, acc0, factor[0] + g + half);
      total1 = scaled<kNarrow>(total1, acc1, factor[1] + g + half);
    }
  }
  y[0] = _mm512_reduce_add_ps(total0);
  y[1] = _mm512_reduce_add_ps(total1);
}

template <size_t Group, typename Row>
void matvec_rows(const losa_parts &p, const Matrix512 &m, const Activations &a, size_t begin, size_t end,
                 float *y) {
  using Even = typename Row::Even;
  using Odd = typename Row::Odd;
  size_t row = begin;
  for (; row + 2 <= end; row += 2) {
    const Factors factors[2] = {Factors(p, row), Factors(p, row + 1)};
    dot_two<Group>(Even(m, row), Odd(m, row + 1), factors, PairAhead(p, m, row), m.blocks, a, y + row);
  }
  if (row < end) {  // alone: the second result is dropped
    const Factors factors[2] = {Factors(p, row), Factors(p, row)};
    float twice[2];
    dot_two<Group>(Even(m, row), Even(m, row), factors, PairAhead(p, m, row), m.blocks, a, twice);
    y[row] = twice[0];
  }
}

void matvec_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y) {
  const losa_parts &p = t.parts;
  const Matrix512 matrix(t);
  with_rows(p, [&](auto tag) {
    using Row = typename decltype(tag)::Row;
    switch (activation_group(p)) {
      case 32:
        return matvec_rows<32, Row>(p, matrix, a, begin, end, y);
      case 64:
        return matvec_rows<64, Row>(p, matrix, a, begin, end, y);
      default:
        return matvec_rows<128, Row>(p, matrix, a, begin, end, y);
    }
  });
}

template <bool Half>
inline __m512 load_floats(const uint8_t *p) {
  if (Half) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  }
  return _mm512_loadu_ps(p);
}

// Calls use(position, 16 values) for every 16 positions of a row. What a dense row lacks at the end is zero.
template <bool Half, typename Use>
void each_sixteen(const losa_tensor &t, size_t row, Use use) {
  constexpr size_t size = Half ? 2 : 4;
  const losa_parts &p = t.parts;
  const auto *values = static_cast<const uint8_t *>(p.values.data);
  if (p.layout == LOSA_DENSE) {
    const uint8_t *from = values + size * row * p.columns;
    size_t i = 0;
    for (; i + 16 <= p.columns; i += 16) {
      use(i, load_floats<Half>(from + size * i));
    }
    if (i < p.columns) {
      alignas(64) uint8_t tail[64] = {};
      std::memcpy(tail, from + size * i, size * (p.columns - i));
      use(i, load_floats<Half>(tail));
    }
    return;
  }
  const Positions positions(p, row);
  const uint8_t *at = values + size * row_start(t, row);
  for (size_t block = 0; block < positions.blocks; ++block) {
    uint64_t word = positions.word(block);
    for (size_t i = 0; i < 4; ++i, word >>= 16) {
      const auto mask = static_cast<__mmask16>(word & 0xffff);
      fetch_ahead(at);
      use(block * kBlock + 16 * i, _mm512_maskz_expand_ps(mask, loaded(load_floats<Half>(at))));
      at += size * static_cast<unsigned>(__builtin_popcountll(word & 0xffff));
    }
  }
}

template <bool Half>
void matvec_values(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y) {
  for (size_t row = begin; row < end; ++row) {
    __m512 acc[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    each_sixteen<Half>(t, row, [&](size_t position, __m512 values) {
      __m512 &sum = acc[position / 16 % 2];
      sum = _mm512_fmadd_ps(values, _mm512_loadu_ps(a.x + position), sum);
    });
    y[row] = _mm512_reduce_add_ps(_mm512_add_ps(acc[0], acc[1]));
  }
}

void matvec(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, void *scratch) {
  const losa_parts &p = t.parts;
  if (p.layout == LOSA_TILED) {
    multiply_tiles(p, a, begin, end, y, 0, scratch);
    return;
  }
  switch (p.value_type) {
    case LOSA_F32:
      return matvec_values<false>(t, a, begin, end, y);
    case LOSA_F16:
      return matvec_values<true>(t, a, begin, end, y);
    default:
      return matvec_levels(t, a, begin, end, y);
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
void expand_lane(Row row, size_t blocks, size_t lane, size_t padded, uint8_t *panel) {
  for (size_t block = 0; block < padded / kBlock; block += 2) {  // `padded` is a multiple of two blocks
    const __m512i nothing = as_factor(_mm512_setzero_si512());
    store_lane(block < blocks ? row.template next<false>(block) : nothing, block, lane, panel);
    const size_t second = block + 1;
    store_lane(second < blocks ? row.template next<true>(second) : nothing, second, lane, panel);
  }
}

void expand_panel(const losa_tensor &t, const Matrix512 &m, size_t first, size_t rows, size_t padded,
                  uint8_t *panel) {
  with_rows(t.parts, [&](auto tag) {
    using Row = typename decltype(tag)::Row;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      // Lanes without a row repeat the last one; their results are not stored.
      const size_t row = first + (lane < rows ? lane : rows - 1);
      if (row % 2 == 0) {
        expand_lane(typename Row::Even(m, row), m.blocks, lane, padded, panel);
      } else {
        expand_lane(typename Row::Odd(m, row), m.blocks, lane, padded, panel);
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
      scales[lane] = g < weight_groups(p) ? load_scale(p, row * weight_groups(p) + g) : 0.0f;
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
                                    const Activations &a, size_t token, float *total) {
  std::memset(total, 0, 2 * Tokens * kLanes * sizeof(float));
  for (size_t g = 0; g < a.groups; ++g) {
    __m512i acc[2][Tokens];
    unrolled<Tokens>(
        [&](auto k) { acc[0][k] = acc[1][k] = start_lanes(a.bias[(token + k) * a.groups + g]); });
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
void tiles(const uint8_t *const panel[2], const float *scales, size_t group, const Activations &a,
           size_t *token, size_t first, size_t rows, float *y, size_t ldy) {
  for (; *token + Tokens <= a.tokens; *token += Tokens) {
    alignas(64) float total[2 * Tokens * kLanes];
    tile<Tokens>(panel, scales, group, a, *token, total);
    store<Tokens>(total, first, rows, *token, y, ldy);
  }
}

void matmul_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t ldy,
                   uint8_t *scratch) {
  const losa_parts &p = t.parts;
  const Matrix512 matrix(t);
  const size_t group = activation_group(p);
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
    tiles<8>(panel, scales, group, a, &token, first, rows, y, ldy);
    tiles<4>(panel, scales, group, a, &token, first, rows, y, ldy);
    tiles<1>(panel, scales, group, a, &token, first, rows, y, ldy);
  }
}

void expand_values(const losa_tensor &t, size_t row, float *out) {
  size_t end = 0;
  const auto put = [&](size_t position, __m512 values) {
    _mm512_storeu_ps(out + position, values);
    end = position + 16;
  };
  t.parts.value_type == LOSA_F16 ? each_sixteen<true>(t, row, put) : each_sixteen<false>(t, row, put);
  std::memset(out + end, 0, (padded_columns(t.parts) - end) * sizeof(float));
}

// Four expanded rows times four tokens.
void values_panel(const float *panel, size_t first, size_t rows, const Activations &a, float *y, size_t ldy) {
  constexpr size_t step = 4;
  for (size_t token = 0; token < a.tokens; token += step) {
    for (size_t r = 0; r < rows; r += step) {
      // Past the ends the last row or token is repeated and its result not stored.
      const float *w[step], *x[step];
      for (size_t i = 0; i < step; ++i) {
        w[i] = panel + (r + i < rows ? r + i : rows - 1) * a.padded;
        x[i] = a.x + (token + i < a.tokens ? token + i : a.tokens - 1) * a.padded;
      }
      __m512 acc[step][step];
      for (auto &line : acc) {
        for (auto &v : line) {
          v = _mm512_setzero_ps();
        }
      }
      for (size_t i = 0; i < a.padded; i += 16) {
        __m512 row[step];
        for (size_t j = 0; j < step; ++j) {
          row[j] = _mm512_loadu_ps(w[j] + i);
        }
        for (size_t k = 0; k < step; ++k) {
          const __m512 v = _mm512_loadu_ps(x[k] + i);
          for (size_t j = 0; j < step; ++j) {
            acc[j][k] = _mm512_fmadd_ps(row[j], v, acc[j][k]);
          }
        }
      }
      for (size_t k = 0; k < step && token + k < a.tokens; ++k) {
        for (size_t j = 0; j < step && r + j < rows; ++j) {
          y[(token + k) * ldy + first + r + j] = _mm512_reduce_add_ps(acc[j][k]);
        }
      }
    }
  }
}

void matmul(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t ldy,
            void *scratch) {
  if (t.parts.layout == LOSA_TILED) {
    multiply_tiles(t.parts, a, begin, end, y, ldy, scratch);
    return;
  }
  if (is_integer(t.parts)) {
    matmul_levels(t, a, begin, end, y, ldy, static_cast<uint8_t *>(scratch));
    return;
  }
  each_panel<float>(
      t, a, begin, end, scratch, expand_values,
      [&](const float *panel, size_t first, size_t rows) { values_panel(panel, first, rows, a, y, ldy); });
}

void quantize_group(const float *x, size_t length, int8_t *q, float *scale, int32_t *bias) {
  __m512 peak = _mm512_setzero_ps();
  for (size_t i = 0; i < length; i += 16) {
    peak = _mm512_max_ps(peak, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  }
  const float top = _mm512_reduce_max_ps(peak);
  *scale = top / 127.0f;
  const __m512 inverse = _mm512_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
  __m512i total = _mm512_setzero_si512();
  for (size_t i = 0; i < length; i += 16) {
    const __m512i levels = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
    total = _mm512_add_epi32(total, levels);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(q + i), _mm512_cvtsepi32_epi8(levels));
  }
  *bias = -128 * _mm512_reduce_add_epi32(total);
}

void quantize(const float *x, size_t columns, size_t padded, size_t group, int8_t *q, float *scale,
              int32_t *bias) {
  each_group(x, columns, padded, group, q, scale, bias, quantize_group);
}

}  // namespace

#if defined(LOSA_VNNI)
const Target kAvx512Vnni = {kName, quantize, matvec, matmul};
#else
const Target kAvx512 = {kName, quantize, matvec, matmul};
#endif

}  // namespace losa
