// Placing kept bytes without an expand instruction: a mask byte selects one of 256 byte shuffles.
// Included by the AVX2 file and by the AVX-512 one for CPUs without VBMI2, each compiled with its own flags.
#ifndef LOSA_SHUFFLE_H
#define LOSA_SHUFFLE_H

#include <immintrin.h>

#include "layout.h"
#include "shuffle_table.h"

namespace losa {
namespace {

// Bits set in each byte, and in all bytes before it (exclusive; the total is returned).
inline unsigned prefix_counts(uint64_t word, uint64_t *before) {
  uint64_t c = word - ((word >> 1) & 0x5555555555555555u);
  c = (c & 0x3333333333333333u) + ((c >> 2) & 0x3333333333333333u);
  c = ((c + (c >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u;
  *before = c << 8;
  return static_cast<unsigned>(c >> 56);
}

inline __m128i load_pair(const uint8_t *low, const uint8_t *high) {
  const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(low));
  return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(first), reinterpret_cast<const __m64 *>(high)));
}

inline __m128i shuffles(unsigned low, unsigned high) {
  return load_pair(reinterpret_cast<const uint8_t *>(&kShuffle.control[low & 255]),
                   reinterpret_cast<const uint8_t *>(&kShuffle.control[high & 255]));
}

inline __m256i join(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

struct Block {
  __m256i low, high;  // 64 bytes
};

// Any count: bytes of the stream at `p` to the positions of `word`; `used` bytes were taken.
inline Block scatter(uint64_t word, const uint8_t *p, unsigned *used) {
  uint64_t b;
  *used = prefix_counts(word, &b);
  const __m256i second = _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0);
  const auto half = [&](uint64_t w, uint64_t o) {
    const __m256i data = join(load_pair(p + (o & 255), p + (o >> 8 & 255)),
                              load_pair(p + (o >> 16 & 255), p + (o >> 24 & 255)));
    const __m256i control = join(shuffles(static_cast<unsigned>(w), static_cast<unsigned>(w >> 8)),
                                 shuffles(static_cast<unsigned>(w >> 16), static_cast<unsigned>(w >> 24)));
    return _mm256_shuffle_epi8(data, _mm256_or_si256(control, second));
  };
  return {half(word, b), half(word >> 32, b >> 32)};
}

// The same count `c` <= 4 in every byte of the mask: 32 positions take their values from one load.
inline Block scatter_fixed(uint64_t word, const uint8_t *p, unsigned c, __m256i offsets) {
  const auto half = [&](uint64_t w, const uint8_t *from) {
    const __m256i data =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    const __m256i control = join(shuffles(static_cast<unsigned>(w), static_cast<unsigned>(w >> 8)),
                                 shuffles(static_cast<unsigned>(w >> 16), static_cast<unsigned>(w >> 24)));
    return _mm256_shuffle_epi8(data, _mm256_add_epi8(control, offsets));
  };
  return {half(word, p), half(word >> 32, p + 4 * c)};
}

// Kept values per mask byte if it is the same for all and small enough for scatter_fixed, else 0.
inline unsigned count_per_byte(const losa_parts &p) {
  if (p.layout != LOSA_NM || 8 % p.m != 0) {
    return 0;
  }
  const unsigned count = 8u / p.m * p.n;
  return count <= 4 ? count : 0;
}

inline __m256i fixed_offsets(unsigned c) {
  const auto byte = [](unsigned value) { return static_cast<long long>(0x0101010101010101u * value); };
  return _mm256_set_epi64x(byte(3 * c), byte(2 * c), byte(c), 0);
}

inline __m256i nibbles(__m256i bytes, int shift, __m256i levels) {
  const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(bytes, shift), _mm256_set1_epi8(15));
  return _mm256_shuffle_epi8(levels, codes);
}

inline __m256i load_table(const losa_parts &p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i *>(p.table.data)));
}

}  // namespace
}  // namespace losa

#endif
