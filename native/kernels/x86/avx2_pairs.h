// A few tokens times pairs of rows that share a mask in AVX2.
#ifndef LOSA_AVX2_PAIRS_H
#define LOSA_AVX2_PAIRS_H

#include "kernels/x86/avx2_dot.h"
#include "kernels/x86/avx2_pair_rows.h"
#include "kernels/x86/avx2_sums.h"

namespace losa {
namespace {

// Sums of the even and of the odd row for each token.
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
  inline __attribute__((always_inline)) void add(__m256i bytes, __m256i levels, const int8_t *x,
                                                 size_t padded) {
    const __m256i first = Pair::even(bytes, levels), second = Pair::odd(bytes, levels);
    for (size_t k = 0; k < Tokens; ++k) {
      even[k] = add_products<Narrow>(even[k], first, x + k * padded);
      odd[k] = add_products<Narrow>(odd[k], second, x + k * padded);
    }
  }
};

// The rows `row` and `other` times `Tokens` tokens; total [2, Tokens].
template <bool Narrow, size_t Group, bool I4, size_t Tokens>
inline void dot_pair(const losa_parts &p, const Matrix &m, const Activations *a, size_t row, size_t other,
                     __m256 total[2][Tokens]) {
  using Pair = PairOfRows<I4>;
  constexpr size_t kEach = Group > kBlock ? Group / kBlock : 1, kEight = 8 * Group / kBlock;
  const RowScales<true> scales[2] = {{p, row, m.groups}, {p, other, m.groups}};
  const size_t blocks = m.first_positions.blocks, padded = a[0].padded;
  const int8_t *x = a[0].q;
  Pair pair(m, row);
  for (size_t block = 0; block < blocks;) {
    alignas(32) float factors[2][Tokens][8];
    const size_t first = block * kBlock / Group, last = blocks - block < kEight ? blocks : block + kEight;
    for (size_t i = 0; i < 2; ++i) {
      for (size_t k = 0; k < Tokens; ++k) {
        scales[i].times(a[k], first, factors[i][k]);
        if (Narrow) {
          const size_t count = ((last - block) * kBlock + Group - 1) / Group;
          total[i][k] = add_biases(a[k], first, count, factors[i][k], total[i][k]);
        }
      }
    }
    const auto finish = [&](const PairSums<Tokens> &sums, size_t g) {
      for (size_t k = 0; k < Tokens; ++k) {
        total[0][k] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot_total<Narrow>(sums.even[k])),
                                      _mm256_broadcast_ss(factors[0][k] + g), total[0][k]);
        total[1][k] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot_total<Narrow>(sums.odd[k])),
                                      _mm256_broadcast_ss(factors[1][k] + g), total[1][k]);
      }
    };
    for (size_t g = 0; block < last; ++g) {
      PairSums<Tokens> sums;
      for (size_t i = 0; i < kEach && block < last; ++i, ++block, x += kBlock) {
        const Block bytes = pair.next();
        sums.template add<Narrow, Pair>(bytes.low, m.levels, x, padded);
        if (Group == kBlock / 2) {
          finish(sums, g++);
          sums = PairSums<Tokens>();
        }
        sums.template add<Narrow, Pair>(bytes.high, m.levels, x + 32, padded);
      }
      finish(sums, g);
    }
  }
}

template <bool Narrow, size_t Group, bool I4, size_t Tokens>
void dot_pairs(const losa_parts &p, const Matrix &m, const Activations *a, size_t begin, size_t end, float *y,
               size_t ldy) {
  for (size_t row = begin; row < end; row += 2) {
    const bool alone = row + 1 == end;  // the last row: what its partner would be is not stored
    __m256 total[2][Tokens];
    for (size_t k = 0; k < Tokens; ++k) {
      total[0][k] = total[1][k] = _mm256_setzero_ps();
    }
    dot_pair<Narrow, Group, I4, Tokens>(p, m, a, row, alone ? row : row + 1, total);
    for (size_t k = 0; k < Tokens; ++k) {
      y[k * ldy + row] = sum(total[0][k]);
      if (!alone) {
        y[k * ldy + row + 1] = sum(total[1][k]);
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
          : (i4 ? dot_pairs_of<false, true, Tokens> : dot_pairs_of<false, false, Tokens>))(
      p, m, a, begin, end, y, ldy);
}

}  // namespace
}  // namespace losa

#endif
