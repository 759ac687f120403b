// Tiles of 16 rows as panels of factors, for prompts: with VNNI, multiplying what was pruned too is faster
// than fetching activations for what is kept.
#ifndef LOSA_AVX512_TILES_H
#define LOSA_AVX512_TILES_H

#include <type_traits>

#include "kernels/x86/avx2_tiles.h"
#include "kernels/x86/avx512_rows.h"

namespace losa {
namespace {

inline uint8_t *store_quad(__m512i levels, uint8_t *panel) {
  _mm512_storeu_si512(panel, as_factor(levels));
  return panel + sizeof levels;
}

constexpr int kColumns = int{kQuad};  // of a quad

// Levels of 16 columns of a tile: four quads of columns, in each of them 4 bytes for each of the 16 rows.
struct Quads {
  Quads() {
    for (auto &v : quad) {
      v = _mm512_setzero_si512();
    }
  }

  uint8_t *store(uint8_t *panel) const {
    for (const auto &v : quad) {
      panel = store_quad(v, panel);
    }
    return panel;
  }

  __m512i quad[4];
};

// The two bytes of every row of a step, of which neighbours belong to rows 0, 8, 1, 9, ...
inline __m512i by_row(__m256i step) {
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  return _mm512_permutexvar_epi32(order, _mm512_cvtepu16_epi32(step));
}

// Both slots of every row, alone in their dwords: levels, and bits to shift them by from where their places
// begin, the start of a group or of a window. What is shifted out of a dword, to either side, is gone: counts
// are unsigned. Slots are not Linear, so that their sign is the level itself.
struct Shifts {
  explicit Shifts(const Slots &w) {
    const __m512i at = by_row(w.at), level = by_row(w.sign), bits = _mm512_set1_epi32(15 << 3);
    first = _mm512_and_si512(_mm512_slli_epi32(at, 3), bits);
    second = _mm512_and_si512(_mm512_srli_epi32(at, 8 - 3), bits);
    low = _mm512_and_si512(level, _mm512_set1_epi32(255));
    high = _mm512_srli_epi32(level, 8);
  }

  // In the dword that begins `offset` positions after the places.
  static __m512i in_quad(__m512i level, __m512i shift, int offset) {
    return _mm512_sllv_epi32(level, _mm512_sub_epi32(shift, _mm512_set1_epi32(8 * offset)));
  }

  __m512i first, second, low, high;
};

inline void add_slots(const Slots &w, Quads *out) {
  const Shifts s(w);
  for (int q = 0; q < 4; ++q) {
    const __m512i first = s.in_quad(s.low, s.first, kColumns * q);
    const __m512i second = s.in_quad(s.high, s.second, kColumns * q);
    out->quad[q] = _mm512_ternarylogic_epi32(out->quad[q], first, second, 0xfe);
  }
}

// Slots whose quads are known.
template <int First, int Second>
inline void add_known(const Slots &w, Quads *out) {
  const Shifts s(w);
  out->quad[First] = _mm512_or_si512(out->quad[First], s.in_quad(s.low, s.first, kColumns * First));
  out->quad[Second] = _mm512_or_si512(out->quad[Second], s.in_quad(s.high, s.second, kColumns * Second));
}

template <losa_value_type T>
void panel_of_groups(const Tiles &tiles, size_t tile, __m256i levels, uint8_t *panel) {
  size_t step = tile * tiles.all_steps();
  for (size_t group = 0; group < tiles.groups; ++group) {
    Quads found;
    for (size_t s = 0; s < tiles.steps; ++s, ++step) {
      add_slots(load_slots<T, false>(tiles, step, levels), &found);
    }
    panel = found.store(panel);
  }
}

// N of N:4: a line has one group of 2:4, or two of 1:4, of which the last of a tile may miss the second.
template <losa_value_type T, int N>
void panel_of_quads(const Tiles &tiles, size_t tile, __m256i levels, uint8_t *panel) {
  const uint8_t *line = tiles.positions + tile * tiles.lines() * Tiles::kStep;
  ValueLines<T> at(tiles, tile);
  const auto slots = [&](auto step, __m256i four) {
    constexpr int kStep = decltype(step)::value;
    const __m256i top = T == LOSA_I3 ? at.highest() : four;
    return load_short<T, false, kStep>(at.values, top, within_group<N, kStep>(four), levels);
  };
  for (size_t group = 0; group < tiles.groups; group += 2 / N) {
    const __m256i four = load_step(line);
    Quads found;
    add_known<0, N == 2 ? 0 : 1>(slots(std::integral_constant<int, 0>(), four), &found);
    add_known<N == 2 ? 1 : 2, N == 2 ? 1 : 3>(slots(std::integral_constant<int, 1>(), four), &found);
    if (N == 1) {
      panel = found.store(panel);
      if (group + 1 == tiles.groups) {
        return;
      }
      found = Quads();
    }
    add_known<N == 2 ? 2 : 0, N == 2 ? 2 : 1>(slots(std::integral_constant<int, 2>(), four), &found);
    add_known<N == 2 ? 3 : 2, 3>(slots(std::integral_constant<int, 3>(), four), &found);
    panel = found.store(panel);
    line += Tiles::kStep;
    at.next();
  }
}

// Step i of windows: the one of its first slots begins a position before quad i, that of its second ones a
// position after the start of quad i, so that these may lie in the quad behind and those in the quad before.
template <losa_value_type T>
void panel_of_windows(const Tiles &tiles, size_t tile, __m256i levels, uint8_t *panel) {
  const uint8_t *line = tiles.positions + tile * tiles.lines() * Tiles::kStep;
  ValueLines<T> at(tiles, tile);
  __m512i before = _mm512_setzero_si512(), here = before;
  for (size_t group = 0; group < tiles.groups; ++group, line += Tiles::kStep, at.next()) {
    const __m256i four = load_step(line), top = T == LOSA_I3 ? at.highest() : four;
    const auto add = [&](auto step) {
      constexpr int kStep = decltype(step)::value;
      const __m256i places = _mm256_and_si256(_mm256_srli_epi16(four, 2 * kStep), _mm256_set1_epi8(3));
      const Shifts s(load_short<T, false, kStep>(at.values, top, places, levels));
      before = _mm512_or_si512(before, s.in_quad(s.low, s.first, 1 - kColumns));
      if (kStep > 0 || group > 0) {  // there is no quad before the first
        panel = store_quad(before, panel);
      }
      const __m512i first = s.in_quad(s.low, s.first, 1), second = s.in_quad(s.high, s.second, -1);
      before = _mm512_ternarylogic_epi32(here, first, second, 0xfe);
      here = s.in_quad(s.high, s.second, kColumns - 1);
    };
    add(std::integral_constant<int, 0>());
    add(std::integral_constant<int, 1>());
    add(std::integral_constant<int, 2>());
    add(std::integral_constant<int, 3>());
  }
  store_quad(before, panel);
}

template <losa_value_type T>
void panel_of_tile_as(const losa_parts &p, size_t tile, uint8_t *panel) {
  const Tiles tiles(p);
  __m256i levels = _mm256_setzero_si256();
  if (T != LOSA_I8) {
    levels = _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i *>(p.table.data)));
  }
  if (p.layout == LOSA_SLIDING) {
    panel_of_windows<T>(tiles, tile, levels, panel);
  } else if (p.m == kQuad) {
    (p.n == 1 ? panel_of_quads<T, 1> : panel_of_quads<T, 2>)(tiles, tile, levels, panel);
  } else if constexpr (T != LOSA_I3) {
    panel_of_groups<T>(tiles, tile, levels, panel);
  }
}

// The tile from row 16 * tile on, as factors of levels + 128: panel [padded / 4, 16, 4].
inline void panel_of_tile(const losa_parts &p, size_t tile, size_t padded, uint8_t *panel) {
  const auto panel_of = p.value_type == LOSA_I3   ? panel_of_tile_as<LOSA_I3>
                        : p.value_type == LOSA_I4 ? panel_of_tile_as<LOSA_I4>
                                                  : panel_of_tile_as<LOSA_I8>;
  panel_of(p, tile, panel);
  std::memset(panel + p.columns * kTile, 128, (padded - p.columns) * kTile);  // level 0
}

}  // namespace
}  // namespace losa

#endif
