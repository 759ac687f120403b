// The AVX-VNNI intrinsics that the kernels use, in plain C++ after Intel's description of each, as those of
// AVX-512 in emulated_avx512.h.
#ifndef LOSA_EMULATED_AVXVNNI_H
#define LOSA_EMULATED_AVXVNNI_H

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace losa_emulated {

// Adds to every dword of `acc` its products of A by B, as many as the dword holds. Sums wrap.
template <typename A, typename B>
inline __m256i add_products(__m256i acc, __m256i a, __m256i b) {
  constexpr int kEach = sizeof(int32_t) / sizeof(A), kDwords = sizeof(__m256i) / sizeof(int32_t);
  uint32_t sums[kDwords];
  A first[kDwords * kEach];
  B second[kDwords * kEach];
  std::memcpy(sums, &acc, sizeof acc);
  std::memcpy(first, &a, sizeof a);
  std::memcpy(second, &b, sizeof b);
  for (int i = 0; i < kDwords * kEach; ++i) {
    sums[i / kEach] += static_cast<uint32_t>(int32_t{first[i]} * int32_t{second[i]});
  }
  __m256i out;
  std::memcpy(&out, sums, sizeof out);
  return out;
}

}  // namespace losa_emulated

#undef _mm256_dpbusd_avx_epi32
#undef _mm256_dpwssd_avx_epi32
#define _mm256_dpbusd_avx_epi32 losa_emulated::add_products<uint8_t, int8_t>
#define _mm256_dpwssd_avx_epi32 losa_emulated::add_products<int16_t, int16_t>

#endif
