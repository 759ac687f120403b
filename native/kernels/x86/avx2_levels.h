// One token, or a few, times rows of levels in AVX2.
#ifndef LOSA_AVX2_LEVELS_H
#define LOSA_AVX2_LEVELS_H

#include <type_traits>

#include "kernels/x86/avx2_pairs.h"
#include "kernels/x86/avx2_panel.h"
#include "kernels/x86/avx2_sums.h"

namespace losa {
namespace {

// Sums of a group for each token, in parts.
template <bool Narrow, size_t Tokens>
struct TokenSums {
  __m256i each[Tokens];

  TokenSums() {
    for (auto &v : each) {
      v = _mm256_setzero_si256();
    }
  }

  // Adds 32 positions, which are at `at` of the tokens.
  inline LOSA_ALWAYS_INLINE void add(__m256i w, const int8_t *const x[Tokens], size_t at) {
    for (size_t k = 0; k < Tokens; ++k) {
      each[k] = add_products<Narrow>(each[k], w, x[k] + at);
    }
  }

  // Adds them, times the scale number i of each token.
  inline LOSA_ALWAYS_INLINE void add_to(__m256 totals[Tokens], const float *const scales[Tokens],
                                        size_t i) const {
    for (size_t k = 0; k < Tokens; ++k) {
      const __m256 sums = _mm256_cvtepi32_ps(dot_total<Narrow>(each[k]));
      totals[k] = _mm256_fmadd_ps(sums, _mm256_broadcast_ss(scales[k] + i), totals[k]);
    }
  }
};

// Blocks `first` to `last` of a row, which start a group, times a few tokens; `scales` are those of their
// groups, for each token. Sums of four times two products of narrow levels fit 16 bits.
template <bool Narrow, size_t Group, size_t Tokens, typename Row>
inline LOSA_ALWAYS_INLINE void dot_blocks(Row &row, const float *const scales[Tokens], const Activations *a,
                                          size_t first, size_t last, __m256 totals[Tokens]) {
  const int8_t *x[Tokens];
  for (size_t k = 0; k < Tokens; ++k) {
    x[k] = a[k].q;
  }
  if constexpr (Group == kBlock / 2) {  // each half of a block has its own scale
    for (size_t i = 0; first < last; ++first, i += 2) {
      const Block w = row.next(first);
      TokenSums<Narrow, Tokens> low, high;
      low.add(w.low, x, first * kBlock);
      low.add_to(totals, scales, i);
      high.add(w.high, x, first * kBlock + 32);
      high.add_to(totals, scales, i + 1);
    }
    return;
  }
  constexpr size_t kEach = Group > kBlock ? Group / kBlock : 1;
  const auto add_block = [&](TokenSums<Narrow, Tokens> &sums) {
    const Block w = row.next(first);
    sums.add(w.low, x, first * kBlock);
    sums.add(w.high, x, first * kBlock + 32);
    ++first;
  };
  size_t i = 0;
  for (; first + kEach <= last; ++i) {
    TokenSums<Narrow, Tokens> sums;
    add_block(sums);
    if constexpr (kEach == 2) {
      add_block(sums);
    }
    sums.add_to(totals, scales, i);
  }
  if (kEach == 2 && first < last) {
    TokenSums<Narrow, Tokens> sums;
    add_block(sums);
    sums.add_to(totals, scales, i);
  }
}

// One row times a few tokens, from a block on that starts a group; adds to the totals of the tokens.
template <bool Narrow, size_t Group, size_t Tokens, typename Row>
inline LOSA_ALWAYS_INLINE void dot_row(Row row, const RowScales<Row::kGrouped> &own, const Activations *a,
                                       size_t block, __m256 totals[Tokens]) {
  const size_t blocks = row.blocks();
  const float *scales[Tokens];
  if constexpr (!Row::kGrouped) {  // the scale of the row is applied to the sum
    for (size_t k = 0; k < Tokens; ++k) {
      scales[k] = a[k].scale;
    }
    dot_blocks<Narrow, Group, Tokens>(row, scales, a, block, blocks, totals);
    return;
  }
  constexpr size_t kEight = 8 * Group / kBlock;  // blocks of eight groups
  for (; block < blocks; block += kEight) {
    const size_t last = blocks - block < kEight ? blocks : block + kEight, g = block * kBlock / Group;
    alignas(32) float eight[Tokens][8];
    for (size_t k = 0; k < Tokens; ++k) {
      own.times(a[k], g, eight[k]);
      scales[k] = eight[k];
      if (Narrow) {
        const size_t count = ((last - block) * kBlock + Group - 1) / Group;
        totals[k] = add_biases(a[k], g, count, eight[k], totals[k]);
      }
    }
    dot_blocks<Narrow, Group, Tokens>(row, scales, a, block, last, totals);
  }
}

// Codes of 128 positions of a dense row, 32 in each: 64 bytes hold two blocks, so that nothing is loaded or
// decided twice.
struct RunOfNibbles {
  static constexpr size_t kBytes = kPadding / 2;

  static void split(const uint8_t *bytes, __m256i codes[4]) {
    const __m256i first = load256(bytes), second = load256(bytes + 32), low = _mm256_set1_epi8(15);
    codes[0] = _mm256_and_si256(first, low);
    codes[1] = _mm256_and_si256(second, low);
    codes[2] = _mm256_and_si256(_mm256_srli_epi16(first, 4), low);
    codes[3] = _mm256_and_si256(_mm256_srli_epi16(second, 4), low);
  }
};

struct RunOfPlanes {
  static constexpr size_t kBytes = kPadding / 8 * 3;

  static void split(const uint8_t *bytes, __m256i codes[4]) { split_run(bytes, codes); }
};

// What a row is read by where it has 128 positions more; void: by nothing but blocks.
template <typename Row>
struct RunOf {
  using Type = void;
};
template <>
struct RunOf<DenseRow<true>> {
  using Type = RunOfNibbles;
};
template <>
struct RunOf<DenseRowOfPlanes> {
  using Type = RunOfPlanes;
};

// The first `runs` times 128 positions of a dense row below 8 bits; adds to the totals of the tokens.
template <typename Run, bool Narrow, size_t Group, size_t Tokens>
inline LOSA_ALWAYS_INLINE void dot_runs(const Matrix &m, const uint8_t *bytes, size_t runs,
                                        const RowScales<true> &own, const Activations *a,
                                        __m256 totals[Tokens]) {
  constexpr size_t kGroups = kPadding / Group, kEach = 4 / kGroups;  // of a run; parts of a group
  // A sum for each group of a run: of one token, one for all would have them wait for each other.
  constexpr size_t kSums = Tokens == 1 ? kGroups : 1;
  __m256 sums[kSums][Tokens];
  const int8_t *x[Tokens];
  for (size_t k = 0; k < Tokens; ++k) {
    x[k] = a[k].q;
    for (auto &v : sums) {
      v[k] = _mm256_setzero_ps();
    }
  }
  for (size_t run = 0; run < runs;) {
    const size_t stop = runs - run < 8 / kGroups ? runs : run + 8 / kGroups;
    alignas(32) float eight[Tokens][8];
    const float *scales[Tokens];
    for (size_t k = 0; k < Tokens; ++k) {
      own.times(a[k], run * kGroups, eight[k]);
      scales[k] = eight[k];
      if (Narrow) {
        sums[0][k] = add_biases(a[k], run * kGroups, (stop - run) * kGroups, eight[k], sums[0][k]);
      }
    }
    for (size_t i = 0; run < stop; ++run, bytes += Run::kBytes) {
      fetch_ahead(bytes);
      __m256i codes[4];
      Run::split(bytes, codes);
      for (size_t g = 0; g < kGroups; ++g, ++i) {
        TokenSums<Narrow, Tokens> group;
        for (size_t part = g * kEach; part < (g + 1) * kEach; ++part) {
          group.add(_mm256_shuffle_epi8(m.levels, codes[part]), x, run * kPadding + 32 * part);
        }
        group.add_to(sums[g % kSums], scales, i);
      }
    }
  }
  for (const auto &v : sums) {
    for (size_t k = 0; k < Tokens; ++k) {
      totals[k] = _mm256_add_ps(totals[k], v[k]);
    }
  }
}

template <bool Narrow, size_t Group, size_t Tokens, typename Row>
void dot_rows(const losa_parts &p, const Matrix &m, const Activations *a, size_t begin, size_t end, float *y,
              size_t ldy) {
  for (size_t r = begin; r < end; ++r) {
    const RowScales<Row::kGrouped> scales(p, r, m.groups);
    __m256 totals[Tokens];
    for (auto &v : totals) {
      v = _mm256_setzero_ps();
    }
    size_t block = 0;
    if constexpr (!std::is_void_v<typename RunOf<Row>::Type>) {
      const size_t runs = m.columns / kPadding;
      dot_runs<typename RunOf<Row>::Type, Narrow, Group, Tokens>(m, m.values + r * m.row_bytes, runs, scales,
                                                                 a, totals);
      block = runs * (kPadding / kBlock);
    }
    dot_row<Narrow, Group, Tokens>(Row(m, r), scales, a, block, totals);
    for (size_t k = 0; k < Tokens; ++k) {
      y[k * ldy + r] = sum(totals[k]) * scales.whole();
    }
  }
}

// All that differs between tensors is chosen before the rows are walked.
template <bool Narrow, size_t Tokens, typename Row>
void dot_all(const losa_parts &p, const Matrix &m, const Activations *a, size_t begin, size_t end, float *y,
             size_t ldy) {
  const size_t group = activation_group(p);
  if constexpr (Row::kGrouped) {
    group == 32   ? dot_rows<Narrow, 32, Tokens, Row>(p, m, a, begin, end, y, ldy)
    : group == 64 ? dot_rows<Narrow, 64, Tokens, Row>(p, m, a, begin, end, y, ldy)
                  : dot_rows<Narrow, 128, Tokens, Row>(p, m, a, begin, end, y, ldy);
  } else {
    dot_rows<false, kBlock, Tokens, Row>(p, m, a, begin, end, y, ldy);
  }
}

// `Tokens` tokens; levels of the matrix are raised if they are narrow.
template <size_t Tokens>
void multiply_rows(const losa_tensor &t, const Matrix &m, bool narrow, const Activations *a, size_t begin,
                   size_t end, float *y, size_t ldy) {
  with_reader(t, [&](auto tag) {
    using Row = typename decltype(tag)::Type;
    narrow ? dot_all<true, Tokens, Row>(t.parts, m, a, begin, end, y, ldy)
           : dot_all<false, Tokens, Row>(t.parts, m, a, begin, end, y, ldy);
  });
}

// Up to so many tokens are multiplied by what a row is decoded to, which stays in registers; of pairs of
// rows, more need more registers than there are.
constexpr size_t kMostOfRows = 4, kMostOfPairs = 3;

// `count` tokens.
inline void multiply_few(const losa_tensor &t, const Matrix &m, bool narrow, size_t count,
                         const Activations *a, size_t begin, size_t end, float *y, size_t ldy) {
  if (are_nibbles(t.parts)) {
    (count == 3   ? multiply_pairs<3>
     : count == 2 ? multiply_pairs<2>
                  : multiply_pairs<1>)(t.parts, m, narrow, a, begin, end, y, ldy);
    return;
  }
  (count == 4   ? multiply_rows<4>
   : count == 3 ? multiply_rows<3>
   : count == 2 ? multiply_rows<2>
                : multiply_rows<1>)(t, m, narrow, a, begin, end, y, ldy);
}

// Rows times a few tokens, several at once: each row is decoded once for these. What needs more than one pass
// goes over so few rows at a time that they stay in the cache.
inline void few_times_rows(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                           size_t ldy, void *scratch) {
  const bool narrow = is_narrow(t.parts), pairs = are_nibbles(t.parts);
  Matrix matrix(t);
  matrix.room = static_cast<uint8_t *>(scratch);
  if (narrow) {
    matrix.raise(kNarrow);
  }
  const size_t most = pairs ? kMostOfPairs : kMostOfRows, step = a.tokens <= most ? end : LOSA_ROW_STEP;
  for (; begin < end; begin += step) {
    const size_t last = end - begin < step ? end : begin + step;
    for (size_t token = 0; token < a.tokens;) {
      const size_t left = a.tokens - token, count = left == most + 1 ? most - 1 : left < most ? left : most;
      Activations each[kMostOfRows];
      for (size_t k = 0; k < count; ++k) {
        const size_t group = (token + k) * a.groups;
        each[k] = {
            a.q + (token + k) * a.padded, a.scale + group, a.bias + group, nullptr, a.padded, a.groups, 1};
      }
      multiply_few(t, matrix, narrow, count, each, begin, last, y + token * ldy, ldy);
      token += count;
    }
  }
}

// Up to as many tokens as a draft is checked with: two passes take no longer than panels, and with them sums
// do not depend on how many tokens come along, from two on (tests/parity/test_speculation.py).
inline void rows_or_panels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                           size_t ldy, void *scratch) {
  (a.tokens <= 2 * kMostOfRows ? few_times_rows : matmul_levels)(t, a, begin, end, y, ldy, scratch);
}

}  // namespace
}  // namespace losa

#endif
