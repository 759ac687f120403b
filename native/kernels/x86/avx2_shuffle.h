// Placing kept bytes without an expand instruction: a mask byte selects one of 256 byte shuffles.
#ifndef LOSA_AVX2_SHUFFLE_H
#define LOSA_AVX2_SHUFFLE_H

#include <immintrin.h>

#include "format/layout.h"
#include "kernels/shuffle_table.h"
#include "kernels/x86/always_inline.h"

namespace losa {
namespace {

// Shuffles of 16 positions are a sum of two: of what the first mask byte says, and the second one. The second
// eight positions begin after the values of the first.
struct PlaceTable {
  alignas(64) uint8_t first[256][16], second[256][16];

  explicit constexpr PlaceTable(const ShuffleTable &table) : first{}, second{} {
    for (unsigned byte = 0; byte < 256; ++byte) {
      uint8_t kept = 0;
      for (unsigned i = 0; i < 8; ++i) {
        first[byte][i] = second[byte][8 + i] = static_cast<uint8_t>(table.control[byte] >> (8 * i));
        kept = static_cast<uint8_t>(kept + (byte >> i & 1));
      }
      for (unsigned i = 8; i < 16; ++i) {
        first[byte][i] = kept;
      }
    }
  }
};
constexpr PlaceTable kPlaces(kShuffle);

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

inline __m128i load_line(const uint8_t *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); }

// 32 positions with any count: the values at `p` go to the positions of two mask bytes, those at `p1` to the
// positions of the two after them.
inline LOSA_ALWAYS_INLINE __m256i scatter_half(const uint8_t *mask, const uint8_t *p, const uint8_t *p1) {
  const __m256i first = join(load_line(kPlaces.first[mask[0]]), load_line(kPlaces.first[mask[2]]));
  const __m256i second = join(load_line(kPlaces.second[mask[1]]), load_line(kPlaces.second[mask[3]]));
  return _mm256_shuffle_epi8(join(load_line(p), load_line(p1)), _mm256_add_epi8(first, second));
}

// 64 positions; `used` bytes were taken.
inline LOSA_ALWAYS_INLINE Block scatter(const uint8_t *mask, const uint8_t *p, unsigned *used) {
  const uint64_t word = load_word(mask);
  const auto quarter = static_cast<unsigned>(__builtin_popcount(static_cast<uint16_t>(word)));
  const auto half = static_cast<unsigned>(__builtin_popcount(static_cast<uint32_t>(word)));
  const auto most = static_cast<unsigned>(__builtin_popcountll(word << 16));
  *used = static_cast<unsigned>(__builtin_popcountll(word));
  return {scatter_half(mask, p, p + quarter), scatter_half(mask + 4, p + half, p + most)};
}

// The same count `c` <= 4 in every byte of the mask: 32 positions take their values from one load.
inline LOSA_ALWAYS_INLINE Block scatter_fixed(const uint8_t *mask, const uint8_t *p, unsigned c,
                                              __m256i offsets) {
  const auto half = [&](const uint8_t *m, const uint8_t *from) {
    const __m256i data =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    const __m256i control = join(shuffles(m[0], m[1]), shuffles(m[2], m[3]));
    return _mm256_shuffle_epi8(data, _mm256_add_epi8(control, offsets));
  };
  return {half(mask, p), half(mask + 4, p + 4 * c)};
}

// The patterns of CodeTable: for each code byte the slot of every one of its 16 positions, or 0x80.
struct CodeShuffles {
  alignas(64) uint8_t control[256][16];

  constexpr CodeShuffles(unsigned n, unsigned m, unsigned bits) : control{} {
    for (unsigned byte = 0; byte < 256; ++byte) {
      for (unsigned i = 0; i < 16; ++i) {
        control[byte][i] = 0x80;
      }
      for (unsigned slot = 0; slot < 8 / bits; ++slot) {
        const unsigned code = (byte >> slot * bits) & ((1u << bits) - 1u);
        control[byte][slot / n * m + code % m] = static_cast<uint8_t>(slot);
      }
    }
  }
};
constexpr CodeShuffles kShuffleOneOfTwo(1, 2, 1), kShuffleOneOfFour(1, 4, 2), kShuffleOneOfEight(1, 8, 4),
    kShuffleTwoOfSixteen(2, 16, 4);

inline const CodeShuffles *code_shuffles(const losa_parts &p) {
  const CodeTable *table = p.layout == LOSA_NM ? code_table(p.n, p.m, p.position_bits) : nullptr;
  return table == nullptr        ? nullptr
         : table == &kOneOfTwo   ? &kShuffleOneOfTwo
         : table == &kOneOfFour  ? &kShuffleOneOfFour
         : table == &kOneOfEight ? &kShuffleOneOfEight
                                 : &kShuffleTwoOfSixteen;
}

// 32 positions of two code bytes with `slots` <= 8 values each; offsets: 0, then `slots`.
inline LOSA_ALWAYS_INLINE __m256i scatter_codes(const CodeShuffles &shuffles, const uint8_t *codes,
                                                const uint8_t *p, __m256i offsets) {
  const auto control = [&](uint8_t code) {
    return _mm_load_si128(reinterpret_cast<const __m128i *>(shuffles.control[code]));
  };
  const __m256i data = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  return _mm256_shuffle_epi8(data, _mm256_add_epi8(join(control(codes[0]), control(codes[1])), offsets));
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

inline LOSA_ALWAYS_INLINE __m256i nibbles(__m256i bytes, int shift, __m256i levels) {
  const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(bytes, shift), _mm256_set1_epi8(15));
  return _mm256_shuffle_epi8(levels, codes);
}

inline __m256i load_table(const losa_parts &p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i *>(p.table.data)));
}

}  // namespace
}  // namespace losa

#endif
