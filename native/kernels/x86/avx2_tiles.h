// Tiles of 16 rows in AVX2: a byte shuffle fetches the activations of 32 slots, one or several tokens alike.
// Included by the AVX2 file and by the AVX-512 one: memory, not the width of registers, is what limits it.
#ifndef LOSA_AVX2_TILES_H
#define LOSA_AVX2_TILES_H

#include <immintrin.h>

#include <type_traits>

#include "kernels/target.h"
#include "kernels/x86/prefetch.h"

namespace losa {
namespace {

// 32 slots: where in their group, and their levels as magnitude and as anything of the same sign.
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

inline __attribute__((always_inline)) __m256i load_step(const uint8_t *p) {
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
inline __attribute__((always_inline)) void widen(__m256i pairs, __m256i sums[2]) {
  sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(pairs, _mm256_set1_epi32(1)));
  sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(pairs, _mm256_set1_epi32(1 << 16)));
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

  inline __attribute__((always_inline)) void load(const int8_t *const *x, size_t group) {
    for (int k = 0; k < Tokens; ++k) {
      const auto *at = reinterpret_cast<const __m128i *>(x[k] + group * kTile);
      from[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128(at));
    }
  }

  // The 8 / N positions that a step of N:4 begins at, as often as there is room, so that only the lowest
  // bits of the place of a slot matter.
  template <int N>
  inline __attribute__((always_inline)) void load_quads(const int8_t *const *x, size_t start) {
    for (int k = 0; k < Tokens; ++k) {
      if (N == 2) {
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

  inline __attribute__((always_inline)) void add(const Slots &w) {
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

  inline __attribute__((always_inline)) void flush() {
    for (int k = 0; Linear && k < Tokens; ++k) {
      widen(pairs[k], wide[k]);
    }
  }

  __m256i from[Tokens], pairs[Tokens];
  __m256i (*wide)[2];
};

// Groups [group, end) of a tile of N:16 times `Tokens` tokens, added to sums.
template <losa_value_type T, bool Linear, int Tokens>
inline __attribute__((always_inline)) void sum_groups(const Tiles &tiles, size_t tile, size_t group,
                                                      size_t end, const int8_t *const *x, __m256i levels,
                                                      __m256i wide[Tokens][2]) {
  Sums<Linear, Tokens> sums(wide);
  size_t step = (tile * tiles.groups + group) * tiles.steps;
  for (; group < end; ++group) {
    sums.load(x, group);
    for (size_t s = 0; s < tiles.steps; ++s, ++step) {
      fetch_ahead(tiles.values + step * Tiles::kStep);
      if (T == LOSA_I8) {
        fetch_ahead(tiles.positions + step * kTile);
      }
      sums.add(load_slots<T, Linear>(tiles, step, levels));
    }
  }
  sums.flush();
}

// Where the values of a line of N:4 are, four steps.
template <losa_value_type T>
struct ValueLines {
  // The line number `first` of a tile.
  ValueLines(const Tiles &tiles, size_t tile, size_t first)
      : values(tiles.values + (tile * tiles.value_lines() + first * kLines) * Tiles::kStep),
        high(values + (tiles.lines() - first) * Tiles::kStep),
        line(first) {}

  inline __attribute__((always_inline)) void next() {
    values += kLines * Tiles::kStep;
    ++line;
  }

  // I3: the highest bits of the codes, that of step s in bit s.
  inline __attribute__((always_inline)) __m256i highest() const {
    const __m256i two = load_step(high + line / 2 * Tiles::kStep);
    return line % 2 ? _mm256_srli_epi16(two, 4) : two;
  }

  static constexpr size_t kLines = T == LOSA_I8 ? 4 : T == LOSA_I4 ? 2 : 1;
  const uint8_t *values, *high;
  size_t line;
};

// Values of step S of a line of N:4, at the positions `at`. I3: `highest` are its highest bits.
template <losa_value_type T, bool Linear, int S>
inline __attribute__((always_inline)) Slots load_short(const uint8_t *values, __m256i highest, __m256i at,
                                                       __m256i levels) {
  const __m256i raw = load_step(values + (T == LOSA_I8 ? S : T == LOSA_I4 ? S / 2 : 0) * Tiles::kStep);
  if (T == LOSA_I8) {
    return {at, _mm256_abs_epi8(raw), raw};
  }
  if (T == LOSA_I3) {
    const __m256i top = S < 2 ? _mm256_slli_epi16(highest, 2 - S) : _mm256_srli_epi16(highest, S - 2);
    const __m256i low = _mm256_and_si256(_mm256_srli_epi16(raw, 2 * S), _mm256_set1_epi8(3));
    const __m256i code = _mm256_or_si256(low, _mm256_and_si256(top, _mm256_set1_epi8(4)));
    const __m256i level = _mm256_shuffle_epi8(levels, code);
    return {at, _mm256_abs_epi8(level), level};
  }
  const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(raw, S % 2 * 4), _mm256_set1_epi8(15));
  const __m256i level = _mm256_shuffle_epi8(levels, codes);
  if (Linear) {
    return {at, level, S % 2 ? raw : _mm256_slli_epi16(raw, 4)};
  }
  return {at, _mm256_abs_epi8(level), level};
}

// Where the slots of step S lie within 16 positions: its quads start at fixed places.
template <int N, int S>
inline __m256i within_group(__m256i line) {
  constexpr int kFirst = N == 2 ? 4 * S : 8 * (S % 2), kSecond = N == 2 ? kFirst : kFirst + 4;
  const __m256i low = _mm256_and_si256(_mm256_srli_epi16(line, 2 * S), _mm256_set1_epi8(3));
  return _mm256_or_si256(low, _mm256_set1_epi16(kSecond << 8 | kFirst));
}

// Places of the slots of step S of a line of N:4 among the positions of load_quads: byte shuffles look at the
// low nibble of an index and at bit 7, and the other bits may hold anything. `even` are the places of the
// steps 0 and 2 in the nibbles of a byte, `odd` those of 1 and 3.
template <int N>
struct QuadPlaces {
  explicit QuadPlaces(__m256i line) {
    const __m256i two = _mm256_set1_epi8(0x33);
    even = _mm256_and_si256(line, two);
    odd = _mm256_and_si256(_mm256_srli_epi16(line, 2), two);
    if (N == 1) {  // the second slot of a row is in the second of two quads
      const __m256i second = _mm256_set1_epi16(0x4400);
      even = _mm256_or_si256(even, second);
      odd = _mm256_or_si256(odd, second);
    }
  }

  template <int S>
  inline __attribute__((always_inline)) __m256i of() const {
    return S < 2 ? (S == 0 ? even : odd) : _mm256_srli_epi16(S == 2 ? even : odd, 4);
  }

  __m256i even, odd;
};

// The slots of a line of N:4.
template <losa_value_type T, bool Linear>
struct LineSlots {
  LineSlots(const ValueLines<T> &at, __m256i levels) : values(at.values), levels(levels) {
    if (T == LOSA_I3) {
      // Codes in the nibbles of a byte, as `even` and `odd` of QuadPlaces; the highest bits by table.
      const __m256i low = load_step(at.values), two = _mm256_set1_epi8(0x33);
      const __m256i top = _mm256_and_si256(at.highest(), _mm256_set1_epi8(15));
      constexpr long long kFirst = 0x0404000004040000, kSecond = 0x4444404044444040;
      const __m256i of_even = _mm256_set1_epi64x(0x4440444004000400);
      const __m256i of_odd = _mm256_set_epi64x(kSecond, kFirst, kSecond, kFirst);
      even = _mm256_or_si256(_mm256_and_si256(low, two), _mm256_shuffle_epi8(of_even, top));
      odd =
          _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 2), two), _mm256_shuffle_epi8(of_odd, top));
    }
  }

  template <int S>
  inline __attribute__((always_inline)) Slots of(__m256i at) const {
    if (T != LOSA_I3) {
      return load_short<T, Linear, S>(values, levels, at, levels);
    }
    const __m256i two = S % 2 ? odd : even;
    const __m256i level = _mm256_shuffle_epi8(levels, S < 2 ? two : _mm256_srli_epi16(two, 4));
    return {at, _mm256_abs_epi8(level), level};
  }

  const uint8_t *values;
  __m256i levels, even, odd;
};

// Groups [group, end) of a tile of N:4. A line has one group of 2:4, or two of 1:4, of which the last of a
// tile may miss the second.
template <losa_value_type T, bool Linear, int N, int Tokens>
inline __attribute__((always_inline)) void sum_quads(const Tiles &tiles, size_t tile, size_t group,
                                                     size_t end, const int8_t *const *x, __m256i levels,
                                                     __m256i wide[Tokens][2]) {
  Sums<Linear, Tokens> sums(wide);
  const size_t first = group * N / 2;
  const uint8_t *line = tiles.positions + (tile * tiles.lines() + first) * Tiles::kStep;
  for (ValueLines<T> at(tiles, tile, first); group < end; group += 2 / N, line += Tiles::kStep, at.next()) {
    fetch_ahead(line);
    fetch_ahead(at.values);
    if (T == LOSA_I8) {
      fetch_ahead(at.values + kCacheLine);
    }
    if (T == LOSA_I3) {
      fetch_ahead(at.high + at.line / 2 * Tiles::kStep);
    }
    const QuadPlaces<N> places(load_step(line));
    const LineSlots<T, Linear> slots(at, levels);
    constexpr size_t kStep = 2 / N * kQuad;  // positions of a step
    const size_t start = group * kTile;
    sums.template load_quads<N>(x, start);
    sums.add(slots.template of<0>(places.template of<0>()));
    sums.template load_quads<N>(x, start + kStep);
    sums.add(slots.template of<1>(places.template of<1>()));
    if (N == 1 && group + 1 == end) {
      break;
    }
    sums.template load_quads<N>(x, start + 2 * kStep);
    sums.add(slots.template of<2>(places.template of<2>()));
    sums.template load_quads<N>(x, start + 3 * kStep);
    sums.add(slots.template of<3>(places.template of<3>()));
  }
  sums.flush();
}

// For many tokens the slots of a tile are written to scratch memory once, step by step, whatever their
// pattern.
constexpr size_t kWorthExpanding = 16;  // tokens

inline uint8_t *store_slots(const Slots &w, uint8_t *out) {
  auto *at = reinterpret_cast<__m256i *>(out);
  _mm256_storeu_si256(at, w.at);
  _mm256_storeu_si256(at + 1, w.magnitude);
  _mm256_storeu_si256(at + 2, w.sign);
  return out + Tiles::kExpanded;
}

// Quads: N of N:4, else 0. It walks a tile as sum_groups and sum_quads do, but on its own: with one walk for
// both, compilers give decoding fewer registers.
template <losa_value_type T, bool Linear, int Quads>
void expand_tile(const Tiles &tiles, size_t tile, __m256i levels, uint8_t *out) {
  if constexpr (Quads == 0) {
    const size_t first = tile * tiles.all_steps();
    for (size_t step = first; step < first + tiles.all_steps(); ++step) {
      out = store_slots(load_slots<T, Linear>(tiles, step, levels), out);
    }
    return;
  }
  constexpr int N = Quads == 0 ? 1 : Quads;
  const uint8_t *line = tiles.positions + tile * tiles.lines() * Tiles::kStep;
  ValueLines<T> at(tiles, tile, 0);
  for (size_t left = tiles.all_steps(); left > 0; left -= left < 4 ? left : 4) {
    const __m256i four = load_step(line), top = T == LOSA_I3 ? at.highest() : four;
    out = store_slots(load_short<T, Linear, 0>(at.values, top, within_group<N, 0>(four), levels), out);
    out = store_slots(load_short<T, Linear, 1>(at.values, top, within_group<N, 1>(four), levels), out);
    if (left > 2) {
      out = store_slots(load_short<T, Linear, 2>(at.values, top, within_group<N, 2>(four), levels), out);
      out = store_slots(load_short<T, Linear, 3>(at.values, top, within_group<N, 3>(four), levels), out);
    }
    line += Tiles::kStep;
    at.next();
  }
}

template <bool Linear, int Tokens>
inline __attribute__((always_inline)) void sum_expanded(const uint8_t *slots, size_t steps, size_t group,
                                                        size_t end, const int8_t *const *x,
                                                        __m256i wide[Tokens][2]) {
  Sums<Linear, Tokens> sums(wide);
  const uint8_t *at = slots + group * steps * Tiles::kExpanded;
  for (; group < end; ++group) {
    sums.load(x, group);
    for (size_t s = 0; s < steps; ++s, at += Tiles::kExpanded) {
      sums.add({load_step(at), load_step(at + 32), load_step(at + 64)});
    }
  }
  sums.flush();
}

// Scales of the 16 rows of a tile: `at` is the first of them.
inline void load_scales(const losa_parts &p, size_t at, __m256 scales[2]) {
  const auto *data = static_cast<const uint8_t *>(p.scale.data);
  for (size_t half = 0; half < 2; ++half) {
    const size_t first = at + 8 * half;
    if (p.scale_type == LOSA_SCALE_F32) {
      scales[half] = _mm256_loadu_ps(reinterpret_cast<const float *>(data + 4 * first));
    } else {
      scales[half] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(data + 2 * first)));
    }
  }
}

constexpr int kFromScratch = -1;

// One tile times `Tokens` tokens: y [tokens, rows]. Form: N of N:4, 0 for N:16, or kFromScratch for expanded
// `slots`.
template <losa_value_type T, bool Linear, int Form, int Tokens>
void multiply_tile(const losa_parts &p, const Tiles &tiles, size_t tile, const Activations &a, size_t token,
                   __m256i levels, float *y, size_t ldy, const uint8_t *slots = nullptr) {
  const int8_t *x[Tokens];
  __m256 total[Tokens][2];
  for (int k = 0; k < Tokens; ++k) {
    x[k] = a.q + (token + static_cast<size_t>(k)) * a.padded;
    total[k][0] = total[k][1] = _mm256_setzero_ps();
  }
  const size_t chunk = Linear ? kFlush / tiles.steps : tiles.per_scale;
  __m256 scales[2] = {_mm256_set1_ps(1.0f), _mm256_set1_ps(1.0f)};
  for (size_t group = 0, g = 0; group < tiles.groups; ++g) {
    const size_t end = group + tiles.per_scale < tiles.groups ? group + tiles.per_scale : tiles.groups;
    __m256i sums[Tokens][2];
    for (auto &v : sums) {
      v[0] = v[1] = _mm256_setzero_si256();
    }
    while (group < end) {
      const size_t stop = group + chunk < end ? group + chunk : end;
      if (Form == kFromScratch) {
        sum_expanded<Linear, Tokens>(slots, tiles.steps, group, stop, x, sums);
      } else if (Form != 0) {
        sum_quads<T, Linear, Form == 1 ? 1 : 2, Tokens>(tiles, tile, group, stop, x, levels, sums);
      } else if constexpr (T != LOSA_I3) {
        sum_groups<T, Linear, Tokens>(tiles, tile, group, stop, x, levels, sums);
      }
      group = stop;
    }
    if (T != LOSA_I8) {
      load_scales(p, scale_index(p, tile * kTile, g), scales);
    }
    for (int k = 0; k < Tokens; ++k) {
      const __m256 scale = _mm256_set1_ps(a.scale[(token + static_cast<size_t>(k)) * a.groups + g]);
      for (int half = 0; half < 2; ++half) {
        const __m256 factor = T != LOSA_I8 ? _mm256_mul_ps(scales[half], scale) : scale;
        total[k][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[k][half]), factor, total[k][half]);
      }
    }
  }
  if (T == LOSA_I8) {
    load_scales(p, tile * kTile, scales);
  }
  for (int k = 0; k < Tokens; ++k) {
    float *out = y + (token + static_cast<size_t>(k)) * ldy + tile * kTile;
    for (int half = 0; half < 2; ++half) {
      const __m256 sum = total[k][half];
      _mm256_storeu_ps(out + 8 * half, T == LOSA_I8 ? _mm256_mul_ps(sum, scales[half]) : sum);
    }
  }
}

template <losa_value_type T, bool Linear, int Quads>
void multiply_tiles_as(const losa_parts &p, const Activations &a, size_t begin, size_t end, float *y,
                       size_t ldy, uint8_t *scratch) {
  const Tiles tiles(p);
  __m256i levels = _mm256_setzero_si256();
  if (T != LOSA_I8) {
    levels = _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i *>(p.table.data)));
    levels = Linear && T == LOSA_I4 ? _mm256_abs_epi8(levels) : levels;
  }
  // Tokens at once: sums of i8, widened in every step, take two registers for each.
  constexpr int kTokens = Linear ? 4 : 3;
  for (size_t tile = begin / kTile; tile < end / kTile; ++tile) {
    size_t token = 0;
    if (a.tokens >= kWorthExpanding) {
      expand_tile<T, Linear, Quads>(tiles, tile, levels, scratch);
      for (; token + kTokens <= a.tokens; token += kTokens) {
        multiply_tile<T, Linear, kFromScratch, kTokens>(p, tiles, tile, a, token, levels, y, ldy, scratch);
      }
    }
    for (; token + kTokens <= a.tokens; token += kTokens) {
      multiply_tile<T, Linear, Quads, kTokens>(p, tiles, tile, a, token, levels, y, ldy);
    }
    for (; token + 2 <= a.tokens; token += 2) {
      multiply_tile<T, Linear, Quads, 2>(p, tiles, tile, a, token, levels, y, ldy);
    }
    for (; token < a.tokens; ++token) {
      multiply_tile<T, Linear, Quads, 1>(p, tiles, tile, a, token, levels, y, ldy);
    }
  }
}

template <int Quads>
void multiply_tiles_of(const losa_parts &p, const Activations &a, size_t begin, size_t end, float *y,
                       size_t ldy, uint8_t *scratch) {
  const auto as = [&](auto type) {
    constexpr losa_value_type T = decltype(type)::value;
    (is_linear(p) ? multiply_tiles_as<T, true, Quads> : multiply_tiles_as<T, false, Quads>)(p, a, begin, end,
                                                                                            y, ldy, scratch);
  };
  if (p.value_type == LOSA_I8) {
    multiply_tiles_as<LOSA_I8, false, Quads>(p, a, begin, end, y, ldy, scratch);
  } else if (p.value_type == LOSA_I4) {
    as(std::integral_constant<losa_value_type, LOSA_I4>());
  } else if constexpr (Quads != 0) {
    as(std::integral_constant<losa_value_type, LOSA_I3>());
  }
}

// Rows [begin, end) times all tokens.
inline void multiply_tiles(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                           size_t ldy, void *scratch) {
  const losa_parts &p = t.parts;
  auto *room = static_cast<uint8_t *>(scratch);
  if (p.m != kQuad) {
    multiply_tiles_of<0>(p, a, begin, end, y, ldy, room);
  } else if (p.n == 1) {
    multiply_tiles_of<1>(p, a, begin, end, y, ldy, room);
  } else {
    multiply_tiles_of<2>(p, a, begin, end, y, ldy, room);
  }
}

}  // namespace
}  // namespace losa

#endif
