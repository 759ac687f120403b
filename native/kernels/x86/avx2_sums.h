// Sums of products of levels by activations in AVX2.
#ifndef LOSA_AVX2_SUMS_H
#define LOSA_AVX2_SUMS_H

#include "format/layout.h"
#include "kernels/x86/avx2_dot.h"
#include "kernels/x86/avx2_values.h"

namespace losa {
namespace {

inline __m256i load256(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

// Adds 32 products. Narrow levels are unsigned (avx2_panel.h); others would need 9 bits without their sign:
// |w| * sign(x, w).
template <bool Narrow>
inline LOSA_ALWAYS_INLINE __m256i add_products(__m256i acc, __m256i w, const int8_t *x) {
  return Narrow ? dot_accumulate<true>(acc, w, load256(x))
                : dot_accumulate<false>(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(load256(x), w));
}

// What the offset of narrow levels made too much, in eight groups from g on, of which `count` are there:
// `products` are their scales.
inline __m256 add_biases(const Activations &a, size_t g, size_t count, const float products[8],
                         __m256 total) {
  const __m256i bias = _mm256_srai_epi32(load256(a.bias + g), 4),
                order = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), order);
  const __m256 scales = _mm256_and_ps(_mm256_castsi256_ps(there), _mm256_load_ps(products));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(bias), scales, total);
}

}  // namespace
}  // namespace losa

#endif
