// Tiles of 16 rows in NEON: a byte shuffle fetches the activations of 16 slots, half a step.
#ifndef LOSA_NEON_TILES_H
#define LOSA_NEON_TILES_H

#include <arm_neon.h>

#include "kernels/target.h"

namespace losa {
namespace {

struct HalfStep {
  uint8x16_t at;
  int8x16_t levels;
};

// How the slots of a tile are stored: N:16, N:4, or windows.
enum class Form { kWide, kQuads, kWindows };

// Windows reach from the position before their 16 columns to the one behind: those of steps 0 and 1 are found
// in the 16 activations that begin one before, those of steps 2 and 3 in the 16 that begin two later.
constexpr size_t kLaterSteps = 2, kLaterWindows = 2;

// Where the quads or windows of the two slots of a row start within 16 positions, in step `s` of them.
template <Form F>
inline uint8x16_t starts_of(size_t s, size_t steps) {
  const size_t n = steps / 2, window = kQuad * s - (s < kLaterSteps ? 0 : kLaterWindows);
  const size_t first = F == Form::kWindows ? window : 2 * s / n * kQuad;
  const size_t second = F == Form::kWindows ? window + 2 : (2 * s + 1) / n * kQuad;
  return vreinterpretq_u8_u16(vdupq_n_u16(static_cast<uint16_t>(second << 8 | first)));
}

// Codes of i3: their lower bits are pair `pair` of every byte of `low`, their highest is bit `bit` of `high`.
inline uint8x16_t join_planes(uint8x16_t low, size_t pair, uint8x16_t high, size_t bit) {
  const uint8x16_t lower = vshlq_u8(low, vdupq_n_s8(static_cast<int8_t>(-2 * static_cast<int>(pair))));
  const uint8x16_t highest = vshlq_u8(high, vdupq_n_s8(static_cast<int8_t>(2 - static_cast<int>(bit))));
  return vorrq_u8(vandq_u8(lower, vdupq_n_u8(3)), vandq_u8(highest, vdupq_n_u8(4)));
}

// Of half of step i of a tile with lines: codes, levels, and places within quads or windows.
inline uint8x16_t codes_of_step(const Tiles &tiles, size_t tile, size_t i, size_t half) {
  const uint8_t *values = tiles.values + tile * tiles.value_lines() * Tiles::kStep + half * kTile;
  if (tiles.type == LOSA_I3) {
    const uint8x16_t low = vld1q_u8(values + i / Tiles::kPerLine * Tiles::kStep);
    const size_t line = tiles.lines() + i / Tiles::kPerHighLine;
    return join_planes(low, i % Tiles::kPerLine, vld1q_u8(values + line * Tiles::kStep),
                       i % Tiles::kPerHighLine);
  }
  const uint8x16_t two = vld1q_u8(values + i / 2 * Tiles::kStep);
  return i % 2 ? vshrq_n_u8(two, 4) : vandq_u8(two, vdupq_n_u8(15));
}

inline int8x16_t levels_of_step(const Tiles &tiles, size_t tile, size_t i, size_t half, int8x16_t table) {
  if (tiles.type == LOSA_I8) {
    const size_t step = tile * tiles.all_steps() + i;
    return vreinterpretq_s8_u8(vld1q_u8(tiles.values + step * Tiles::kStep + half * kTile));
  }
  return vqtbl1q_s8(table, codes_of_step(tiles, tile, i, half));
}

inline uint8x16_t places_of_step(const Tiles &tiles, size_t tile, size_t i, size_t half) {
  const size_t line = tile * tiles.lines() + i / Tiles::kPerLine;
  const auto shift = static_cast<int8_t>(2 * (i % Tiles::kPerLine));
  const uint8x16_t four = vld1q_u8(tiles.positions + line * Tiles::kStep + half * kTile);
  return vandq_u8(vshlq_u8(four, vdupq_n_s8(static_cast<int8_t>(-shift))), vdupq_n_u8(3));
}

template <Form F>
inline HalfStep load_short(const Tiles &tiles, size_t tile, size_t i, size_t half, int8x16_t table) {
  const uint8x16_t at = places_of_step(tiles, tile, i, half);
  return {vaddq_u8(at, starts_of<F>(i % tiles.steps, tiles.steps)),
          levels_of_step(tiles, tile, i, half, table)};
}

// Half 0 has the slots of the rows 0-3 and 8-11 of the tile, half 1 those of 4-7 and 12-15.
inline HalfStep load_half(const Tiles &tiles, size_t step, size_t half, int8x16_t table) {
  const uint8x16_t raw = vld1q_u8(tiles.values + step * Tiles::kStep + half * kTile), low = vdupq_n_u8(15);
  if (tiles.type == LOSA_I4) {
    return {vandq_u8(raw, low), vqtbl1q_s8(table, vshrq_n_u8(raw, 4))};
  }
  const uint8x16_t both = vld1q_u8(tiles.positions + step * kTile);
  return {half == 0 ? vandq_u8(both, low) : vshrq_n_u8(both, 4), vreinterpretq_s8_u8(raw)};
}

template <int Tokens>
inline void load_activations(const int8_t *const *x, size_t first, int8x16_t from[Tokens]) {
  for (int k = 0; k < Tokens; ++k) {
    from[k] = vld1q_s8(x[k] + first);
  }
}

// Sums of the rows 2 i, 2 i + 8, 2 i + 1 and 2 i + 9 in sums[i]. Of windows x begins one position before the
// row.
template <Form F, int Tokens>
inline void sum_groups(const Tiles &tiles, size_t tile, size_t group, size_t end, const int8_t *const *x,
                       int8x16_t table, int32x4_t sums[Tokens][4]) {
  for (; group < end; ++group) {
    int8x16_t from[Tokens];
    load_activations<Tokens>(x, group * kTile, from);
    for (size_t s = 0; s < tiles.steps; ++s) {
      if (F == Form::kWindows && s == kLaterSteps) {
        load_activations<Tokens>(x, group * kTile + kLaterWindows, from);
      }
      const size_t i = group * tiles.steps + s;
      for (size_t half = 0; half < 2; ++half) {
        const HalfStep w = F == Form::kWide ? load_half(tiles, tile * tiles.all_steps() + i, half, table)
                                            : load_short<F>(tiles, tile, i, half, table);
        for (int k = 0; k < Tokens; ++k) {
          const int8x16_t q = vqtbl1q_s8(from[k], w.at);
          int32x4_t *into = sums[k] + 2 * half;
          into[0] = vpadalq_s16(into[0], vmull_s8(vget_low_s8(q), vget_low_s8(w.levels)));
          into[1] = vpadalq_s16(into[1], vmull_high_s8(q, w.levels));
        }
      }
    }
  }
}

// Windows, at the border before group `behind`, where scales change: the first slots of the step behind it
// may hold the position before it, and the second ones of the step before it the position behind. Adds to
// the sums of the groups before what slots hold beyond their side, and begins the next ones with what they
// have too much.
template <int Tokens>
inline void move_border(const Tiles &tiles, size_t tile, size_t behind, const int8_t *const *x,
                        int8x16_t table, int32x4_t sums[Tokens][4], int32x4_t next[Tokens][4]) {
  const uint8x16_t second = vreinterpretq_u8_u16(vdupq_n_u16(0xff00));
  const size_t i = behind * tiles.steps;
  for (size_t half = 0; half < 2; ++half) {
    const uint8x16_t places =
        vbslq_u8(second, places_of_step(tiles, tile, i - 1, half), places_of_step(tiles, tile, i, half));
    const uint8x16_t across = vceqq_u8(places, vreinterpretq_u8_u16(vdupq_n_u16(3 << 8)));
    const int8x16_t all = vbslq_s8(second, levels_of_step(tiles, tile, i - 1, half, table),
                                   levels_of_step(tiles, tile, i, half, table));
    const int8x16_t levels = vandq_s8(all, vreinterpretq_s8_u8(across));
    for (int k = 0; k < Tokens; ++k) {
      int16_t pair;
      std::memcpy(&pair, x[k] + behind * kTile, sizeof pair);
      const int8x16_t two = vreinterpretq_s8_s16(vdupq_n_s16(pair));
      const int8x16_t q = vbslq_s8(second, vnegq_s8(two), two);  // second slots count for the group behind
      const int32x4_t moved[2] = {vpaddlq_s16(vmull_s8(vget_low_s8(q), vget_low_s8(levels))),
                                  vpaddlq_s16(vmull_high_s8(q, levels))};
      for (size_t j = 0; j < 2; ++j) {
        int32x4_t *sum = sums[k] + 2 * half + j;
        *sum = vaddq_s32(*sum, moved[j]);
        next[k][2 * half + j] = vnegq_s32(moved[j]);
      }
    }
  }
}

// Rows 0-3, 4-7, 8-11, 12-15.
inline void order_rows(const int32x4_t sums[4], float32x4_t rows[4]) {
  rows[0] = vcvtq_f32_s32(vuzp1q_s32(sums[0], sums[1]));
  rows[1] = vcvtq_f32_s32(vuzp1q_s32(sums[2], sums[3]));
  rows[2] = vcvtq_f32_s32(vuzp2q_s32(sums[0], sums[1]));
  rows[3] = vcvtq_f32_s32(vuzp2q_s32(sums[2], sums[3]));
}

// One tile times `Tokens` tokens: y [tokens, rows].
template <Form F, int Tokens>
void multiply_tile(const losa_parts &p, const Tiles &tiles, size_t tile, const Activations &a, size_t token,
                   int8x16_t table, float *y, size_t ldy) {
  const bool grouped = is_grouped(p);
  const int8_t *x[Tokens];
  float32x4_t total[Tokens][4];
  int32x4_t next[Tokens][4];  // what the sums of a group of scales begin with
  for (int k = 0; k < Tokens; ++k) {
    x[k] = a.q + (token + static_cast<size_t>(k)) * a.padded - (F == Form::kWindows ? 1 : 0);
    for (size_t i = 0; i < 4; ++i) {
      total[k][i] = vdupq_n_f32(0.0f);
      next[k][i] = vdupq_n_s32(0);
    }
  }
  float scales[kTile];
  for (size_t group = 0, g = 0; group < tiles.groups; group += tiles.per_scale, ++g) {
    const size_t end = group + tiles.per_scale < tiles.groups ? group + tiles.per_scale : tiles.groups;
    int32x4_t sums[Tokens][4];
    for (int k = 0; k < Tokens; ++k) {
      for (size_t i = 0; i < 4; ++i) {
        sums[k][i] = next[k][i];
      }
    }
    sum_groups<F, Tokens>(tiles, tile, group, end, x, table, sums);
    if (F == Form::kWindows && end < tiles.groups) {
      move_border<Tokens>(tiles, tile, end, x, table, sums, next);
    }
    if (grouped || g == 0) {
      for (size_t r = 0; r < kTile; ++r) {
        scales[r] = load_scale(p, grouped ? scale_index(p, tile * kTile + r, g) : tile * kTile + r);
      }
    }
    for (int k = 0; k < Tokens; ++k) {
      float32x4_t rows[4];
      order_rows(sums[k], rows);
      const float scale = a.scale[(token + static_cast<size_t>(k)) * a.groups + g];
      for (size_t i = 0; i < 4; ++i) {
        total[k][i] = vfmaq_f32(total[k][i], rows[i], vmulq_n_f32(vld1q_f32(scales + 4 * i), scale));
      }
    }
  }
  for (int k = 0; k < Tokens; ++k) {
    for (size_t i = 0; i < 4; ++i) {
      vst1q_f32(y + (token + static_cast<size_t>(k)) * ldy + tile * kTile + 4 * i, total[k][i]);
    }
  }
}

template <Form F>
void multiply_tiles_as(const losa_parts &p, const Activations &a, size_t begin, size_t end, float *y,
                       size_t ldy) {
  const Tiles tiles(p);
  const int8x16_t table = is_grouped(p) ? vld1q_s8(static_cast<const int8_t *>(p.table.data)) : vdupq_n_s8(0);
  for (size_t tile = begin / kTile; tile < end / kTile; ++tile) {
    size_t token = 0;
    for (; token + 4 <= a.tokens; token += 4) {
      multiply_tile<F, 4>(p, tiles, tile, a, token, table, y, ldy);
    }
    for (; token < a.tokens; ++token) {
      multiply_tile<F, 1>(p, tiles, tile, a, token, table, y, ldy);
    }
  }
}

// Rows [begin, end) times all tokens.
void multiply_tiles(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                    size_t ldy, void *) {
  const losa_parts &p = t.parts;
  (p.m == kQuad ? multiply_tiles_as<Form::kQuads> : multiply_tiles_as<Form::kWide>)(p, a, begin, end, y, ldy);
}

void multiply_windows(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                      size_t ldy, void *) {
  multiply_tiles_as<Form::kWindows>(t.parts, a, begin, end, y, ldy);
}

}  // namespace
}  // namespace losa

#endif
