// Slots of tiles in AVX2: their levels, and where a byte shuffle finds their activations.
#ifndef LOSA_AVX2_SLOTS_H
#define LOSA_AVX2_SLOTS_H

#include <immintrin.h>

#include "kernels/target.h"
#include "kernels/x86/avx2_dot.h"

namespace losa {
namespace {

// How the slots of a tile are stored: the N of N:4 (1 or 2), N:16, or windows.
constexpr int kWide = 0, kWindows = 4;
// Whether a line of positions holds two groups of 16 columns.
constexpr bool two_groups(int form) { return form == 1; }

// 32 slots: where in 16 activations, and their levels as magnitude and as anything of the same sign.
struct Slots {
  __m256i at, magnitude, sign;
};

// Linear: levels of -8..8, of which the sums of kFlush steps, two products of at most 8 * 127 each, fit 16
// bits. Of i4 their sign is also the highest bit of their code, as in the linear table: a byte of a slot then
// is its own sign.
constexpr size_t kFlush = 16;

inline bool is_linear(const losa_parts &p) {
  const auto *table = static_cast<const int8_t *>(p.table.data);
  bool linear = is_grouped(p);
  for (int code = 0; linear && code < 16; ++code) {
    const int level = table[code];
    const bool sign = p.value_type != LOSA_I4 || (code < 8 ? level >= 0 : level <= 0);
    linear = sign && level >= -8 && level <= 8;
  }
  return linear;
}

inline LOSA_ALWAYS_INLINE __m256i load_step(const uint8_t *p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
}

// Two nibbles of 16 bytes: low ones, then high ones.
inline __m256i split_nibbles(const uint8_t *p) {
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  const __m256i wide = _mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1);
  return _mm256_and_si256(wide, _mm256_set1_epi8(15));
}

// `levels`: magnitudes of the 16 codes if Linear, else the levels themselves.
template <losa_value_type T, bool Linear>
inline Slots load_slots(const Tiles &tiles, size_t step, __m256i levels) {
  const __m256i raw = load_step(tiles.values + step * Tiles::kStep), low = _mm256_set1_epi8(15);
  if (T == LOSA_I8) {
    return {split_nibbles(tiles.positions + step * kTile), _mm256_abs_epi8(raw), raw};
  }
  const __m256i level = _mm256_shuffle_epi8(levels, _mm256_and_si256(_mm256_srli_epi16(raw, 4), low));
  return {_mm256_and_si256(raw, low), Linear ? level : _mm256_abs_epi8(level), Linear ? raw : level};
}

// Sums of two neighbours are of rows 0, 8, 1, 9, ...: widened to 32 bits, rows 0-7 and rows 8-15.
inline LOSA_ALWAYS_INLINE void widen(__m256i pairs, __m256i sums[2]) {
  sums[0] = add_words(sums[0], pairs, _mm256_set1_epi32(1));
  sums[1] = add_words(sums[1], pairs, _mm256_set1_epi32(1 << 16));
}

// Sums of the slots of some groups of a tile. What adds to them is always inlined, because the compiler's own
// choice changes with whatever else is in the file, and then they leave the registers. Linear: `pairs` takes
// kFlush steps, then they are widened.
template <bool Linear, int Tokens>
struct Sums {
  explicit Sums(__m256i (*wide)[2]) : wide(wide) {
    for (auto &v : pairs) {
      v = _mm256_setzero_si256();
    }
  }

  // 16 activations of each token.
  inline LOSA_ALWAYS_INLINE void load(const int8_t *const *x, size_t first) {
    for (int k = 0; k < Tokens; ++k) {
      const auto *at = reinterpret_cast<const __m128i *>(x[k] + first);
      from[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128(at));
    }
  }

  // The positions that a step of a line begins at, 4 of 2:4 and 8 of others, as often as there is room, so
  // that only the lowest bits of the place of a slot matter.
  template <int Form>
  inline LOSA_ALWAYS_INLINE void load_step_of(const int8_t *const *x, size_t start) {
    for (int k = 0; k < Tokens; ++k) {
      if (Form == 2) {
        int32_t quad;
        std::memcpy(&quad, x[k] + start, sizeof quad);
        from[k] = _mm256_set1_epi32(quad);
      } else {
        int64_t two;
        std::memcpy(&two, x[k] + start, sizeof two);
        from[k] = _mm256_set1_epi64x(two);
      }
    }
  }

  inline LOSA_ALWAYS_INLINE void add(const Slots &w) {
    for (int k = 0; k < Tokens; ++k) {
      const __m256i q = _mm256_sign_epi8(_mm256_shuffle_epi8(from[k], w.at), w.sign);
      const __m256i products = _mm256_maddubs_epi16(w.magnitude, q);
      if (Linear) {
        pairs[k] = _mm256_add_epi16(pairs[k], products);
      } else {
        widen(products, wide[k]);
      }
    }
  }

  inline LOSA_ALWAYS_INLINE void flush() {
    for (int k = 0; Linear && k < Tokens; ++k) {
      widen(pairs[k], wide[k]);
    }
  }

  __m256i from[Tokens], pairs[Tokens];
  __m256i (*wide)[2];
};

// Where the values of a line of positions are, four steps.
template <losa_value_type T>
struct ValueLines {
  // The first line of a tile.
  ValueLines(const Tiles &tiles, size_t tile)
      : values(tiles.values + tile * tiles.value_lines() * Tiles::kStep),
        high(values + tiles.lines() * Tiles::kStep),
        line(0) {}

  // Line number `line` of a tile whose first one is `first`.
  inline LOSA_ALWAYS_INLINE ValueLines(const ValueLines &first, size_t line)
      : values(first.values + line * kLines * Tiles::kStep), high(first.high), line(line) {}

  inline LOSA_ALWAYS_INLINE void next() {
    values += kLines * Tiles::kStep;
    ++line;
  }

  // I3: the highest bits of the codes, that of step s in bit s.
  inline LOSA_ALWAYS_INLINE __m256i highest() const {
    const __m256i two = load_step(high + line / 2 * Tiles::kStep);
    return line % 2 ? _mm256_srli_epi16(two, 4) : two;
  }

  static constexpr size_t kLines = T == LOSA_I8 ? 4 : T == LOSA_I4 ? 2 : 1;
  const uint8_t *values, *high;
  size_t line;
};

// The lines of a tile, found once: their sizes take longer than a border of scales.
template <losa_value_type T>
struct TileLines {
  TileLines(const Tiles &tiles, size_t tile)
      : positions(tiles.positions + tile * tiles.lines() * Tiles::kStep), first(tiles, tile) {}

  inline LOSA_ALWAYS_INLINE const uint8_t *places(size_t line) const {
    return positions + line * Tiles::kStep;
  }
  inline LOSA_ALWAYS_INLINE ValueLines<T> values(size_t line) const { return {first, line}; }

  const uint8_t *positions;
  ValueLines<T> first;
};

// Codes of step S of a line; of i8 its levels. I3: `highest` are the highest bits of the line.
template <losa_value_type T, int S>
inline LOSA_ALWAYS_INLINE __m256i codes_of(const uint8_t *values, __m256i highest) {
  const __m256i raw = load_step(values + (T == LOSA_I8 ? S : T == LOSA_I4 ? S / 2 : 0) * Tiles::kStep);
  if (T == LOSA_I8) {
    return raw;
  }
  if (T == LOSA_I4) {
    return _mm256_and_si256(_mm256_srli_epi16(raw, S % 2 * 4), _mm256_set1_epi8(15));
  }
  const __m256i top = S < 2 ? _mm256_slli_epi16(highest, 2 - S) : _mm256_srli_epi16(highest, S - 2);
  const __m256i low = _mm256_and_si256(_mm256_srli_epi16(raw, 2 * S), _mm256_set1_epi8(3));
  return _mm256_or_si256(low, _mm256_and_si256(top, _mm256_set1_epi8(4)));
}

// Slots of codes below 8 bits at the positions `at`. Linear i4: the sign is that of the code.
template <losa_value_type T, bool Linear>
inline LOSA_ALWAYS_INLINE Slots slots_of(__m256i codes, __m256i at, __m256i levels) {
  const __m256i level = _mm256_shuffle_epi8(levels, codes);
  if (Linear && T == LOSA_I4) {
    return {at, level, _mm256_slli_epi16(codes, 4)};
  }
  return {at, _mm256_abs_epi8(level), level};
}

// Slots of step S of a line, at the positions `at`.
template <losa_value_type T, bool Linear, int S>
inline LOSA_ALWAYS_INLINE Slots load_short(const uint8_t *values, __m256i highest, __m256i at,
                                           __m256i levels) {
  const __m256i codes = codes_of<T, S>(values, highest);
  if (T == LOSA_I8) {
    return {at, _mm256_abs_epi8(codes), codes};
  }
  Slots found = slots_of<T, Linear>(codes, at, levels);
  if (Linear && T == LOSA_I4) {  // without waiting for the code
    const __m256i raw = load_step(values + S / 2 * Tiles::kStep);
    found.sign = S % 2 ? raw : _mm256_slli_epi16(raw, 4);
  }
  return found;
}

// Where the quads or windows of step S begin. Of N:4 that is within a group. Windows reach from the position
// before their group to the one behind it: those of steps 0 and 1 are found in the 16 activations that begin
// one before, those of steps 2 and 3 in the 16 that begin two later.
template <int Form, int S>
constexpr int first_place(int slot) {
  return Form == kWindows ? 4 * S + 2 * slot - (S < 2 ? 0 : 2) : Form == 2 ? 4 * S : 8 * (S % 2) + 4 * slot;
}
constexpr size_t kLaterWindows = 2;

// Where the slots of step S lie within 16 activations.
template <int Form, int S>
inline __m256i within_group(__m256i line) {
  constexpr int kPair = first_place<Form, S>(1) << 8 | first_place<Form, S>(0);
  const __m256i low = _mm256_and_si256(_mm256_srli_epi16(line, 2 * S), _mm256_set1_epi8(3));
  return _mm256_add_epi8(low, _mm256_set1_epi16(kPair));
}

// Of two steps the first slots of pairs of one, and the second ones of the other.
inline LOSA_ALWAYS_INLINE __m256i first_and_second(__m256i first, __m256i second) {
  return _mm256_blendv_epi8(first, second, _mm256_set1_epi16(static_cast<short>(0xff00)));
}

}  // namespace
}  // namespace losa

#endif
