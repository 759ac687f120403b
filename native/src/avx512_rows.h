// AVX-512 (F, BW, DQ, VL), compiled twice: with VBMI2 and VNNI, where bytes are expanded and multiplied by
// single instructions, and without, where the shuffles of shuffle.h and 16-bit sums take their place.
#ifndef LOSA_AVX512_ROWS_H
#define LOSA_AVX512_ROWS_H

#include "shuffle.h"
#if defined(LOSA_EMULATED_AVX512)
#include "emulated_avx512.h"
#endif

namespace losa {
namespace {

inline __m512i load512(const void *p) { return _mm512_loadu_si512(p); }

#if defined(LOSA_VNNI)

constexpr const char *kName = "avx512vnni";

// The dot product takes unsigned by signed bytes: weights are levels + 128, and the sums start at the bias.
inline __m512i as_factor(__m512i levels) { return _mm512_xor_si512(levels, _mm512_set1_epi8(-128)); }
inline __m512i dot(__m512i acc, __m512i factor, __m512i x) { return _mm512_dpbusd_epi32(acc, factor, x); }
inline __m512i start(int32_t bias) { return _mm512_zextsi128_si512(_mm_cvtsi32_si128(bias)); }
inline __m512i start_halves(int32_t low, int32_t high) {
  return _mm512_inserti64x4(start(low), _mm256_zextsi128_si256(_mm_cvtsi32_si128(high)), 1);
}
inline __m512i start_lanes(int32_t bias) { return _mm512_set1_epi32(bias); }

inline __m512i scatter512(uint64_t word, const uint8_t *p, unsigned *used) {
  *used = static_cast<unsigned>(__builtin_popcountll(word));
  return _mm512_maskz_expand_epi8(word, load512(p));
}

#else

constexpr const char *kName = "avx512f";

inline __m512i as_factor(__m512i levels) { return levels; }
inline __m512i dot(__m512i acc, __m512i factor, __m512i x) {
  // |w| * sign(x, w): without the sign the levels would need 9 bits. Sums of two fit 16 bits.
  const __m512i flipped = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(factor), _mm512_setzero_si512(), x);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(factor), flipped);
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
inline __m512i start(int32_t) { return _mm512_setzero_si512(); }
inline __m512i start_halves(int32_t, int32_t) { return _mm512_setzero_si512(); }
inline __m512i start_lanes(int32_t) { return _mm512_setzero_si512(); }

inline __m512i scatter512(uint64_t word, const uint8_t *p, unsigned *used) {
  const Block found = scatter(reinterpret_cast<const uint8_t *>(&word), p, used);
  return _mm512_inserti64x4(_mm512_castsi256_si512(found.low), found.high, 1);
}

#endif

inline __m512i table512(const losa_parts &p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i *>(p.table.data)));
}

inline __m512i nibbles512(__m512i bytes, bool high) {
  const __m512i low_bits = _mm512_set1_epi8(15);
  return _mm512_and_si512(high ? _mm512_srli_epi16(bytes, 4) : bytes, low_bits);
}

// One sparse row, 64 positions at a time, as levels.
template <bool I4>
class SparseRow {
 public:
  SparseRow(const losa_tensor &t, size_t row)
      : positions_(t.parts, row),
        at_(static_cast<const uint8_t *>(t.parts.values.data) + row_start(t, row)),
        high_(row % 2 != 0),
        levels_(I4 ? table512(t.parts) : _mm512_setzero_si512()),
        fixed_(fixed_count(t.parts) ? static_cast<unsigned>(kBlock / t.parts.m * t.parts.n) : 0) {}

  size_t blocks() const { return positions_.blocks; }

  __m512i next(size_t block) {
    unsigned used;
    const __m512i found = scatter512(positions_.word(block), at_, &used);
    // A fixed count keeps the address of the next block from waiting for this one's mask.
    at_ += fixed_ ? fixed_ : used;
    return I4 ? _mm512_shuffle_epi8(levels_, nibbles512(found, high_)) : found;
  }

 private:
  Positions positions_;
  const uint8_t *at_;
  bool high_;
  __m512i levels_;
  unsigned fixed_;
};

template <bool I4>
class DenseRow {
 public:
  DenseRow(const losa_tensor &t, size_t row)
      : columns_(t.parts.columns),
        row_(static_cast<const uint8_t *>(t.parts.values.data) + row * (I4 ? (columns_ + 1) / 2 : columns_)),
        levels_(I4 ? table512(t.parts) : _mm512_setzero_si512()) {}

  size_t blocks() const { return (columns_ + kBlock - 1) / kBlock; }

  __m512i next(size_t block) {
    const size_t first = block * kBlock;
    if (I4) {
      return _mm512_shuffle_epi8(levels_, codes(first));
    }
    if (first + kBlock <= columns_) {
      return load512(row_ + first);
    }
    alignas(64) uint8_t copy[kBlock] = {};
    std::memcpy(copy, row_ + first, columns_ - first);
    return load512(copy);
  }

 private:
  __m512i codes(size_t start) const {
    const size_t first = start / kPadding * kPadding;
    if (first + kPadding <= columns_) {
      return nibbles512(load512(row_ + first / 2), start != first);
    }
    alignas(64) uint8_t copy[kPadding] = {};
    split_dense_tail(row_ + first / 2, columns_ - first, copy);
    return load512(copy + (start - first));
  }

  size_t columns_;
  const uint8_t *row_;
  __m512i levels_;
};

}  // namespace
}  // namespace losa

#endif
