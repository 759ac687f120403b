// AVX2: the gate of an MLP, eight values at a time.
#ifndef LOSA_AVX2_SWIGLU_H
#define LOSA_AVX2_SWIGLU_H

#include <immintrin.h>

#include <cstring>

#include "kernels/series.h"

namespace losa {
namespace {

inline __m256 exponential(__m256 x) {
  const __m256 most = _mm256_set1_ps(series::kMost), round = _mm256_set1_ps(series::kRound);
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_sub_ps(_mm256_setzero_ps(), most)), most);
  const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(series::kLog2E), round);
  const __m256 n = _mm256_sub_ps(shifted, round);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(series::kLn2High), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(series::kLn2Low), r);
  __m256 sum = _mm256_set1_ps(series::kTerms[0]);
  for (size_t i = 1; i < series::kTermCount; ++i) {
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(series::kTerms[i]));
  }
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  const __m256i one = _mm256_set1_epi32(static_cast<int>(series::kOne));
  return _mm256_mul_ps(sum, _mm256_castsi256_ps(_mm256_add_epi32(power, one)));
}

inline __m256 swiglu(__m256 gate, __m256 up) {
  const __m256 one = _mm256_set1_ps(1.0f), negative = _mm256_sub_ps(_mm256_setzero_ps(), gate);
  const __m256 silu = _mm256_div_ps(gate, _mm256_add_ps(one, exponential(negative)));
  return _mm256_mul_ps(silu, up);
}

inline void swiglu(float *y, const float *up, size_t count) {
  constexpr size_t kLanes = 8;
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    _mm256_storeu_ps(y + i, swiglu(_mm256_loadu_ps(y + i), _mm256_loadu_ps(up + i)));
  }
  if (i < count) {
    float last[2][kLanes] = {};
    std::memcpy(last[0], y + i, (count - i) * sizeof(float));
    std::memcpy(last[1], up + i, (count - i) * sizeof(float));
    _mm256_storeu_ps(last[0], swiglu(_mm256_loadu_ps(last[0]), _mm256_loadu_ps(last[1])));
    std::memcpy(y + i, last[0], (count - i) * sizeof(float));
  }
}

}  // namespace
}  // namespace losa

#endif
