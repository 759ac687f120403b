// Sums of products of unsigned by signed bytes in AVX2, and in AVX-VNNI, where one instruction multiplies
// and adds to 32 bits. The other headers of AVX2 are compiled for both.
#ifndef LOSA_AVX2_DOT_H
#define LOSA_AVX2_DOT_H

#include <immintrin.h>

#include "kernels/x86/always_inline.h"

namespace losa {
namespace {

inline __m256i sums_of_two(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

#if defined(LOSA_AVXVNNI)

// Sums have 32 bits at once, so that no limit of 16 bits is to be kept.
constexpr bool kWideSums = true;

// Adds products of 32 bytes, four neighbours to each sum.
template <bool Narrow>
inline LOSA_ALWAYS_INLINE __m256i dot_accumulate(__m256i acc, __m256i w, __m256i x) {
  return _mm256_dpbusd_avx_epi32(acc, w, x);
}

// The 32-bit sums of what was added.
template <bool Narrow>
inline LOSA_ALWAYS_INLINE __m256i dot_total(__m256i acc) {
  return acc;
}

// Adds products of words, two neighbours to each sum.
inline LOSA_ALWAYS_INLINE __m256i add_words(__m256i acc, __m256i words, __m256i factors) {
  return _mm256_dpwssd_avx_epi32(acc, words, factors);
}

#else

constexpr bool kWideSums = false;

// Two products are added with saturation: w up to 128 and x of -127..127 are far enough from it. Narrow: so
// are the 16-bit sums of all that is added; else they are widened every time.
template <bool Narrow>
inline LOSA_ALWAYS_INLINE __m256i dot_accumulate(__m256i acc, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(w, x);
  return Narrow ? _mm256_add_epi16(acc, pairs) : _mm256_add_epi32(acc, sums_of_two(pairs));
}

template <bool Narrow>
inline LOSA_ALWAYS_INLINE __m256i dot_total(__m256i acc) {
  return Narrow ? sums_of_two(acc) : acc;
}

inline LOSA_ALWAYS_INLINE __m256i add_words(__m256i acc, __m256i words, __m256i factors) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(words, factors));
}

#endif

}  // namespace
}  // namespace losa

#endif
