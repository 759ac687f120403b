// Several tokens in AVX2. A panel holds 8 rows side by side: 4 positions of row 0, of row 1, ... of row 7,
// then the next 4 positions. One 32-bit broadcast of a token then meets 8 rows, and a lane is a row to the
// end.
#ifndef LOSA_AVX2_PANEL_H
#define LOSA_AVX2_PANEL_H

#include "kernels/target.h"
#include "kernels/x86/avx2_dot.h"
#include "kernels/x86/avx2_pair_rows.h"

namespace losa {
namespace {

constexpr size_t kLanes = 8;
constexpr size_t kUnit = 32;  // positions whose products are summed in one go

// Levels of -8..7 are stored plus 8: unsigned by signed bytes need no sign, and the sums of 8 steps of two
// products, each at most 15 * 127, fit 16 bits. The bias, -128 times the sum of the activations, divided by
// 16 takes the 8 off again. Other levels keep their sign and are widened in every step; where sums are wide
// anyway, they are stored plus 128.
constexpr int kNarrow = 8, kMostRaised = 128;

inline bool is_narrow(const losa_parts &p) {
  if (!is_grouped(p)) {
    return false;
  }
  for (int i = 0; i < 16; ++i) {
    const int level = static_cast<const int8_t *>(p.table.data)[i];
    if (level < -kNarrow || level >= kNarrow) {
      return false;
    }
  }
  return true;
}

// What levels are stored plus; 0: they keep their sign.
inline int raised_by(const losa_parts &p) { return is_narrow(p) ? kNarrow : kWideSums ? kMostRaised : 0; }

inline LOSA_ALWAYS_INLINE void store_lane(const Block &levels, __m256i offset, size_t block, size_t lane,
                                          uint8_t *panel) {
  alignas(32) uint32_t four[kBlock / 4];
  _mm256_store_si256(reinterpret_cast<__m256i *>(four), _mm256_add_epi8(levels.low, offset));
  _mm256_store_si256(reinterpret_cast<__m256i *>(four + 8), _mm256_add_epi8(levels.high, offset));
  uint8_t *out = panel + block * kBlock * kLanes + 4 * lane;
  for (size_t i = 0; i < kBlock / 4; ++i) {
    std::memcpy(out + i * 4 * kLanes, four + i, 4);
  }
}

inline void expand_lane(const losa_tensor &t, size_t row, size_t lane, size_t padded, int raised,
                        uint8_t *panel, uint8_t *room) {
  Matrix matrix(t);
  matrix.room = room;
  with_reader(t, [&](auto tag) {
    typename decltype(tag)::Type reader(matrix, row);
    const size_t blocks = reader.blocks();
    const __m256i zero = _mm256_setzero_si256(), offset = _mm256_set1_epi8(static_cast<char>(raised));
    for (size_t block = 0; block * kBlock < padded; ++block) {
      store_lane(block < blocks ? reader.next(block) : Block{zero, zero}, offset, block, lane, panel);
    }
  });
}

// The same of two rows that share a mask, and of the lane after this one.
template <bool I4>
void expand_pair(const losa_tensor &t, size_t row, size_t lane, size_t padded, int raised, uint8_t *panel,
                 uint8_t *room) {
  using Pair = PairOfRows<I4>;
  Matrix matrix(t);
  matrix.room = room;
  Pair pair(matrix, row);
  pair.prepare(matrix.first_positions.blocks);
  const __m256i zero = _mm256_setzero_si256(), offset = _mm256_set1_epi8(static_cast<char>(raised));
  for (size_t block = 0; block * kBlock < padded; ++block) {
    const Block bytes = block < matrix.first_positions.blocks ? pair.next() : Block{zero, zero};
    const Block even = {Pair::even(bytes.low, matrix.levels), Pair::even(bytes.high, matrix.levels)};
    const Block odd = {Pair::odd(bytes.low, matrix.levels), Pair::odd(bytes.high, matrix.levels)};
    store_lane(even, offset, block, lane, panel);
    store_lane(odd, offset, block, lane + 1, panel);
  }
}

// The rows from `first` on, as the 16 lanes of two panels. Lanes without a row repeat the last one, or the
// last two.
inline void expand_lanes(const losa_tensor &t, size_t first, size_t rows, size_t padded, int raised,
                         uint8_t *panels, uint8_t *room) {
  const bool pairs = are_nibbles(t.parts);
  const auto expand = !pairs                          ? expand_lane
                      : t.parts.value_type == LOSA_I4 ? expand_pair<true>
                                                      : expand_pair<false>;
  const size_t step = pairs ? 2 : 1, last = (rows - 1) / step * step;
  for (size_t lane = 0; lane < 2 * kLanes; lane += step) {
    expand(t, first + (lane < rows ? lane : last), lane % kLanes, padded, raised,
           panels + lane / kLanes * kLanes * padded, room);
  }
}

inline __m256i broadcast_four(const int8_t *x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Positions [start, end) of 16 rows times `Tokens` tokens, as 32-bit sums.
template <bool Raised, int Tokens>
inline LOSA_ALWAYS_INLINE void unit(const uint8_t *const panel[2], const int8_t *const x[Tokens],
                                    size_t start, size_t end, __m256i acc[2][Tokens]) {
  for (int k = 0; k < Tokens; ++k) {
    acc[0][k] = acc[1][k] = _mm256_setzero_si256();
  }
  for (size_t i = start; i < end; i += 4) {
    __m256i w[2], magnitude[2];
    for (int r = 0; r < 2; ++r) {
      w[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(panel[r] + i * kLanes));
      magnitude[r] = Raised ? w[r] : _mm256_abs_epi8(w[r]);
    }
    for (int k = 0; k < Tokens; ++k) {
      const __m256i q = broadcast_four(x[k] + i);
      for (int r = 0; r < 2; ++r) {
        const __m256i signed_q = Raised ? q : _mm256_sign_epi8(q, w[r]);
        acc[r][k] = dot_accumulate<Raised>(acc[r][k], magnitude[r], signed_q);
      }
    }
  }
  for (int k = 0; k < Tokens; ++k) {
    acc[0][k] = dot_total<Raised>(acc[0][k]);
    acc[1][k] = dot_total<Raised>(acc[1][k]);
  }
}

// 16 rows times `Tokens` tokens, all groups. `scales` [groups, 2, 8] are those of the rows; the bias shifted
// by `shift` takes off what levels are raised by.
template <bool Raised, int Tokens>
void tile(const uint8_t *const panel[2], const float *scales, size_t group, int shift, const Activations &a,
          size_t token, __m256 total[2][Tokens]) {
  const int8_t *x[Tokens];
  for (int k = 0; k < Tokens; ++k) {
    x[k] = a.q + (token + static_cast<size_t>(k)) * a.padded;
    total[0][k] = total[1][k] = _mm256_setzero_ps();
  }
  for (size_t g = 0; g < a.groups; ++g) {
    const __m256 s0 = _mm256_loadu_ps(scales + 2 * g * kLanes),
                 s1 = _mm256_loadu_ps(scales + (2 * g + 1) * kLanes);
    const size_t step = kWideSums ? group : kUnit;
    for (size_t start = g * group; start < (g + 1) * group; start += step) {
      __m256i acc[2][Tokens];
      unit<Raised, Tokens>(panel, x, start, start + step, acc);
      for (int k = 0; k < Tokens; ++k) {
        const size_t at = (token + static_cast<size_t>(k)) * a.groups + g;
        if (Raised && start == g * group) {
          const __m256i bias = _mm256_set1_epi32(a.bias[at] >> shift);
          acc[0][k] = _mm256_add_epi32(acc[0][k], bias);
          acc[1][k] = _mm256_add_epi32(acc[1][k], bias);
        }
        const __m256 scale = _mm256_set1_ps(a.scale[at]);
        total[0][k] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[0][k]), _mm256_mul_ps(s0, scale), total[0][k]);
        total[1][k] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[1][k]), _mm256_mul_ps(s1, scale), total[1][k]);
      }
    }
  }
}

// Rows of a panel that exist: results of the other lanes are not stored.
inline void store_lanes(__m256 values, size_t count, float *out) {
  alignas(32) float lanes[kLanes];
  _mm256_store_ps(lanes, values);
  std::memcpy(out, lanes, (count < kLanes ? count : kLanes) * sizeof(float));
}

template <bool Raised, int Tokens>
void tiles(const uint8_t *const panel[2], const float *scales, size_t group, int shift, const Activations &a,
           size_t *token, size_t first, size_t rows, float *y, size_t ldy) {
  for (; *token + Tokens <= a.tokens; *token += Tokens) {
    __m256 total[2][Tokens];
    tile<Raised, Tokens>(panel, scales, group, shift, a, *token, total);
    for (int k = 0; k < Tokens; ++k) {
      float *out = y + (*token + static_cast<size_t>(k)) * ldy + first;
      store_lanes(total[0][k], rows, out);
      if (rows > kLanes) {
        store_lanes(total[1][k], rows - kLanes, out + kLanes);
      }
    }
  }
}

// Scales of a row, per group, at a distance of 16.
inline void copy_scales(const losa_parts &p, size_t row, size_t groups, float *out) {
  const auto copy = [&](const auto &own) {
    for (size_t g = 0; g < groups; ++g) {
      out[g * 2 * kLanes] = own.group(g);
    }
  };
  is_grouped(p) ? copy(RowScales<true>(p, row, weight_groups(p))) : copy(RowScales<false>(p, row, 0));
}

template <bool Raised>
void panels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t ldy,
            uint8_t *scratch) {
  constexpr size_t pair = 2 * kLanes;
  const size_t group = activation_group(t.parts);
  const int raised = Raised ? raised_by(t.parts) : 0, shift = raised == kNarrow ? 4 : 0;
  auto *scales = reinterpret_cast<float *>(scratch + kPanelRows * a.padded);
  const uint8_t *panel[2] = {scratch, scratch + kLanes * a.padded};
  for (size_t first = begin; first < end; first += pair) {
    const size_t rows = end - first < pair ? end - first : pair;
    expand_lanes(t, first, rows, a.padded, raised, scratch, scratch + pair * a.padded);
    for (size_t lane = 0; lane < pair; ++lane) {
      copy_scales(t.parts, first + (lane < rows ? lane : rows - 1), a.groups, scales + lane);
    }
    size_t token = 0;
    tiles<Raised, 4>(panel, scales, group, shift, a, &token, first, rows, y, ldy);
    tiles<Raised, 1>(panel, scales, group, shift, a, &token, first, rows, y, ldy);
  }
}

inline void matmul_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                          size_t ldy, void *scratch) {
  auto *room = static_cast<uint8_t *>(scratch);
  (raised_by(t.parts) != 0 ? panels<true> : panels<false>)(t, a, begin, end, y, ldy, room);
}

}  // namespace
}  // namespace losa

#endif
