// AVX2, FMA and F16C: float values, and the rounding of activations. There is no expand instruction: a mask
// byte selects one of 256 shuffles that put up to 8 kept values in their places.
#ifndef LOSA_AVX2_VALUES_H
#define LOSA_AVX2_VALUES_H

#include "kernels/target.h"
#include "kernels/x86/avx2_shuffle.h"
#include "kernels/x86/prefetch.h"

namespace losa {
namespace {

inline float sum(__m256 v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}

// 8 floats from the stream to the positions of a mask byte; zero elsewhere.
inline __m256 scatter_floats(unsigned mask, __m256 kept) {
  const __m128i ranks = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(&kShuffle.control[mask]));
  const __m256i index = _mm256_cvtepi8_epi32(ranks);
  const __m256 placed = _mm256_permutevar8x32_ps(kept, index);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), placed);
}

template <bool Half>
inline __m256 load_floats(const uint8_t *p) {
  if (Half) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  }
  return _mm256_loadu_ps(reinterpret_cast<const float *>(p));
}

// Calls use(position, 8 values) for every 8 positions of a sparse row. Always inlined, so that what `use`
// adds to stays in registers.
template <bool Half, typename Use>
inline LOSA_ALWAYS_INLINE void each_eight(const losa_tensor &t, size_t row, Use use) {
  constexpr size_t size = Half ? 2 : 4;
  const Positions positions(t.parts, row);
  const uint8_t *at = static_cast<const uint8_t *>(t.parts.values.data) + size * row_start(t, row);
  for (size_t block = 0; block < positions.blocks; ++block) {
    uint64_t word = positions.word(block);
    for (size_t i = 0; i < 8; ++i, word >>= 8) {
      const auto mask = static_cast<unsigned>(word & 255);
      fetch_ahead(at);
      use(block * kBlock + 8 * i, scatter_floats(mask, load_floats<Half>(at)));
      at += size * static_cast<unsigned>(__builtin_popcount(mask));
    }
  }
}

template <bool Half>
void expand_dense(const losa_parts &p, size_t row, float *out) {
  constexpr size_t size = Half ? 2 : 4;
  const uint8_t *from = static_cast<const uint8_t *>(p.values.data) + size * row * p.columns;
  size_t i = 0;
  for (; i + 8 <= p.columns; i += 8) {
    _mm256_storeu_ps(out + i, load_floats<Half>(from + size * i));
  }
  alignas(32) uint8_t tail[32] = {};
  std::memcpy(tail, from + size * i, size * (p.columns - i));
  if (i < padded_columns(p)) {
    _mm256_storeu_ps(out + i, load_floats<Half>(tail));
    std::memset(out + i + 8, 0, (padded_columns(p) - i - 8) * sizeof(float));
  }
}

inline void expand_values(const losa_tensor &t, size_t row, float *out) {
  const losa_parts &p = t.parts;
  const bool half = p.value_type == LOSA_F16;
  if (p.layout == LOSA_DENSE) {
    half ? expand_dense<true>(p, row, out) : expand_dense<false>(p, row, out);
    return;
  }
  size_t end = 0;
  const auto put = [&](size_t position, __m256 values) {
    _mm256_storeu_ps(out + position, values);
    end = position + 8;
  };
  half ? each_eight<true>(t, row, put) : each_eight<false>(t, row, put);
  std::memset(out + end, 0, (padded_columns(p) - end) * sizeof(float));
}

template <bool Half>
float dot_values(const losa_tensor &t, size_t row, const Activations &a) {
  __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  each_eight<Half>(t, row, [&](size_t position, __m256 values) {
    acc[position / 8 % 2] = _mm256_fmadd_ps(values, _mm256_loadu_ps(a.x + position), acc[position / 8 % 2]);
  });
  return sum(_mm256_add_ps(acc[0], acc[1]));
}

inline void values_panel(const losa_tensor &, const float *panel, size_t first, size_t rows,
                         const Activations &a, float *y, size_t ldy) {
  for (size_t token = 0; token < a.tokens; token += 4) {
    const size_t tokens = a.tokens - token < 4 ? a.tokens - token : 4;
    const float *x[4];
    for (size_t k = 0; k < 4; ++k) {
      x[k] = a.x + (token + (k < tokens ? k : 0)) * a.padded;
    }
    for (size_t r = 0; r < rows; r += 2) {
      const size_t pair = rows - r < 2 ? 1 : 2;
      const float *w[2] = {panel + r * a.padded, panel + (r + pair - 1) * a.padded};
      __m256 acc[2][4];
      for (auto &row : acc) {
        for (auto &v : row) {
          v = _mm256_setzero_ps();
        }
      }
      for (size_t i = 0; i < a.padded; i += 8) {
        const __m256 w0 = _mm256_loadu_ps(w[0] + i), w1 = _mm256_loadu_ps(w[1] + i);
        for (int k = 0; k < 4; ++k) {
          const __m256 v = _mm256_loadu_ps(x[k] + i);
          acc[0][k] = _mm256_fmadd_ps(w0, v, acc[0][k]);
          acc[1][k] = _mm256_fmadd_ps(w1, v, acc[1][k]);
        }
      }
      for (size_t k = 0; k < tokens; ++k) {
        for (size_t i = 0; i < pair; ++i) {
          y[(token + k) * ldy + first + r + i] = sum(acc[i][k]);
        }
      }
    }
  }
}

inline void matvec_values(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                          size_t, void *scratch) {
  auto *expanded = static_cast<float *>(scratch);
  for (size_t row = begin; row < end; ++row) {
    if (t.parts.layout == LOSA_DENSE) {
      expand_values(t, row, expanded);
      values_panel(t, expanded, row, 1, a, y, 0);
    } else {
      y[row] = t.parts.value_type == LOSA_F16 ? dot_values<true>(t, row, a) : dot_values<false>(t, row, a);
    }
  }
}

inline float largest(__m256 v) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}

inline int sum(__m256i v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

// One group of `length` floats, a multiple of 32.
inline void quantize_group(const float *x, size_t length, int8_t *q, float *scale, int32_t *bias) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 peak = _mm256_setzero_ps();
  for (size_t i = 0; i < length; i += 8) {
    peak = _mm256_max_ps(peak, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
  }
  const float top = largest(peak);
  *scale = top / 127.0f;
  const __m256 inverse = _mm256_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
  __m256i total = _mm256_setzero_si256();
  for (size_t i = 0; i < length; i += 32) {
    __m256i v[4];
    for (int k = 0; k < 4; ++k) {
      v[k] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * k), inverse));
      total = _mm256_add_epi32(total, v[k]);
    }
    // The packs work within 128-bit lanes; the permutation puts the groups of four back in order.
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(q + i), _mm256_permutevar8x32_epi32(bytes, order));
  }
  *bias = -128 * sum(total);
}

}  // namespace
}  // namespace losa

#endif
