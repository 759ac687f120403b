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

// In a register before it is expanded: the form of these instructions that reads memory looks at the mask to
// know what it may read, which some CPUs do slowly (and an emulator wrongly). All 64 bytes are there.
template <typename Vector>
inline Vector loaded(Vector v) {
#if !defined(LOSA_EMULATED_AVX512)
  __asm__("" : "+v"(v));
#endif
  return v;
}

#if defined(LOSA_VNNI)

constexpr const char *kName = "avx512vnni";

// The dot product takes unsigned by signed bytes: weights are levels + 128, and the sums start at the bias.
inline __m512i as_factor(__m512i levels) { return _mm512_xor_si512(levels, _mm512_set1_epi8(-128)); }
inline __m512i dot(__m512i acc, __m512i factor, __m512i x) {
#if defined(LOSA_EMULATED_AVX512)
  return _mm512_dpbusd_epi32(acc, factor, x);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(factor), "v"(x));  // GCC 12 moves every sum to and fro
  return acc;
#endif
}
inline __m512i start(int32_t bias) { return _mm512_zextsi128_si512(_mm_cvtsi32_si128(bias)); }
inline __m512i start_halves(int32_t low, int32_t high) {
  return _mm512_inserti64x4(start(low), _mm256_zextsi128_si256(_mm_cvtsi32_si128(high)), 1);
}
inline __m512i start_lanes(int32_t bias) { return _mm512_set1_epi32(bias); }

inline __m512i scatter512(uint64_t word, const uint8_t *p, unsigned *used) {
  *used = static_cast<unsigned>(__builtin_popcountll(word));
  return _mm512_maskz_expand_epi8(word, loaded(load512(p)));
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

// What the rows of a tensor share.
struct Matrix512 : RowPlaces {
  explicit Matrix512(const losa_tensor &t)
      : RowPlaces(t),
        blocks((row_width(t.parts) + kBlock - 1) / kBlock),
        count(fixed_count(t.parts) ? static_cast<unsigned>(kBlock / t.parts.m * t.parts.n) : 0),
        levels(t.parts.value_type == LOSA_I4 ? as_factor(table512(t.parts)) : _mm512_setzero_si512()) {}

  size_t blocks;
  unsigned count;  // values of a block, if that is the same for all
  __m512i levels;  // of the codes of i4, as factors
};

enum class Places { kCounted, kFixed, kCodes };  // how a block's values are found and how many they are

// Factors of one sparse row, 64 positions at a time. High: its codes are the high nibbles of a pair of rows.
// All that differs is known when this is compiled, because a branch in this loop is felt.
template <bool I4, bool High, Places Where>
class SparseRow {
 public:
  using Even = SparseRow<I4, false, Where>;
  using Odd = SparseRow<I4, I4, Where>;

  SparseRow(const Matrix512 &m, size_t row)
      : positions_(m.positions_of(row)),
        at_(m.values + m.start(row, I4)),
        count_(m.count),
        levels_(m.levels) {}

  // Blocks in their order; Second: of two that start at a multiple of 128.
  template <bool Second>
  __m512i next(size_t block) {
    const uint64_t word =
        Where == Places::kCodes ? positions_.word(block) : load_word(positions_.bytes + 8 * block);
    unsigned used;
    const __m512i found = scatter512(word, at_, &used);
    // A fixed count keeps the address of the next block from waiting for this one's mask.
    at_ += Where == Places::kCounted ? used : count_;
    return I4 ? _mm512_shuffle_epi8(levels_, nibbles512(found, High)) : as_factor(found);
  }

 private:
  Positions positions_;
  const uint8_t *at_;
  unsigned count_;
  __m512i levels_;
};

// Factors of one dense row.
template <bool I4>
class DenseRow {
 public:
  using Even = DenseRow<I4>;
  using Odd = DenseRow<I4>;

  DenseRow(const Matrix512 &m, size_t row)
      : columns_(m.columns), row_(m.values + row * (I4 ? (columns_ + 1) / 2 : columns_)), levels_(m.levels) {}

  template <bool Second>
  __m512i next(size_t block) const {
    const size_t first = block * kBlock;
    if (I4) {
      return _mm512_shuffle_epi8(levels_, codes<Second>(first - (Second ? kBlock : 0)));
    }
    if (first + kBlock <= columns_) {
      return as_factor(load512(row_ + first));
    }
    alignas(64) uint8_t copy[kBlock] = {};
    std::memcpy(copy, row_ + first, columns_ - first);
    return as_factor(load512(copy));
  }

 private:
  template <bool Second>
  __m512i codes(size_t first) const {
    if (first + kPadding <= columns_) {
      return nibbles512(load512(row_ + first / 2), Second);
    }
    alignas(64) uint8_t copy[kPadding] = {};
    split_dense_tail(row_ + first / 2, columns_ - first, copy);
    return load512(copy + (Second ? kBlock : 0));
  }

  size_t columns_;
  const uint8_t *row_;
  __m512i levels_;
};

template <typename T>
struct Tag {
  using Row = T;
};

// Calls use(tag) with a tag of the class that reads the rows of an integer tensor.
template <bool I4, typename Use>
void with_rows_of(const losa_parts &p, Use use) {
  if (p.layout == LOSA_DENSE) {
    use(Tag<DenseRow<I4>>());
  } else if (p.layout == LOSA_NM && p.position_bits != 0) {
    use(Tag<SparseRow<I4, false, Places::kCodes>>());
  } else if (fixed_count(p)) {
    use(Tag<SparseRow<I4, false, Places::kFixed>>());
  } else {
    use(Tag<SparseRow<I4, false, Places::kCounted>>());
  }
}

template <typename Use>
void with_rows(const losa_parts &p, Use use) {
  p.value_type == LOSA_I4 ? with_rows_of<true>(p, use) : with_rows_of<false>(p, use);
}

}  // namespace
}  // namespace losa

#endif
