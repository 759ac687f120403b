// Rows of levels in AVX-512 with VBMI2 and VNNI, where single instructions expand bytes and multiply them.
#ifndef LOSA_AVX512_ROWS_H
#define LOSA_AVX512_ROWS_H

#include "kernels/planes.h"
#include "kernels/x86/avx512_values.h"

namespace losa {
namespace {

// The dot product takes unsigned by signed bytes: weights are levels + 128, and the bias of the activations
// is added to the sums.
inline __m512i as_factor(__m512i levels) { return _mm512_xor_si512(levels, _mm512_set1_epi8(-128)); }
inline __m512i dot(__m512i acc, __m512i factor, __m512i x) {
#if defined(LOSA_EMULATED)
  return _mm512_dpbusd_epi32(acc, factor, x);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(factor), "v"(x));  // GCC 12 moves every sum to and fro
  return acc;
#endif
}

inline __m512i table512(const losa_parts &p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i *>(p.table.data)));
}

inline __m512i nibbles512(__m512i bytes, bool high) {
  const __m512i low_bits = _mm512_set1_epi8(15);
  return _mm512_and_si512(high ? _mm512_srli_epi16(bytes, 4) : bytes, low_bits);
}

// The default table: codes are 4-bit two's complement.
inline bool is_default_table(const losa_parts &p) {
  const auto *table = static_cast<const int8_t *>(p.table.data);
  bool same = p.value_type == LOSA_I4;
  for (int code = 0; same && code < 16; ++code) {
    same = table[code] == (code < 8 ? code : code - 16);
  }
  return same;
}

// Of the default table, level + 8 is a code with its highest bit flipped: one operation on any port, where
// the table takes two, one of them on the port of the expansion.
inline __m512i raised_in(__m512i bytes, int code, int highest) {
  constexpr int kAndXor = 0x6a;
  return _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8(static_cast<char>(code)),
                                   _mm512_set1_epi8(static_cast<char>(highest)), kAndXor);
}
inline __m512i raised512(__m512i bytes, bool high) {
  return raised_in(high ? _mm512_srli_epi16(bytes, 4) : bytes, 0x0f, 0x08);
}

// High codes left where they are: 16 times what raised512 finds, and a shift less.
constexpr float kInPlace = 16.0f;
inline __m512i raised_in_place(__m512i bytes) { return raised_in(bytes, 0xf0, 0x80); }

// How levels become factors: i8; i4 and i3 by table; i4 of the default table and i3 of a narrow one, as
// level + 8 instead of + 128.
enum class Levels { kI8, kTable, kRaised };
constexpr bool are_grouped(Levels levels) { return levels != Levels::kI8; }

// The bias of prepared activations is -128 * their sum.
constexpr int bias_shift(Levels levels) { return levels == Levels::kRaised ? 4 : 0; }

inline Levels levels_of(const losa_parts &p) {
  if (p.value_type == LOSA_I8) {
    return Levels::kI8;
  }
  const bool raised = p.value_type == LOSA_I4 ? is_default_table(p) : widest_level(p) < 8;
  return raised ? Levels::kRaised : Levels::kTable;
}

// The table as factors; that of i4 is looked up only if it is not raised.
inline __m512i factor_table(const losa_parts &p) {
  const __m512i table = table512(p);
  return p.value_type == LOSA_I3 && levels_of(p) == Levels::kRaised
             ? _mm512_add_epi8(table, _mm512_set1_epi8(8))
             : as_factor(table);
}

template <Levels How>
inline __m512i factors_of(__m512i bytes, bool high, __m512i table) {
  if (How == Levels::kRaised) {
    return raised512(bytes, high);
  }
  return How == Levels::kTable ? _mm512_shuffle_epi8(table, nibbles512(bytes, high)) : as_factor(bytes);
}

// What the rows of a tensor share.
struct Matrix512 : RowPlaces {
  explicit Matrix512(const losa_tensor &t)
      : RowPlaces(t),
        blocks((row_width(t.parts) + kBlock - 1) / kBlock),
        runs((blocks + 1) / 2),
        row_bytes(t.parts.layout == LOSA_DENSE ? dense_row_bytes(t.parts) : 0),
        count(fixed_count(t.parts) ? static_cast<unsigned>(kBlock / t.parts.m * t.parts.n) : 0),
        levels(is_grouped(t.parts) ? factor_table(t.parts) : _mm512_setzero_si512()) {}

  size_t blocks, runs;  // of 64 positions, and of 128
  size_t row_bytes;     // dense
  unsigned count;       // values of a block, if that is the same for all
  __m512i levels;       // of the codes of i4 or i3, as factors
};

// How a block's values are found and how many they are. kFew: always as many, and at most half are kept.
enum class Places { kCounted, kFixed, kFew, kCodes };

// 64 positions, of which the mask says which take the values at `p`.
inline __m512i expanded_from(const uint8_t *p, uint64_t mask) {
  return _mm512_maskz_expand_epi8(mask, loaded(load512(p)));
}

// Factors of one sparse row, 64 positions at a time. High: its codes are the high nibbles of a pair of rows.
// All that differs is known when this is compiled, because a branch in this loop is felt.
template <Levels How, bool High, Places Where>
class SparseRow {
  static constexpr bool I4 = are_grouped(How);

 public:
  static constexpr Levels kLevels = How;
  static constexpr bool kMasked = true;
  static constexpr unsigned kLines = I4 ? 1 : 4;  // of a run where half is kept: 1, of i8 2

  static size_t start(const Matrix512 &m, size_t row) { return m.start(row, I4); }
  static size_t whole_runs(const Matrix512 &m) { return m.blocks / 2; }

  // What the factors of next_scaled() are too large by.
  static constexpr float kScaled = High && How == Levels::kRaised ? kInPlace : 1.0f;

  SparseRow(const Matrix512 &m, size_t row)
      : m_(m), positions_(m.position_row(row)), at_(m.values + start(m, row)) {}

  // Blocks in their order. Second: of two that start at a multiple of 128. Whole: of whole_runs().
  template <bool Second, bool Whole>
  __m512i next(size_t block) {
    return factors_of<How>(expanded(block), High, m_.levels);
  }

  template <bool Second, bool Whole>
  __m512i next_scaled(size_t block) {
    return kScaled == 1.0f ? next<Second, Whole>(block) : raised_in_place(expanded(block));
  }

 private:
  __m512i expanded(size_t block) {
    const uint64_t word = Where == Places::kCodes ? m_.first_positions.word_at(positions_, block)
                                                  : load_word(positions_ + 8 * block);
    // 64 bytes from anywhere lie in two cache lines, 32 bytes mostly in one.
    const __m512i values = Where == Places::kFew ? load_low(at_) : load512(at_);
    // A fixed count keeps the address of the next block from waiting for this one's mask.
    at_ += Where == Places::kCounted ? static_cast<unsigned>(__builtin_popcountll(word)) : m_.count;
    return _mm512_maskz_expand_epi8(word, loaded(values));
  }

  // Few members and none of them wide: rows are short, and what is copied in pieces is waited for.
  const Matrix512 &m_;
  const uint8_t *positions_, *at_;
};

// Factors of one dense row.
template <Levels How>
class DenseRow {
  static constexpr bool I4 = are_grouped(How);

 public:
  static constexpr Levels kLevels = How;
  static constexpr bool kMasked = false;
  static constexpr unsigned kLines = I4 ? 2 : 4;

  static size_t start(const Matrix512 &m, size_t row) { return row * m.row_bytes; }
  static size_t whole_runs(const Matrix512 &m) { return m.columns / kPadding; }

  static constexpr float kScaled = 1.0f;

  DenseRow(const Matrix512 &m, size_t row) : m_(m), row_(m.values + start(m, row)) {}

  template <bool Second, bool Whole>
  __m512i next_scaled(size_t block) const {
    return next<Second, Whole>(block);
  }

  template <bool Second, bool Whole>
  __m512i next(size_t block) const {
    const size_t first = block * kBlock;
    if (I4) {
      return next_i4<Second, Whole>(first - (Second ? kBlock : 0));
    }
    if (Whole || first + kBlock <= m_.columns) {
      return as_factor(load512(row_ + first));
    }
    alignas(64) uint8_t copy[kBlock] = {};
    std::memcpy(copy, row_ + first, m_.columns - first);
    return as_factor(load512(copy));
  }

 private:
  template <bool Second, bool Whole>
  __m512i next_i4(size_t first) const {
    if (Whole || first + kPadding <= m_.columns) {
      return factors_of<How>(load512(row_ + first / 2), Second, m_.levels);
    }
    alignas(64) uint8_t copy[kPadding] = {};
    split_dense_tail(row_ + first / 2, m_.columns - first, copy);
    return factors_of<How>(load512(copy + (Second ? kBlock : 0)), false, m_.levels);
  }

  const Matrix512 &m_;
  const uint8_t *row_;
};

// Codes of 64 positions of a run of 128 of a dense i3 row: 32 bytes of lower bits, 16 of the highest. Both:
// codes of the 64 positions behind them are in the high nibbles.
template <bool Second, bool Both = false>
inline __m512i codes_of_planes(const uint8_t *bytes) {
  constexpr int kFirst = Second ? 4 : 0;  // 32 positions have bits kFirst and the next of the lower bytes
  constexpr int kNext = kFirst + 2;
  const auto low = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes)));
  const auto high = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes + 32)));
  const __m512i lower =
      _mm512_rorv_epi32(low, _mm512_setr_epi32(kFirst, kFirst, kFirst, kFirst, kFirst, kFirst, kFirst, kFirst,
                                               kNext, kNext, kNext, kNext, kNext, kNext, kNext, kNext));
  // 16 positions have bit kFirst of the upper bytes, 16 the next; it is wanted in bit 2, so two of the shifts
  // of the first 64 positions go to the left.
  constexpr int k0 = kFirst - 2, k1 = kFirst - 1, k2 = kFirst, k3 = kFirst + 1;
  const __m512i highest = _mm512_rorv_epi32(
      high, _mm512_setr_epi32(k0, k0, k0, k0, k1, k1, k1, k1, k2, k2, k2, k2, k3, k3, k3, k3));
  constexpr int kSelect = 0xca;  // of every bit of the first operand: the second if it is set, or the third
  const __m512i joined =
      _mm512_ternarylogic_epi32(_mm512_set1_epi8(Both ? 0x33 : 3), lower, highest, kSelect);
  return _mm512_and_si512(joined, _mm512_set1_epi8(Both ? 0x77 : 7));
}

// Factors of one dense i3 row.
template <Levels How>
class DenseRowOfPlanes {
 public:
  static constexpr Levels kLevels = How;
  static constexpr bool kMasked = false;
  static constexpr unsigned kLines = 2;

  static size_t start(const Matrix512 &m, size_t row) { return row * m.row_bytes; }
  static size_t whole_runs(const Matrix512 &m) { return m.columns / kPadding; }

  static constexpr float kScaled = 1.0f;

  DenseRowOfPlanes(const Matrix512 &m, size_t row) : m_(m), row_(m.values + start(m, row)) {}

  template <bool Second, bool Whole>
  __m512i next_scaled(size_t block) const {
    return next<Second, Whole>(block);
  }

  template <bool Second, bool Whole>
  __m512i next(size_t block) const {
    const size_t first = block * kBlock - (Second ? kBlock : 0);
    const uint8_t *bytes = row_ + first / 8 * 3;
    if (Whole || first + kPadding <= m_.columns) {
      return _mm512_shuffle_epi8(m_.levels, codes_of_planes<Second>(bytes));
    }
    alignas(64) uint8_t codes[kPadding] = {};
    split_planes(bytes, m_.columns - first, codes);
    return _mm512_shuffle_epi8(m_.levels, load512(codes + (Second ? kBlock : 0)));
  }

 private:
  const Matrix512 &m_;
  const uint8_t *row_;
};

inline void unpack_run(const uint8_t *planes, uint8_t *codes) {
  _mm512_storeu_si512(codes, codes_of_planes<false>(planes));
  _mm512_storeu_si512(codes + kBlock, codes_of_planes<true>(planes));
}

// Factors of one sparse i3 row: its codes are expanded, and then looked up as those of a dense one.
template <Levels How, bool Codes>
class SparseRowOfPlanes {
 public:
  static constexpr Levels kLevels = How;
  static constexpr bool kMasked = true;
  static constexpr unsigned kLines = 1;
  static constexpr float kScaled = 1.0f;

  static size_t start(const Matrix512 &m, size_t row) { return m.start(row, false); }
  static size_t whole_runs(const Matrix512 &m) { return m.blocks / 2; }

  SparseRowOfPlanes(const Matrix512 &m, size_t row)
      : m_(m), positions_(m.position_row(row)), kept_(m.values + start(m, row), m.bytes_of(row, false)) {}

  template <bool Second, bool Whole>
  __m512i next_scaled(size_t block) {
    return next<Second, Whole>(block);
  }

  template <bool Second, bool Whole>
  __m512i next(size_t block) {
    const uint64_t word =
        Codes ? m_.first_positions.word_at(positions_, block) : load_word(positions_ + 8 * block);
    const __m512i codes = expanded_from(kept_.next(), word);
    kept_.take(static_cast<unsigned>(__builtin_popcountll(word)));
    return _mm512_shuffle_epi8(m_.levels, codes);
  }

 private:
  const Matrix512 &m_;
  const uint8_t *positions_;
  KeptCodes<unpack_run, 4> kept_;  // a panel has 16 of them, which stay in the first cache
};

}  // namespace
}  // namespace losa

#endif
