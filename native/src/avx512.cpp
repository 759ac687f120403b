// AVX-512: many rows times one token from registers, and panels of 16 rows side by side for several tokens.
// Compiled twice, see avx512_rows.h.
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
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(used, halves_ + 2 * first));
  }

  const uint8_t *halves_;
  size_t groups_;
  float whole_;
};

// `Rows` rows in step, times one token: two independent chains of addresses keep more loads in flight.
template <int Rows, bool Narrow, typename Row>
void dot_rows(const losa_parts &p, Row (&rows)[Rows], size_t r, const Activations &a, float *y) {
  const size_t group = activation_group(p), blocks = rows[0].blocks();
  const size_t groups = (blocks * kBlock + group - 1) / group;
  __m512 total[Rows];
  for (auto &v : total) {
    v = _mm512_setzero_ps();
  }
  size_t block = 0;
  for (size_t first = 0; first < groups; first += kChunk) {
    const size_t count = groups - first < kChunk ? groups - first : kChunk;
    float factor[Rows][kChunk];
    for (int i = 0; i < Rows; ++i) {
      Factors(p, r + static_cast<size_t>(i)).fill(a.scale, first, count, factor[i]);
    }
    for (size_t g = 0; g < count; g += Narrow ? 2 : 1) {
      const size_t end = Narrow ? block + 1 : (first + g + 1) * group / kBlock;
      const size_t stop = end < blocks ? end : blocks;
      __m512i acc[Rows];
      for (auto &v : acc) {
        v = Narrow ? start_halves(a.bias[first + g], a.bias[first + g + 1]) : start(a.bias[first + g]);
      }
      for (; block < stop; ++block) {
        const __m512i x = load512(a.q + block * kBlock);
        for (int i = 0; i < Rows; ++i) {
          acc[i] = dot(acc[i], as_factor(rows[i].next(block)), x);
        }
      }
      for (int i = 0; i < Rows; ++i) {
        const __m512 scale = Narrow ? _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(factor[i][g]),
                                                           _mm512_set1_ps(factor[i][g + 1]))
                                    : _mm512_set1_ps(factor[i][g]);
        total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i]), scale, total[i]);
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    y[r + static_cast<size_t>(i)] = _mm512_reduce_add_ps(total[i]);
  }
}

template <bool Narrow, typename Row>
void matvec_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y) {
  size_t row = begin;
  for (; row + 2 <= end; row += 2) {
    Row rows[2] = {Row(t, row), Row(t, row + 1)};
    dot_rows<2, Narrow>(t.parts, rows, row, a, y);
  }
  if (row < end) {
    Row rows[1] = {Row(t, row)};
    dot_rows<1, Narrow>(t.parts, rows, row, a, y);
  }
}

template <typename Row>
void matvec_as(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y) {
  const bool narrow = activation_group(t.parts) == 32;
  (narrow ? matvec_levels<true, Row> : matvec_levels<false, Row>)(t, a, begin, end, y);
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
      use(block * kBlock + 16 * i, _mm512_maskz_expand_ps(mask, load_floats<Half>(at)));
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

void matvec(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, void *) {
  const losa_parts &p = t.parts;
  if (p.layout == LOSA_TILED) {
    multiply_tiles(p, a, begin, end, y, 0);
    return;
  }
  switch (p.value_type) {
    case LOSA_F32:
      return matvec_values<false>(t, a, begin, end, y);
    case LOSA_F16:
      return matvec_values<true>(t, a, begin, end, y);
    case LOSA_I8:
      return p.layout == LOSA_DENSE ? matvec_as<DenseRow<false>>(t, a, begin, end, y)
                                    : matvec_as<SparseRow<false>>(t, a, begin, end, y);
    default:
      return p.layout == LOSA_DENSE ? matvec_as<DenseRow<true>>(t, a, begin, end, y)
                                    : matvec_as<SparseRow<true>>(t, a, begin, end, y);
  }
}

// A panel of levels holds 16 rows side by side: 4 positions of row 0, of row 1, ... of row 15, then the next
// 4 positions. One 32-bit broadcast of a token then meets 16 rows, and a lane is a row to the end.
constexpr size_t kLanes = 16;

template <typename Row>
void expand_lane(Row row, size_t lane, size_t padded, uint8_t *panel) {
  const size_t blocks = row.blocks();
  alignas(64) uint32_t four[kLanes];
  for (size_t block = 0; block * kBlock < padded; ++block) {
    _mm512_store_si512(four, as_factor(block < blocks ? row.next(block) : _mm512_setzero_si512()));
    uint8_t *out = panel + block * kBlock * kLanes + 4 * lane;
    for (size_t i = 0; i < kLanes; ++i) {
      std::memcpy(out + i * 4 * kLanes, four + i, 4);
    }
  }
}

void expand_panel(const losa_tensor &t, size_t first, size_t rows, size_t padded, uint8_t *panel) {
  const losa_parts &p = t.parts;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    // Lanes without a row repeat the last one; their results are not stored.
    const size_t row = first + (lane < rows ? lane : rows - 1);
    if (p.layout == LOSA_DENSE) {
      p.value_type == LOSA_I4 ? expand_lane(DenseRow<true>(t, row), lane, padded, panel)
                              : expand_lane(DenseRow<false>(t, row), lane, padded, panel);
    } else {
      p.value_type == LOSA_I4 ? expand_lane(SparseRow<true>(t, row), lane, padded, panel)
                              : expand_lane(SparseRow<false>(t, row), lane, padded, panel);
    }
  }
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

// Two panels of 16 rows times `Tokens` tokens, all groups.
template <int Tokens>
void tile(const uint8_t *const panel[2], const float *scales, size_t group, const Activations &a,
          size_t token, __m512 total[2][Tokens]) {
  for (int k = 0; k < Tokens; ++k) {
    total[0][k] = total[1][k] = _mm512_setzero_ps();
  }
  for (size_t g = 0; g < a.groups; ++g) {
    __m512i acc[2][Tokens];
    for (int k = 0; k < Tokens; ++k) {
      acc[0][k] = acc[1][k] = start_lanes(a.bias[(token + static_cast<size_t>(k)) * a.groups + g]);
    }
    for (size_t i = g * group; i < (g + 1) * group; i += 4) {
      const __m512i w0 = load512(panel[0] + i * kLanes), w1 = load512(panel[1] + i * kLanes);
      for (int k = 0; k < Tokens; ++k) {
        int32_t four;
        std::memcpy(&four, a.q + (token + static_cast<size_t>(k)) * a.padded + i, 4);
        const __m512i x = _mm512_set1_epi32(four);
        acc[0][k] = dot(acc[0][k], w0, x);
        acc[1][k] = dot(acc[1][k], w1, x);
      }
    }
    const __m512 s0 = _mm512_loadu_ps(scales + 2 * g * kLanes),
                 s1 = _mm512_loadu_ps(scales + (2 * g + 1) * kLanes);
    for (int k = 0; k < Tokens; ++k) {
      const __m512 x = _mm512_set1_ps(a.scale[(token + static_cast<size_t>(k)) * a.groups + g]);
      total[0][k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[0][k]), _mm512_mul_ps(s0, x), total[0][k]);
      total[1][k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[1][k]), _mm512_mul_ps(s1, x), total[1][k]);
    }
  }
}

// Stores the tile of rows [first, first + rows) and `Tokens` tokens.
template <int Tokens>
void store(const __m512 total[2][Tokens], size_t first, size_t rows, size_t token, float *y, size_t ldy) {
  for (int k = 0; k < Tokens; ++k) {
    float *out = y + (token + static_cast<size_t>(k)) * ldy + first;
    for (size_t half = 0; half < 2 && half * kLanes < rows; ++half) {
      const size_t left = rows - half * kLanes;
      const auto used = static_cast<__mmask16>(left < kLanes ? (1u << left) - 1u : 0xffffu);
      _mm512_mask_storeu_ps(out + half * kLanes, used, total[half][k]);
    }
  }
}

template <int Tokens>
void tiles(const uint8_t *const panel[2], const float *scales, size_t group, const Activations &a,
           size_t *token, size_t first, size_t rows, float *y, size_t ldy) {
  for (; *token + Tokens <= a.tokens; *token += Tokens) {
    __m512 total[2][Tokens];
    tile<Tokens>(panel, scales, group, a, *token, total);
    store<Tokens>(total, first, rows, *token, y, ldy);
  }
}

void matmul_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t ldy,
                   uint8_t *scratch) {
  const losa_parts &p = t.parts;
  const size_t group = activation_group(p);
  auto *scales = reinterpret_cast<float *>(scratch + kPanelRows * a.padded);
  for (size_t first = begin; first < end; first += kPanelRows) {
    const size_t rows = end - first < kPanelRows ? end - first : kPanelRows;
    const size_t upper = rows > kLanes ? rows - kLanes : 0;
    const uint8_t *panel[2] = {scratch, scratch + (upper ? kLanes * a.padded : 0)};
    expand_panel(t, first, rows < kLanes ? rows : kLanes, a.padded, scratch);
    if (upper) {
      expand_panel(t, first + kLanes, upper, a.padded, scratch + kLanes * a.padded);
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
    multiply_tiles(t.parts, a, begin, end, y, ldy);
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
