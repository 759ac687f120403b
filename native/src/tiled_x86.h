// Tiles of 16 rows in AVX2: a byte shuffle fetches the activations of 32 slots, one or several tokens alike.
// Included by the AVX2 file and by the AVX-512 one: memory, not the width of registers, is what limits it.
#ifndef LOSA_TILED_X86_H
#define LOSA_TILED_X86_H

#include <immintrin.h>

#include "layout.h"

namespace losa {
namespace {

// 32 slots: where in their group, and their levels as magnitude and as anything of the same sign.
struct Slots {
  __m256i at, magnitude, sign;
};

// Levels of -8..7 whose sign is the highest bit of their code, as in the linear table: a byte of a slot then
// is its own sign, and the sums of kFlush steps, two products of at most 8 * 127 each, fit 16 bits.
constexpr size_t kFlush = 16;

inline bool is_linear(const losa_parts &p) {
  const auto *table = static_cast<const int8_t *>(p.table.data);
  bool linear = p.value_type == LOSA_I4;
  for (int code = 0; linear && code < 16; ++code) {
    linear = code < 8 ? table[code] >= 0 && table[code] <= 8 : table[code] >= -8 && table[code] <= 0;
  }
  return linear;
}

inline __m256i load_step(const uint8_t *p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
}

// Two nibbles of 16 bytes: low ones, then high ones.
inline __m256i split_nibbles(const uint8_t *p) {
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  const __m256i wide = _mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1);
  return _mm256_and_si256(wide, _mm256_set1_epi8(15));
}

// `levels`: magnitudes of the 16 codes if Linear, else the levels themselves.
template <bool I4, bool Linear>
inline Slots load_slots(const Tiles &tiles, size_t step, __m256i levels) {
  const __m256i raw = load_step(tiles.values + step * Tiles::kStep), low = _mm256_set1_epi8(15);
  if (!I4) {
    return {split_nibbles(tiles.positions + step * kTile), _mm256_abs_epi8(raw), raw};
  }
  const __m256i level = _mm256_shuffle_epi8(levels, _mm256_and_si256(_mm256_srli_epi16(raw, 4), low));
  return {_mm256_and_si256(raw, low), Linear ? level : _mm256_abs_epi8(level), Linear ? raw : level};
}

// Sums of two neighbours are of rows 0, 8, 1, 9, ...: widened to 32 bits, rows 0-7 and rows 8-15.
inline void widen(__m256i pairs, __m256i sums[2]) {
  sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(pairs, _mm256_set1_epi32(1)));
  sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(pairs, _mm256_set1_epi32(1 << 16)));
}

// Groups [group, end) of a tile times `Tokens` tokens, added to sums. `step` is the first step of `group`.
template <bool I4, bool Linear, int Tokens>
inline void sum_groups(const Tiles &tiles, size_t group, size_t end, size_t step, const int8_t *const *x,
                       __m256i levels, __m256i sums[Tokens][2]) {
  __m256i pairs[Tokens];
  for (auto &v : pairs) {
    v = _mm256_setzero_si256();
  }
  for (; group < end; ++group) {
    __m256i from[Tokens];
    for (int k = 0; k < Tokens; ++k) {
      const auto *at = reinterpret_cast<const __m128i *>(x[k] + group * kTile);
      from[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128(at));
    }
    for (size_t s = 0; s < tiles.steps; ++s, ++step) {
      const Slots w = load_slots<I4, Linear>(tiles, step, levels);
      for (int k = 0; k < Tokens; ++k) {
        const __m256i q = _mm256_sign_epi8(_mm256_shuffle_epi8(from[k], w.at), w.sign);
        const __m256i products = _mm256_maddubs_epi16(w.magnitude, q);
        if (Linear) {
          pairs[k] = _mm256_add_epi16(pairs[k], products);
        } else {
          widen(products, sums[k]);
        }
      }
    }
  }
  for (int k = 0; Linear && k < Tokens; ++k) {
    widen(pairs[k], sums[k]);
  }
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

// One tile times `Tokens` tokens: y [tokens, rows].
template <bool I4, bool Linear, int Tokens>
void multiply_tile(const losa_parts &p, const Tiles &tiles, size_t tile, const Activations &a, size_t token,
                   __m256i levels, float *y, size_t ldy) {
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
      const size_t step = (tile * tiles.groups + group) * tiles.steps;
      sum_groups<I4, Linear, Tokens>(tiles, group, stop, step, x, levels, sums);
      group = stop;
    }
    if (I4) {
      load_scales(p, scale_index(p, tile * kTile, g), scales);
    }
    for (int k = 0; k < Tokens; ++k) {
      const __m256 scale = _mm256_set1_ps(a.scale[(token + static_cast<size_t>(k)) * a.groups + g]);
      for (int half = 0; half < 2; ++half) {
        const __m256 factor = I4 ? _mm256_mul_ps(scales[half], scale) : scale;
        total[k][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[k][half]), factor, total[k][half]);
      }
    }
  }
  if (!I4) {
    load_scales(p, tile * kTile, scales);
  }
  for (int k = 0; k < Tokens; ++k) {
    float *out = y + (token + static_cast<size_t>(k)) * ldy + tile * kTile;
    for (int half = 0; half < 2; ++half) {
      _mm256_storeu_ps(out + 8 * half, I4 ? total[k][half] : _mm256_mul_ps(total[k][half], scales[half]));
    }
  }
}

template <bool I4, bool Linear>
void multiply_tiles_as(const losa_parts &p, const Activations &a, size_t begin, size_t end, float *y,
                       size_t ldy) {
  const Tiles tiles(p);
  __m256i levels = _mm256_setzero_si256();
  if (I4) {
    levels = _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i *>(p.table.data)));
    levels = Linear ? _mm256_abs_epi8(levels) : levels;
  }
  for (size_t tile = begin / kTile; tile < end / kTile; ++tile) {
    size_t token = 0;
    for (; token + 4 <= a.tokens; token += 4) {
      multiply_tile<I4, Linear, 4>(p, tiles, tile, a, token, levels, y, ldy);
    }
    for (; token < a.tokens; ++token) {
      multiply_tile<I4, Linear, 1>(p, tiles, tile, a, token, levels, y, ldy);
    }
  }
}

// Rows [begin, end) times all tokens.
inline void multiply_tiles(const losa_parts &p, const Activations &a, size_t begin, size_t end, float *y,
                           size_t ldy) {
  if (p.value_type == LOSA_I8) {
    multiply_tiles_as<false, false>(p, a, begin, end, y, ldy);
  } else if (is_linear(p)) {
    multiply_tiles_as<true, true>(p, a, begin, end, y, ldy);
  } else {
    multiply_tiles_as<true, false>(p, a, begin, end, y, ldy);
  }
}

}  // namespace
}  // namespace losa

#endif
