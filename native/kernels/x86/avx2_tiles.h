// Tiles of 16 rows in AVX2: a byte shuffle fetches the activations of 32 slots, one or several tokens alike.
// Included by the AVX2 file and by the AVX-512 one: memory, not the width of registers, is what limits it.
#ifndef LOSA_AVX2_TILES_H
#define LOSA_AVX2_TILES_H

#include <immintrin.h>

#include <type_traits>

#include "kernels/x86/avx2_quads.h"
#include "kernels/x86/prefetch.h"

namespace losa {
namespace {

// Groups [group, end) of a tile of N:16 times `Tokens` tokens, added to sums.
template <losa_value_type T, bool Linear, int Tokens>
inline LOSA_ALWAYS_INLINE void sum_groups(const Tiles &tiles, size_t tile, size_t group, size_t end,
                                          const int8_t *const *x, __m256i levels, __m256i wide[Tokens][2]) {
  Sums<Linear, Tokens> sums(wide);
  size_t step = (tile * tiles.groups + group) * tiles.steps;
  for (; group < end; ++group) {
    sums.load(x, group * kTile);
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

// A line; false if its second half is not there.
template <losa_value_type T, bool Linear, int Form, int Tokens>
inline LOSA_ALWAYS_INLINE bool add_line(const uint8_t *line, const ValueLines<T> &at, size_t group,
                                        size_t end, __m256i levels, const int8_t *const *x,
                                        Sums<Linear, Tokens> *sums) {
  const LinePlaces<Form> places(load_step(line));
  const LineSlots<T, Linear> slots(at, levels);
  constexpr size_t kStep = two_groups(Form) ? 2 * kQuad : kQuad;  // positions from step to step
  const size_t start = group * kTile;
  sums->template load_step_of<Form>(x, start);
  sums->add(slots.template of<0>(places.template of<0>()));
  sums->template load_step_of<Form>(x, start + kStep);
  sums->add(slots.template of<1>(places.template of<1>()));
  if (two_groups(Form) && group + 1 == end) {
    return false;
  }
  sums->template load_step_of<Form>(x, start + 2 * kStep);
  sums->add(slots.template of<2>(places.template of<2>()));
  sums->template load_step_of<Form>(x, start + 3 * kStep);
  sums->add(slots.template of<3>(places.template of<3>()));
  return true;
}

// Groups [group, end) of a tile of N:4 or of windows. A line has one group of 2:4 or of windows, or two of
// 1:4, of which the last of a tile may miss the second. Of windows x begins one position before the row.
template <losa_value_type T, bool Linear, int Form, int Tokens>
inline LOSA_ALWAYS_INLINE void sum_lines(const TileLines<T> &lines, size_t group, size_t end,
                                         const int8_t *const *x, __m256i levels, __m256i wide[Tokens][2]) {
  constexpr size_t kGroups = two_groups(Form) ? 2 : 1;
  Sums<Linear, Tokens> sums(wide);
  const size_t first = two_groups(Form) ? group / 2 : group;
  const uint8_t *line = lines.places(first);
  for (ValueLines<T> at = lines.values(first); group < end;
       group += kGroups, line += Tiles::kStep, at.next()) {
    fetch_ahead(line);
    fetch_ahead(at.values);
    if (T == LOSA_I8) {
      fetch_ahead(at.values + kCacheLine);
    }
    if (T == LOSA_I3) {
      fetch_ahead(at.high + at.line / 2 * Tiles::kStep);
    }
    if (!add_line<T, Linear, Form>(line, at, group, end, levels, x, &sums)) {
      break;
    }
  }
  sums.flush();
}

// Slots of windows at the border before group `behind` of a tile, where scales change: the first ones of the
// step behind it, of which some hold the position before it, and the second ones of the step before, of which
// some hold the position behind. The levels of all others are zero.
template <losa_value_type T, bool Linear>
inline LOSA_ALWAYS_INLINE Slots load_border(const TileLines<T> &lines, size_t behind, __m256i levels) {
  const uint8_t *line = lines.places(behind);
  const __m256i three = _mm256_set1_epi8(3);
  const __m256i both =
      first_and_second(load_step(line), _mm256_srli_epi16(load_step(line - Tiles::kStep), 6));
  const __m256i places = _mm256_and_si256(both, three);
  const __m256i across = _mm256_cmpeq_epi8(places, _mm256_set1_epi16(3 << 8));
  // The codes of step 3 of the line before and of step 0 of the one behind, still with other bits.
  const ValueLines<T> last = lines.values(behind - 1), first = lines.values(behind);
  const __m256i before = load_step(first.values - Tiles::kStep), low = load_step(first.values);
  if (T == LOSA_I8) {  // code 0 is level 0
    const __m256i kept = _mm256_and_si256(first_and_second(low, before), across);
    return {places, _mm256_abs_epi8(kept), kept};
  }
  if (T == LOSA_I4) {
    const __m256i codes = first_and_second(low, _mm256_srli_epi16(before, 4));
    const __m256i own = _mm256_and_si256(across, _mm256_set1_epi8(15));
    return slots_of<T, Linear>(_mm256_and_si256(codes, own), places, levels);
  }
  const __m256i codes = first_and_second(low, _mm256_srli_epi16(before, 6));
  const __m256i tops =
      first_and_second(_mm256_slli_epi16(first.highest(), 2), _mm256_srli_epi16(last.highest(), 1));
  const __m256i code =
      _mm256_or_si256(_mm256_and_si256(codes, three), _mm256_and_si256(tops, _mm256_set1_epi8(4)));
  return slots_of<T, Linear>(_mm256_and_si256(code, across), places, levels);
}

inline Slots load_expanded(const uint8_t *at) {
  return {load_step(at), load_step(at + 32), load_step(at + 64)};
}

// ... from scratch memory, where the first place of step 0 is 0, and the last of step 3 is 15.
inline LOSA_ALWAYS_INLINE Slots load_border(const uint8_t *slots, size_t steps, size_t behind) {
  const uint8_t *at = slots + behind * steps * Tiles::kExpanded;
  const Slots last = load_expanded(at - Tiles::kExpanded), first = load_expanded(at);
  const __m256i places = first_and_second(first.at, last.at);
  const __m256i across = _mm256_cmpeq_epi8(places, _mm256_set1_epi16(15 << 8));
  return {places, _mm256_and_si256(first_and_second(first.magnitude, last.magnitude), across),
          first_and_second(first.sign, last.sign)};
}

// Adds to the sums of a group of scales what the slots at its end hold beyond their side of the border, and
// begins those of the next group with what they have too much. `first` is the position before the border in
// x.
template <int Tokens>
inline LOSA_ALWAYS_INLINE void move_border(const Slots &w, const int8_t *const *x, size_t first,
                                           __m256i sums[Tokens][2], __m256i next[Tokens][2]) {
  for (int k = 0; k < Tokens; ++k) {
    int16_t pair;
    std::memcpy(&pair, x[k] + first, sizeof pair);
    // What second slots hold counts for the group behind.
    const __m256i q =
        _mm256_sign_epi8(_mm256_set1_epi16(pair), _mm256_set1_epi16(static_cast<short>(0xff01)));
    __m256i moved[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    widen(_mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(q, w.sign)), moved);
    for (int half = 0; half < 2; ++half) {
      sums[k][half] = _mm256_add_epi32(sums[k][half], moved[half]);
      next[k][half] = _mm256_sub_epi32(_mm256_setzero_si256(), moved[half]);
    }
  }
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

// It walks a tile as sum_groups and sum_lines do, but on its own: with one walk for both, compilers give
// decoding fewer registers.
template <losa_value_type T, bool Linear, int Form>
void expand_tile(const Tiles &tiles, size_t tile, __m256i levels, uint8_t *out) {
  if constexpr (Form == kWide) {
    const size_t first = tile * tiles.all_steps();
    for (size_t step = first; step < first + tiles.all_steps(); ++step) {
      out = store_slots(load_slots<T, Linear>(tiles, step, levels), out);
    }
    return;
  }
  const uint8_t *line = tiles.positions + tile * tiles.lines() * Tiles::kStep;
  ValueLines<T> at(tiles, tile);
  for (size_t left = tiles.all_steps(); left > 0; left -= left < 4 ? left : 4) {
    const __m256i four = load_step(line), top = T == LOSA_I3 ? at.highest() : four;
    out = store_slots(load_short<T, Linear, 0>(at.values, top, within_group<Form, 0>(four), levels), out);
    out = store_slots(load_short<T, Linear, 1>(at.values, top, within_group<Form, 1>(four), levels), out);
    if (left > 2) {
      out = store_slots(load_short<T, Linear, 2>(at.values, top, within_group<Form, 2>(four), levels), out);
      out = store_slots(load_short<T, Linear, 3>(at.values, top, within_group<Form, 3>(four), levels), out);
    }
    line += Tiles::kStep;
    at.next();
  }
}

template <bool Linear, int Form, int Tokens>
inline LOSA_ALWAYS_INLINE void sum_expanded(const uint8_t *slots, size_t steps, size_t group, size_t end,
                                            const int8_t *const *x, __m256i wide[Tokens][2]) {
  Sums<Linear, Tokens> sums(wide);
  const uint8_t *at = slots + group * steps * Tiles::kExpanded;
  for (; group < end; ++group) {
    sums.load(x, group * kTile);
    for (size_t s = 0; s < steps; ++s, at += Tiles::kExpanded) {
      if (Form == kWindows && s == steps / 2) {
        sums.load(x, group * kTile + kLaterWindows);
      }
      sums.add(load_expanded(at));
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

// One tile times `Tokens` tokens: y [tokens, rows]. FromScratch: of expanded `slots`. By itself, because
// inlined the loop over slots gets too few registers.
template <losa_value_type T, bool Linear, int Form, int Tokens, bool FromScratch>
__attribute__((noinline)) void multiply_tile(const losa_parts &p, const Tiles &tiles, size_t tile,
                                             const Activations &a, size_t token, __m256i levels, float *y,
                                             size_t ldy, const uint8_t *slots) {
  const int8_t *x[Tokens];
  __m256 total[Tokens][2];
  for (int k = 0; k < Tokens; ++k) {
    x[k] = a.q + (token + static_cast<size_t>(k)) * a.padded - (Form == kWindows ? 1 : 0);
    total[k][0] = total[k][1] = _mm256_setzero_ps();
  }
  const TileLines<T> lines(tiles, tile);
  const size_t first_scale = T != LOSA_I8 ? scale_index(p, tile * kTile, 0) : 0;
  const size_t chunk = Linear ? kFlush / tiles.steps : tiles.per_scale;
  __m256 scales[2] = {_mm256_set1_ps(1.0f), _mm256_set1_ps(1.0f)};
  __m256i sums[Tokens][2], next[Tokens][2];
  for (int k = 0; k < Tokens; ++k) {
    next[k][0] = next[k][1] = _mm256_setzero_si256();
  }
  for (size_t group = 0, g = 0; group < tiles.groups; ++g) {
    const size_t end = group + tiles.per_scale < tiles.groups ? group + tiles.per_scale : tiles.groups;
    for (int k = 0; k < Tokens; ++k) {
      sums[k][0] = next[k][0];
      sums[k][1] = next[k][1];
    }
    while (group < end) {
      const size_t stop = group + chunk < end ? group + chunk : end;
      if (FromScratch) {
        sum_expanded<Linear, Form, Tokens>(slots, tiles.steps, group, stop, x, sums);
      } else if (Form != kWide) {
        sum_lines<T, Linear, Form == kWide ? 1 : Form, Tokens>(lines, group, stop, x, levels, sums);
      } else if constexpr (T != LOSA_I3) {
        sum_groups<T, Linear, Tokens>(tiles, tile, group, stop, x, levels, sums);
      }
      group = stop;
    }
    if (Form == kWindows && end < tiles.groups) {
      const Slots border =
          FromScratch ? load_border(slots, tiles.steps, end) : load_border<T, Linear>(lines, end, levels);
      move_border<Tokens>(border, x, end * kTile, sums, next);
    }
    if (T != LOSA_I8) {
      load_scales(p, first_scale + g * kTile, scales);
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

template <losa_value_type T, bool Linear, int Form>
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
      expand_tile<T, Linear, Form>(tiles, tile, levels, scratch);
      for (; token + kTokens <= a.tokens; token += kTokens) {
        multiply_tile<T, Linear, Form, kTokens, true>(p, tiles, tile, a, token, levels, y, ldy, scratch);
      }
    }
    for (; token + kTokens <= a.tokens; token += kTokens) {
      multiply_tile<T, Linear, Form, kTokens, false>(p, tiles, tile, a, token, levels, y, ldy, nullptr);
    }
    for (; token + 2 <= a.tokens; token += 2) {
      multiply_tile<T, Linear, Form, 2, false>(p, tiles, tile, a, token, levels, y, ldy, nullptr);
    }
    for (; token < a.tokens; ++token) {
      multiply_tile<T, Linear, Form, 1, false>(p, tiles, tile, a, token, levels, y, ldy, nullptr);
    }
  }
}

template <int Form>
void multiply_tiles_of(const losa_parts &p, const Activations &a, size_t begin, size_t end, float *y,
                       size_t ldy, uint8_t *scratch) {
  const auto as = [&](auto type) {
    constexpr losa_value_type T = decltype(type)::value;
    (is_linear(p) ? multiply_tiles_as<T, true, Form> : multiply_tiles_as<T, false, Form>)(p, a, begin, end, y,
                                                                                          ldy, scratch);
  };
  if (p.value_type == LOSA_I8) {
    multiply_tiles_as<LOSA_I8, false, Form>(p, a, begin, end, y, ldy, scratch);
  } else if (p.value_type == LOSA_I4) {
    as(std::integral_constant<losa_value_type, LOSA_I4>());
  } else if constexpr (Form != kWide) {
    as(std::integral_constant<losa_value_type, LOSA_I3>());
  }
}

// Rows [begin, end) times all tokens.
inline void multiply_tiles(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                           size_t ldy, void *scratch) {
  const losa_parts &p = t.parts;
  auto *room = static_cast<uint8_t *>(scratch);
  if (p.m != kQuad) {
    multiply_tiles_of<kWide>(p, a, begin, end, y, ldy, room);
  } else if (p.n == 1) {
    multiply_tiles_of<1>(p, a, begin, end, y, ldy, room);
  } else {
    multiply_tiles_of<2>(p, a, begin, end, y, ldy, room);
  }
}

inline void multiply_windows(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                             size_t ldy, void *scratch) {
  multiply_tiles_of<kWindows>(t.parts, a, begin, end, y, ldy, static_cast<uint8_t *>(scratch));
}

}  // namespace
}  // namespace losa

#endif
