// AVX-512 (F, BW, DQ, VL): float values, and the rounding of activations.
#ifndef LOSA_AVX512_VALUES_H
#define LOSA_AVX512_VALUES_H

#include "kernels/target.h"
#include "kernels/x86/prefetch.h"

namespace losa {
namespace {

inline __m512i load512(const void *p) { return _mm512_loadu_si512(p); }

// 32 bytes; what is above them is of no use.
inline __m512i load_low(const uint8_t *p) {
  return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}

// In a register before it is expanded: the form of these instructions that reads memory looks at the mask to
// know what it may read, which some CPUs do slowly (and an emulator wrongly). All 64 bytes are there.
template <typename Vector>
inline Vector loaded(Vector v) {
#if !defined(LOSA_EMULATED)
  __asm__("" : "+v"(v));
#endif
  return v;
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
void matvec_halves_or_floats(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y) {
  for (size_t row = begin; row < end; ++row) {
    __m512 acc[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    each_sixteen<Half>(t, row, [&](size_t position, __m512 values) {
      __m512 &sum = acc[position / 16 % 2];
      sum = _mm512_fmadd_ps(values, _mm512_loadu_ps(a.x + position), sum);
    });
    y[row] = _mm512_reduce_add_ps(_mm512_add_ps(acc[0], acc[1]));
  }
}

// Float weights times one token.
inline void matvec_values(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                          size_t, void *) {
  t.parts.value_type == LOSA_F16 ? matvec_halves_or_floats<true>(t, a, begin, end, y)
                                 : matvec_halves_or_floats<false>(t, a, begin, end, y);
}

inline void expand_values(const losa_tensor &t, size_t row, float *out) {
  size_t end = 0;
  const auto put = [&](size_t position, __m512 values) {
    _mm512_storeu_ps(out + position, values);
    end = position + 16;
  };
  t.parts.value_type == LOSA_F16 ? each_sixteen<true>(t, row, put) : each_sixteen<false>(t, row, put);
  std::memset(out + end, 0, (padded_columns(t.parts) - end) * sizeof(float));
}

// Four expanded rows times four tokens.
inline void values_panel(const losa_tensor &, const float *panel, size_t first, size_t rows,
                         const Activations &a, float *y, size_t ldy) {
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

inline void quantize_group(const float *x, size_t length, int8_t *q, float *scale, int32_t *bias) {
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

}  // namespace
}  // namespace losa

#endif
