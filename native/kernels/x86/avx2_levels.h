// One token times rows of levels in AVX2.
#ifndef LOSA_AVX2_LEVELS_H
#define LOSA_AVX2_LEVELS_H

#include <type_traits>

#include "kernels/x86/avx2_pairs.h"
#include "kernels/x86/avx2_panel.h"
#include "kernels/x86/avx2_sums.h"

namespace losa {
namespace {

// Sums of a group, in eight parts. Narrow: the bias takes the offset of the levels off again.
template <bool Narrow>
inline __m256 group_total(__m256i acc, const Activations &a, size_t g) {
  const __m128i bias = Narrow ? _mm_srai_epi32(_mm_cvtsi32_si128(a.bias[g]), 4) : _mm_setzero_si128();
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_zextsi128_si256(bias), dot_total<Narrow>(acc)));
}

// One or two blocks, which are a group of a row. Sums of four times two products of narrow levels fit 16
// bits.
template <bool Narrow, size_t Count, typename Row>
inline __m256 dot_group(Row &row, const Activations &a, size_t g, size_t first) {
  __m256i acc = _mm256_setzero_si256();
  for (size_t block = first; block < first + Count; ++block) {
    const Block w = row.next(block);
    const int8_t *x = a.q + block * kBlock;
    acc = add_products<Narrow>(add_products<Narrow>(acc, w.low, x), w.high, x + 32);
  }
  return group_total<Narrow>(acc, a, g);
}

// Blocks `first` to `last` of a row, which start a group; `scales` are those of their groups.
template <bool Narrow, size_t Group, typename Row>
inline __m256 dot_blocks(Row &row, const float *scales, const Activations &a, size_t first, size_t last,
                         __m256 total) {
  if constexpr (Group == kBlock / 2) {  // each half of a block has its own scale
    const __m256i zero = _mm256_setzero_si256();
    for (size_t block = first; block < last; ++block) {
      const Block w = row.next(block);
      const int8_t *x = a.q + block * kBlock;
      const __m256 low = group_total<Narrow>(add_products<Narrow>(zero, w.low, x), a, 2 * block);
      const __m256 high = group_total<Narrow>(add_products<Narrow>(zero, w.high, x + 32), a, 2 * block + 1);
      total = _mm256_fmadd_ps(low, _mm256_broadcast_ss(scales++), total);
      total = _mm256_fmadd_ps(high, _mm256_broadcast_ss(scales++), total);
    }
    return total;
  }
  constexpr size_t kEach = Group > kBlock ? Group / kBlock : 1;
  for (; first + kEach <= last; first += kEach) {
    const __m256 sums = dot_group<Narrow, kEach>(row, a, first / kEach, first);
    total = _mm256_fmadd_ps(sums, _mm256_broadcast_ss(scales++), total);
  }
  if (kEach == 2 && first < last) {
    const __m256 sums = dot_group<Narrow, 1>(row, a, first / kEach, first);
    total = _mm256_fmadd_ps(sums, _mm256_broadcast_ss(scales), total);
  }
  return total;
}

// One row times one token, from a block on that starts a group.
template <bool Narrow, size_t Group, typename Row>
__m256 dot_row(Row row, const RowScales<Row::kGrouped> &scales, const Activations &a, size_t block) {
  const size_t blocks = row.blocks();
  __m256 total = _mm256_setzero_ps();
  if constexpr (!Row::kGrouped) {  // the scale of the row is applied to the sum
    return dot_blocks<Narrow, Group>(row, a.scale, a, block, blocks, total);
  }
  constexpr size_t kEight = 8 * Group / kBlock;  // blocks of eight groups
  for (; block < blocks; block += kEight) {
    alignas(32) float eight[8];
    scales.times(a, block * kBlock / Group, eight);
    const size_t last = blocks - block < kEight ? blocks : block + kEight;
    total = dot_blocks<Narrow, Group>(row, eight, a, block, last, total);
  }
  return total;
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

// The first `runs` times 128 positions of a dense row below 8 bits.
template <typename Run, bool Narrow, size_t Group>
__m256 dot_runs(const Matrix &m, const uint8_t *bytes, size_t runs, const RowScales<true> &scales,
                const Activations &a) {
  constexpr size_t kGroups = kPadding / Group, kEach = 4 / kGroups;  // of a run; parts of a group
  // A sum for each group of a run: one for all would have them wait for each other.
  __m256 total[kGroups];
  for (auto &v : total) {
    v = _mm256_setzero_ps();
  }
  for (size_t run = 0; run < runs;) {
    const size_t stop = runs - run < 8 / kGroups ? runs : run + 8 / kGroups;
    alignas(32) float eight[8];
    scales.times(a, run * kGroups, eight);
    if (Narrow) {
      total[0] = add_biases(a, run * kGroups, (stop - run) * kGroups, eight, total[0]);
    }
    for (const float *scale = eight; run < stop; ++run, bytes += Run::kBytes) {
      fetch_ahead(bytes);
      __m256i codes[4];
      Run::split(bytes, codes);
      const int8_t *x = a.q + run * kPadding;
      for (size_t k = 0; k < kGroups; ++k) {
        __m256i acc = _mm256_setzero_si256();
        for (size_t i = k * kEach; i < (k + 1) * kEach; ++i) {
          acc = add_products<Narrow>(acc, _mm256_shuffle_epi8(m.levels, codes[i]), x + 32 * i);
        }
        const __m256 sums = _mm256_cvtepi32_ps(dot_total<Narrow>(acc));
        total[k] = _mm256_fmadd_ps(sums, _mm256_broadcast_ss(scale++), total[k]);
      }
    }
  }
  for (size_t k = 1; k < kGroups; ++k) {
    total[0] = _mm256_add_ps(total[0], total[k]);
  }
  return total[0];
}

template <bool Narrow, size_t Group, typename Row>
void dot_rows(const losa_parts &p, const Matrix &m, const Activations &a, size_t begin, size_t end,
              float *y) {
  for (size_t r = begin; r < end; ++r) {
    const RowScales<Row::kGrouped> scales(p, r, m.groups);
    __m256 total = _mm256_setzero_ps();
    size_t block = 0;
    if constexpr (!std::is_void_v<typename RunOf<Row>::Type>) {
      const size_t runs = m.columns / kPadding;
      total =
          dot_runs<typename RunOf<Row>::Type, Narrow, Group>(m, m.values + r * m.row_bytes, runs, scales, a);
      block = runs * (kPadding / kBlock);
    }
    total = _mm256_add_ps(total, dot_row<Narrow, Group>(Row(m, r), scales, a, block));
    y[r] = sum(total) * scales.whole();
  }
}

// All that differs between tensors is chosen before the rows are walked.
template <bool Narrow, typename Row>
void dot_all(const losa_parts &p, const Matrix &m, const Activations &a, size_t begin, size_t end, float *y) {
  const size_t group = activation_group(p);
  if constexpr (Row::kGrouped) {
    group == 32   ? dot_rows<Narrow, 32, Row>(p, m, a, begin, end, y)
    : group == 64 ? dot_rows<Narrow, 64, Row>(p, m, a, begin, end, y)
                  : dot_rows<Narrow, 128, Row>(p, m, a, begin, end, y);
  } else {
    dot_rows<false, kBlock, Row>(p, m, a, begin, end, y);
  }
}

inline void matvec_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                          size_t, void *scratch) {
  const losa_parts &p = t.parts;
  Matrix matrix(t);
  matrix.room = static_cast<uint8_t *>(scratch);
  const bool narrow = is_narrow(p);
  if (narrow) {
    matrix.raise(kNarrow);
  }
  if (are_nibbles(p)) {
    multiply_pairs<1>(p, matrix, narrow, &a, begin, end, y, 0);
    return;
  }
  with_reader(t, [&](auto tag) {
    using Row = typename decltype(tag)::Type;
    narrow ? dot_all<true, Row>(p, matrix, a, begin, end, y)
           : dot_all<false, Row>(p, matrix, a, begin, end, y);
  });
}

constexpr size_t kWorthPanels = 8;  // tokens

// Dense codes times a few tokens: a row is decoded again for each token, from the cache, which takes less
// time than to spread it over a panel; with 2 tokens a quarter, with 8 two thirds, with 16 as much.
inline void repeated_matvec(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                            size_t ldy, void *scratch) {
  for (size_t first = begin; first < end; first += LOSA_ROW_STEP) {
    const size_t last = end - first < LOSA_ROW_STEP ? end : first + LOSA_ROW_STEP;
    for (size_t token = 0; token < a.tokens; ++token) {
      const size_t group = token * a.groups;
      const Activations one = {
          a.q + token * a.padded, a.scale + group, a.bias + group, nullptr, a.padded, a.groups, 1};
      matvec_levels(t, one, first, last, y + token * ldy, ldy, scratch);
    }
  }
}

// Pairs of rows times a few tokens: placed once for all of them.
inline void few_times_pairs(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                            size_t ldy, void *scratch) {
  Matrix matrix(t);
  matrix.room = static_cast<uint8_t *>(scratch);
  const bool narrow = is_narrow(t.parts);
  if (narrow) {
    matrix.raise(kNarrow);
  }
  constexpr size_t kMost = 3;  // more need more registers than there are
  for (size_t token = 0; token < a.tokens;) {
    const size_t left = a.tokens - token, count = left == kMost + 1 ? 2 : left < kMost ? left : kMost;
    Activations each[kMost];
    for (size_t k = 0; k < count; ++k) {
      const size_t group = (token + k) * a.groups;
      each[k] = {
          a.q + (token + k) * a.padded, a.scale + group, a.bias + group, nullptr, a.padded, a.groups, 1};
    }
    const auto multiply = count == kMost ? multiply_pairs<kMost>
                          : count == 2   ? multiply_pairs<2>
                                         : multiply_pairs<1>;
    multiply(t.parts, matrix, narrow, each, begin, end, y + token * ldy, ldy);
    token += count;
  }
}

inline void panels_or_matvec(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                             size_t ldy, void *scratch) {
  const bool few = a.tokens < kWorthPanels && is_grouped(t.parts);
  (few && t.parts.layout == LOSA_DENSE ? repeated_matvec
   : few && are_nibbles(t.parts)       ? few_times_pairs
                                       : matmul_levels)(t, a, begin, end, y, ldy, scratch);
}

}  // namespace
}  // namespace losa

#endif
