// Several tokens in AVX-512 with VBMI2 and VNNI: panels of 16 rows side by side.
#ifndef LOSA_AVX512_PANEL_H
#define LOSA_AVX512_PANEL_H

#include <algorithm>
#include <type_traits>

#include "kernels/x86/avx512_tiles.h"
#include "kernels/x86/avx512_two_rows.h"
#include "kernels/x86/unrolled.h"

namespace losa {
namespace {

// A panel of levels holds 16 rows side by side: 4 positions of row 0, of row 1, ... of row 15, then the next
// 4 positions. One 32-bit broadcast of a token then meets 16 rows, and a lane is a row to the end.
constexpr size_t kLanes = 16;

// 16 blocks side by side as their dwords one after the other: out [16, 16].
inline void store_columns(__m512i v[kLanes], uint8_t *out) {
  __m512i w[kLanes];
  for (size_t i = 0; i < kLanes; i += 2) {  // dwords of two rows, alternating
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (size_t i = 0; i < kLanes; i += 4) {  // a dword of four rows in every quarter
    v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
  }
  constexpr int kFirstThird = 0x88, kSecondFourth = 0xdd;  // quarters of both operands
  for (size_t i = 0; i < 4; ++i) {
    w[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], kFirstThird);
    w[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], kSecondFourth);
    w[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], kFirstThird);
    w[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], kSecondFourth);
  }
  for (size_t i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + 64 * i, _mm512_shuffle_i32x4(w[i], w[i + 8], kFirstThird));
    _mm512_storeu_si512(out + 64 * (i + 4), _mm512_shuffle_i32x4(w[i + 4], w[i + 12], kFirstThird));
    _mm512_storeu_si512(out + 64 * (i + 8), _mm512_shuffle_i32x4(w[i], w[i + 8], kSecondFourth));
    _mm512_storeu_si512(out + 64 * (i + 12), _mm512_shuffle_i32x4(w[i + 4], w[i + 12], kSecondFourth));
  }
}

// Up to 16 rows of a panel, block by block. Lanes without a row repeat the last two, or the last one; their
// results are not stored.
template <typename Rows>
void expand_rows(const Matrix512 &m, size_t first, size_t rows, size_t padded, uint8_t *panel) {
  const auto two = [&](size_t lane) {
    const size_t even = first + (lane < rows ? lane : (rows - 1) / 2 * 2);
    return Rows(m, even, even + 1 < first + rows ? even + 1 : even);
  };
  Rows pairs[kLanes / 2] = {two(0), two(2), two(4), two(6), two(8), two(10), two(12), two(14)};
  const __m512i nothing = factors_of<Rows::kLevels>(_mm512_setzero_si512(), false, m.levels);
  const auto expand = [&](auto second, size_t block) {
    __m512i lanes[kLanes];
    if (block < m.blocks) {
      for (size_t i = 0; i < kLanes / 2; ++i) {
        const Two found = pairs[i].template next<second, false>(block);
        lanes[2 * i] = found.even;
        lanes[2 * i + 1] = found.odd;
      }
    } else {
      std::fill(lanes, lanes + kLanes, nothing);
    }
    store_columns(lanes, panel + block * kBlock * kLanes);
  };
  for (size_t block = 0; block < padded / kBlock; block += 2) {  // `padded` is a multiple of two blocks
    expand(std::false_type(), block);
    expand(std::true_type(), block + 1);
  }
}

inline void expand_panel(const losa_tensor &t, const Matrix512 &m, size_t first, size_t rows, size_t padded,
                         uint8_t *panel) {
  if (in_tiles(t.parts)) {
    panel_of_tile(t.parts, first / kTile, padded, panel);
    return;
  }
  with_rows(t.parts,
            [&](auto tag) { expand_rows<typename decltype(tag)::Type>(m, first, rows, padded, panel); });
}

// Weight scales of 16 rows for one group.
inline __m512 lane_scales(const losa_parts &p, size_t first, size_t rows, size_t g) {
  alignas(64) float scales[kLanes];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const size_t row = first + (lane < rows ? lane : rows - 1);
    if (p.value_type == LOSA_I8) {
      scales[lane] = load_scale(p, row);
    } else {
      scales[lane] = g < weight_groups(p) ? load_scale(p, scale_index(p, row, g)) : 0.0f;
    }
  }
  return _mm512_load_ps(scales);
}

// Two panels of 16 rows times `Tokens` tokens, all groups: total [2, Tokens, 16]. The totals stay in memory,
// and this function by itself, because the sums of a group take all registers.
template <int Tokens>
__attribute__((noinline)) void tile(const uint8_t *const panel[2], const float *scales, size_t group,
                                    int shift, const Activations &a, size_t token, float *total) {
  std::memset(total, 0, 2 * Tokens * kLanes * sizeof(float));
  for (size_t g = 0; g < a.groups; ++g) {
    __m512i acc[2][Tokens];
    unrolled<Tokens>([&](auto k) {
      acc[0][k] = acc[1][k] = _mm512_set1_epi32(a.bias[(token + k) * a.groups + g] >> shift);
    });
    for (size_t i = g * group; i < (g + 1) * group; i += 4) {
      const __m512i w0 = load512(panel[0] + i * kLanes), w1 = load512(panel[1] + i * kLanes);
      unrolled<Tokens>([&](auto k) {
        int32_t four;
        std::memcpy(&four, a.q + (token + k) * a.padded + i, 4);
        const __m512i x = _mm512_set1_epi32(four);
        acc[0][k] = dot(acc[0][k], w0, x);
        acc[1][k] = dot(acc[1][k], w1, x);
      });
    }
    const __m512 s0 = _mm512_loadu_ps(scales + 2 * g * kLanes),
                 s1 = _mm512_loadu_ps(scales + (2 * g + 1) * kLanes);
    unrolled<Tokens>([&](auto k) {
      const __m512 x = _mm512_set1_ps(a.scale[(token + k) * a.groups + g]);
      float *t0 = total + k * kLanes, *t1 = t0 + Tokens * kLanes;
      const __m512 low = _mm512_cvtepi32_ps(acc[0][k]), high = _mm512_cvtepi32_ps(acc[1][k]);
      _mm512_storeu_ps(t0, _mm512_fmadd_ps(low, _mm512_mul_ps(s0, x), _mm512_loadu_ps(t0)));
      _mm512_storeu_ps(t1, _mm512_fmadd_ps(high, _mm512_mul_ps(s1, x), _mm512_loadu_ps(t1)));
    });
  }
}

// Stores the tile of rows [first, first + rows) and `Tokens` tokens.
template <int Tokens>
void store(const float *total, size_t first, size_t rows, size_t token, float *y, size_t ldy) {
  for (size_t k = 0; k < Tokens; ++k) {
    float *out = y + (token + k) * ldy + first;
    for (size_t half = 0; half < 2 && half * kLanes < rows; ++half) {
      const size_t left = rows - half * kLanes;
      std::memcpy(out + half * kLanes, total + (half * Tokens + k) * kLanes,
                  (left < kLanes ? left : kLanes) * sizeof(float));
    }
  }
}

template <int Tokens>
void tiles(const uint8_t *const panel[2], const float *scales, size_t group, int shift, const Activations &a,
           size_t *token, size_t first, size_t rows, float *y, size_t ldy) {
  for (; *token + Tokens <= a.tokens; *token += Tokens) {
    alignas(64) float total[2 * Tokens * kLanes];
    tile<Tokens>(panel, scales, group, shift, a, *token, total);
    store<Tokens>(total, first, rows, *token, y, ldy);
  }
}

inline void matmul_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                          size_t ldy, void *scratch) {
  const losa_parts &p = t.parts;
  auto *room = static_cast<uint8_t *>(scratch);
  const Matrix512 matrix(t);
  const size_t group = activation_group(p);
  const int shift = in_tiles(p) ? 0 : bias_shift(levels_of(p));
  auto *scales = reinterpret_cast<float *>(room + kPanelRows * a.padded);
  for (size_t first = begin; first < end; first += kPanelRows) {
    const size_t rows = end - first < kPanelRows ? end - first : kPanelRows;
    const size_t upper = rows > kLanes ? rows - kLanes : 0;
    const uint8_t *panel[2] = {room, room + (upper ? kLanes * a.padded : 0)};
    expand_panel(t, matrix, first, rows < kLanes ? rows : kLanes, a.padded, room);
    if (upper) {
      expand_panel(t, matrix, first + kLanes, upper, a.padded, room + kLanes * a.padded);
    }
    for (size_t g = 0; g < a.groups; ++g) {
      const __m512 low = lane_scales(p, first, rows < kLanes ? rows : kLanes, g);
      _mm512_storeu_ps(scales + 2 * g * kLanes, low);
      _mm512_storeu_ps(scales + (2 * g + 1) * kLanes, upper ? lane_scales(p, first + kLanes, upper, g) : low);
    }
    size_t token = 0;
    tiles<8>(panel, scales, group, shift, a, &token, first, rows, y, ldy);
    tiles<4>(panel, scales, group, shift, a, &token, first, rows, y, ldy);
    tiles<1>(panel, scales, group, shift, a, &token, first, rows, y, ldy);
  }
}

}  // namespace
}  // namespace losa

#endif
