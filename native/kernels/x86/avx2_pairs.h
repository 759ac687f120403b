// A few tokens times pairs of rows that share a mask in AVX2.
#ifndef LOSA_AVX2_PAIRS_H
#define LOSA_AVX2_PAIRS_H

#include "kernels/x86/avx2_dot.h"
#include "kernels/x86/avx2_pair_rows.h"
#include "kernels/x86/avx2_sums.h"

namespace losa {
namespace {

// Of the even and of the odd row for each token: sums of a group, and of all groups.
template <size_t Tokens>
struct PairSums {
  __m256i even[Tokens], odd[Tokens];

  PairSums() {
    for (size_t k = 0; k < Tokens; ++k) {
      even[k] = odd[k] = _mm256_setzero_si256();
    }
  }

  // Adds 32 positions.
  template <bool Narrow, typename Pair>
  inline LOSA_ALWAYS_INLINE void add(__m256i bytes, __m256i levels, const int8_t *x, size_t padded) {
    const __m256i first = Pair::even(bytes, levels), second = Pair::odd(bytes, levels);
    for (size_t k = 0; k < Tokens; ++k) {
      even[k] = add_products<Narrow>(even[k], first, x + k * padded);
      odd[k] = add_products<Narrow>(odd[k], second, x + k * padded);
    }
  }
};

template <size_t Tokens>
struct PairTotals {
  __m256 even[Tokens], odd[Tokens];

  PairTotals() {
    for (size_t k = 0; k < Tokens; ++k) {
      even[k] = odd[k] = _mm256_setzero_ps();
    }
  }

  // Adds a group; eight scales lie side by side, those of the odd row behind those of the even one.
  template <bool Narrow>
  inline LOSA_ALWAYS_INLINE void add(const PairSums<Tokens> &sums, const float *scale) {
    for (size_t k = 0; k < Tokens; ++k, scale += 16) {
      even[k] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot_total<Narrow>(sums.even[k])),
                                _mm256_broadcast_ss(scale), even[k]);
      odd[k] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot_total<Narrow>(sums.odd[k])),
                               _mm256_broadcast_ss(scale + 8), odd[k]);
    }
  }
};

// The rows `row` and `other` times `Tokens` tokens.
template <bool Narrow, size_t Group, bool I4, size_t Tokens>
inline LOSA_ALWAYS_INLINE PairTotals<Tokens> dot_pair(const losa_parts &p, const Matrix &m,
                                                      const Activations *a, size_t row, size_t other) {
  using Pair = PairOfRows<I4>;
  constexpr size_t kEach = Group > kBlock ? Group / kBlock : 1, kEight = 8 * Group / kBlock;
  const RowScales<true> even(p, row, m.groups), odd(p, other, m.groups);
  const size_t blocks = m.first_positions.blocks, padded = a[0].padded;
  const __m256i levels = m.levels;
  const int8_t *x = a[0].q;
  PairTotals<Tokens> totals;
  Pair pair(m, row);
  const auto add_block = [&](PairSums<Tokens> &sums) {
    const Block bytes = pair.next();
    sums.template add<Narrow, Pair>(bytes.low, levels, x, padded);
    sums.template add<Narrow, Pair>(bytes.high, levels, x + 32, padded);
    x += kBlock;
  };
  for (size_t block = 0; block < blocks; block += kEight) {
    const size_t here = blocks - block < kEight ? blocks - block : kEight, first = block * kBlock / Group;
    alignas(32) float scales[Tokens][16];
    for (size_t k = 0; k < Tokens; ++k) {
      even.times(a[k], first, scales[k]);
      odd.times(a[k], first, scales[k] + 8);
      if (Narrow) {
        const size_t count = (here * kBlock + Group - 1) / Group;
        totals.even[k] = add_biases(a[k], first, count, scales[k], totals.even[k]);
        totals.odd[k] = add_biases(a[k], first, count, scales[k] + 8, totals.odd[k]);
      }
    }
    pair.prepare(here);
    const float *scale = scales[0];
    for (size_t left = here; left >= kEach; left -= kEach) {
      if constexpr (Group == kBlock / 2) {  // each half of a block has its own scale
        const Block bytes = pair.next();
        PairSums<Tokens> low, high;
        low.template add<Narrow, Pair>(bytes.low, levels, x, padded);
        totals.template add<Narrow>(low, scale++);
        high.template add<Narrow, Pair>(bytes.high, levels, x + 32, padded);
        totals.template add<Narrow>(high, scale++);
        x += kBlock;
      } else {
        PairSums<Tokens> sums;
        add_block(sums);
        if constexpr (kEach == 2) {
          add_block(sums);
        }
        totals.template add<Narrow>(sums, scale++);
      }
    }
    if (here % kEach != 0) {
      PairSums<Tokens> sums;
      add_block(sums);
      totals.template add<Narrow>(sums, scale);
    }
  }
  return totals;
}

template <bool Narrow, size_t Group, bool I4, size_t Tokens>
void dot_pairs(const losa_parts &p, const Matrix &m, const Activations *a, size_t begin, size_t end, float *y,
               size_t ldy) {
  for (size_t row = begin; row < end; row += 2) {
    const bool alone = row + 1 == end;  // the last row: what its partner would be is not stored
    const PairTotals<Tokens> totals =
        dot_pair<Narrow, Group, I4, Tokens>(p, m, a, row, alone ? row : row + 1);
    for (size_t k = 0; k < Tokens; ++k) {
      y[k * ldy + row] = sum(totals.even[k]);
      if (!alone) {
        y[k * ldy + row + 1] = sum(totals.odd[k]);
      }
    }
  }
}

template <bool Narrow, bool I4, size_t Tokens>
void dot_pairs_of(const losa_parts &p, const Matrix &m, const Activations *a, size_t begin, size_t end,
                  float *y, size_t ldy) {
  p.group_size == 32   ? dot_pairs<Narrow, 32, I4, Tokens>(p, m, a, begin, end, y, ldy)
  : p.group_size == 64 ? dot_pairs<Narrow, 64, I4, Tokens>(p, m, a, begin, end, y, ldy)
                       : dot_pairs<Narrow, 128, I4, Tokens>(p, m, a, begin, end, y, ldy);
}

// Levels of the matrix are raised if they are narrow.
template <size_t Tokens>
void multiply_pairs(const losa_parts &p, const Matrix &m, bool narrow, const Activations *a, size_t begin,
                    size_t end, float *y, size_t ldy) {
  const bool i4 = p.value_type == LOSA_I4;
  (narrow ? (i4 ? dot_pairs_of<true, true, Tokens> : dot_pairs_of<true, false, Tokens>)
          : (i4 ? dot_pairs_of<false, true, Tokens> : dot_pairs_of<false, false, Tokens>))(p, m, a, begin,
                                                                                           end, y, ldy);
}

}  // namespace
}  // namespace losa

#endif
