// One token, or a few, times rows of levels in AVX-512 with VBMI2 and VNNI, from registers.
#ifndef LOSA_AVX512_LEVELS_H
#define LOSA_AVX512_LEVELS_H

#include "kernels/x86/avx512_two_rows.h"
#include "kernels/x86/unrolled.h"

namespace losa {
namespace {

constexpr size_t kChunk = 16;  // groups whose scales are multiplied at once

// What the sums of rows are multiplied with, and what is added to them for the bias: of i4 and i3, scales of
// the weights times those of the activations, for two rows while the two before them are computed, because
// single floats out of what was stored in wholes wait until that has reached the cache. Of i8, the scales of
// the activations: that of a row is applied to its sum. Those of further tokens follow at a distance.
template <typename Rows, size_t Tokens>
class Factors {
  static constexpr bool kGrouped = are_grouped(Rows::kLevels);
  static constexpr float kBias = Rows::kLevels == Levels::kRaised ? 1.0f / 16 : 1.0f;  // of level + 8

 public:
  Factors(const losa_parts &p, const Activations &a, float *scratch)
      : halves_(static_cast<const uint8_t *>(p.scale.data)),
        there_(kGrouped ? weight_groups(p) : 0),
        scales_(a.scale),
        groups_(a.groups),
        stride_(round_up(a.groups, kChunk) + kChunk),
        biases_(scratch),
        rows_(scratch + Tokens * stride_) {
    for (size_t k = 0; k < Tokens; ++k) {
      __m512 all = _mm512_setzero_ps();
      for (size_t g = 0; g < groups_; g += kChunk) {
        const __mmask16 some = first_of(groups_ - g);
        const size_t at = k * groups_ + g;
        const __m512 bias = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(some, a.bias + at));
        const __m512 scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, scales_ + at), _mm512_set1_ps(kBias));
        _mm512_storeu_ps(biases_ + k * stride_ + g, _mm512_mul_ps(scale, bias));
        all = _mm512_fmadd_ps(scale, bias, all);
      }
      if (!kGrouped) {
        _mm512_storeu_ps(biases_ + k * stride_, all);
      }
    }
  }

  // Makes those of a row ready; four rows can be so at a time.
  template <bool Odd>
  void fill(size_t row) {
    if (!kGrouped) {
      return;
    }
    constexpr float kScale = 1.0f / (Odd ? Rows::kOddScaled : 1.0f);
    float *start = line(row);
    const uint8_t *halves = halves_ + 2 * row * there_;
    __m512 added[Tokens];
    unrolled<Tokens>([&](auto k) { added[k] = _mm512_setzero_ps(); });
    const auto chunk = [&](size_t g, __mmask16 weights, __mmask16 some) {
      const __m512 weight = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(weights, halves + 2 * g));
      fetch_ahead(halves + 2 * g);
      unrolled<Tokens>([&](auto k) {
        added[k] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(biases_ + k * stride_ + g), added[k]);
        const __m512 factor = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, scales_ + k * groups_ + g), weight);
        _mm512_storeu_ps(start + k * stride_ + kChunk + g, _mm512_mul_ps(factor, _mm512_set1_ps(kScale)));
      });
    };
    size_t g = 0;
    for (; g + kChunk <= there_; g += kChunk) {
      chunk(g, 0xffff, 0xffff);
    }
    for (; g < groups_; g += kChunk) {
      chunk(g, first_of(there_ > g ? there_ - g : 0), first_of(groups_ - g));
    }
    unrolled<Tokens>([&](auto k) { _mm512_storeu_ps(start + k * stride_, added[k]); });
  }

  const float *of(size_t row) const { return kGrouped ? line(row) + kChunk : scales_; }
  size_t distance() const { return kGrouped ? stride_ : groups_; }  // from a token to the next

  // Lanes whose sum is the bias of a row.
  __m512 start(size_t row, size_t token) const {
    return _mm512_loadu_ps((kGrouped ? line(row) : biases_) + token * stride_);
  }

 private:
  static __mmask16 first_of(size_t count) {
    return static_cast<__mmask16>(count < kChunk ? (1u << count) - 1u : 0xffffu);
  }

  float *line(size_t row) const { return rows_ + row % 4 * Tokens * stride_; }

  const uint8_t *halves_;
  size_t there_;  // groups of a row of weights; those of the activations may be more
  const float *scales_;
  size_t groups_, stride_;
  float *biases_, *rows_;
};

// What comes after two rows, per run of 128 positions of theirs.
template <typename Rows>
class AfterPairs {
 public:
  AfterPairs(const losa_parts &p, const Matrix512 &m)
      : m_(m),
        rows_(p.rows),
        per_run_(m.runs),
        position_step_(per_run_.of(2 * m.position_bytes >> m.mask_shift)) {}

  struct Pair {
    void next() {
      values.template next<Rows::kLines>();
      if (Rows::kMasked) {
        positions.template next<1>();
      }
    }
    Ahead values, positions;
  };

  // After the last two there is nothing.
  Pair of(size_t row) const {
    if (row + 2 >= rows_) {
      return {Ahead(m_.values), Ahead(m_.values)};
    }
    const size_t first = Rows::start(m_, row), last = Rows::start(m_, row + 2);
    const uint8_t *positions = m_.position_row(row);
    return {Ahead(m_.values + first, per_run_.of(last - first)), Ahead(positions, position_step_)};
  }

 private:
  const Matrix512 &m_;
  size_t rows_;
  PerStep per_run_;
  size_t position_step_;
};

// What two rows are multiplied by, from a run of 128 positions on: levels of the first token and its factors
// for the even and the odd row. Those of the next tokens follow at a distance.
struct Run {
  const int8_t *q;
  size_t padded;
  const float *factor[2];
  size_t distance;
};

template <size_t Tokens>
struct PairSums {
  __m512i of[2][Tokens];

  void clear() {
    unrolled<Tokens>([&](auto k) { of[0][k] = of[1][k] = _mm512_setzero_si512(); });
  }
};

template <size_t Tokens>
struct PairTotals {
  __m512 of[2][Tokens];
};

// One block of two rows; two independent chains of addresses keep more loads in flight.
template <bool Second, bool Whole, size_t Tokens, typename Rows>
inline LOSA_ALWAYS_INLINE void add_block(Rows &rows, size_t block, const Run &run, PairSums<Tokens> &sums) {
  const Two factors = rows.template next_scaled<Second, Whole>(block);
  unrolled<Tokens>([&](auto k) LOSA_ALWAYS_INLINE {
    const __m512i x = load512(run.q + k * run.padded + (Second ? kBlock : 0));
    sums.of[0][k] = dot(sums.of[0][k], factors.even, x);
    sums.of[1][k] = dot(sums.of[1][k], factors.odd, x);
  });
}

// Adds sums * factor; groups of 32 have two factors for a block.
template <size_t Group, size_t Tokens>
inline LOSA_ALWAYS_INLINE void add_scaled(const PairSums<Tokens> &sums, const Run &run, size_t at,
                                          PairTotals<Tokens> &totals) {
  unrolled<Tokens>([&](auto k) LOSA_ALWAYS_INLINE {
    unrolled<2>([&](auto odd) LOSA_ALWAYS_INLINE {
      const float *factor = run.factor[odd] + k * run.distance + at;
      const __m512 scale =
          Group == 32 ? _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(factor[0]), _mm512_set1_ps(factor[1]))
                      : _mm512_set1_ps(factor[0]);
      totals.of[odd][k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.of[odd][k]), scale, totals.of[odd][k]);
    });
  });
}

// Blocks `block` and the one after it, which are a run of 128 positions. Whole: both lie inside of the rows.
// Else the second may be missing.
template <size_t Group, bool Whole, size_t Tokens, typename Rows>
inline LOSA_ALWAYS_INLINE void add_run(Rows &rows, size_t block, bool more, const Run &run,
                                       PairTotals<Tokens> &totals) {
  constexpr size_t half = kPadding / Group / 2;
  PairSums<Tokens> sums;
  sums.clear();
  add_block<false, Whole>(rows, block, run, sums);
  if (Group != kPadding) {
    add_scaled<Group>(sums, run, 0, totals);
    sums.clear();
  }
  if (Whole || more) {
    add_block<true, Whole>(rows, block + 1, run, sums);
  } else if (Group != kPadding) {
    return;
  }
  add_scaled<Group>(sums, run, half, totals);
}

// Rows `row` and `other` times `Tokens` tokens.
template <size_t Group, typename Rows, size_t Tokens>
inline LOSA_ALWAYS_INLINE PairTotals<Tokens> dot_two(const Matrix512 &m, const Activations &a,
                                                     const Factors<Rows, Tokens> &factors,
                                                     typename AfterPairs<Rows>::Pair after, size_t row,
                                                     size_t other) {
  constexpr size_t kPerRun = kPadding / Group;
  Rows rows(m, row, other);
  PairTotals<Tokens> totals;
  unrolled<Tokens>([&](auto k) LOSA_ALWAYS_INLINE {
    totals.of[0][k] = factors.start(row, k);
    totals.of[1][k] = factors.start(other, k);
  });
  Run run = {a.q, a.padded, {factors.of(row), factors.of(other)}, factors.distance()};
  const size_t runs = m.runs, whole = Rows::whole_runs(m);
  size_t i = 0;
  for (; i < whole; ++i) {
    after.next();
    add_run<Group, true>(rows, 2 * i, true, run, totals);
    run.q += kPadding;
    run.factor[0] += kPerRun;
    run.factor[1] += kPerRun;
  }
  if (i < runs) {
    add_run<Group, false>(rows, 2 * i, 2 * i + 1 < m.blocks, run, totals);
  }
  return totals;
}

template <size_t Group, typename Rows, size_t Tokens>
void multiply_rows(const losa_parts &p, const Matrix512 &m, const Activations &a, size_t begin, size_t end,
                   float *y, size_t ldy, float *scratch) {
  constexpr bool kGrouped = are_grouped(Rows::kLevels);
  Factors<Rows, Tokens> factors(p, a, scratch);
  const AfterPairs<Rows> after(p, m);
  const auto fill_two = [&](size_t row) {
    if (row < end) {
      factors.template fill<false>(row);
    }
    if (row + 1 < end) {
      factors.template fill<true>(row + 1);
    }
  };
  const auto scale_of = [&](size_t row) { return kGrouped ? 1.0f : load_scale(p, row); };
  fill_two(begin);
  for (size_t row = begin; row < end; row += 2) {
    const bool alone = row + 1 == end;  // the last row: the second result is dropped
    fill_two(row + 2);
    const PairTotals<Tokens> totals =
        dot_two<Group>(m, a, factors, after.of(row), row, alone ? row : row + 1);
    for (size_t k = 0; k < Tokens; ++k) {
      y[k * ldy + row] = _mm512_reduce_add_ps(totals.of[0][k]) * scale_of(row);
      if (!alone) {
        y[k * ldy + row + 1] = _mm512_reduce_add_ps(totals.of[1][k]) * scale_of(row + 1);
      }
    }
  }
}

// One token times any rows, or as many as there are times pairs that share a mask.
template <size_t Tokens>
void few_times_rows(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                    size_t ldy, void *scratch) {
  const losa_parts &p = t.parts;
  const Matrix512 matrix(t);
  auto *room = static_cast<float *>(scratch);
  with_rows(p, [&](auto tag) {
    using Rows = typename decltype(tag)::Type;
    if constexpr (Tokens != 1 && !Rows::kShared) {
      return;
    } else if constexpr (!are_grouped(Rows::kLevels)) {
      multiply_rows<kBlock, Rows, Tokens>(p, matrix, a, begin, end, y, ldy, room);
    } else {
      const auto multiply = p.group_size == 32   ? multiply_rows<32, Rows, Tokens>
                            : p.group_size == 64 ? multiply_rows<64, Rows, Tokens>
                                                 : multiply_rows<128, Rows, Tokens>;
      multiply(p, matrix, a, begin, end, y, ldy, room);
    }
  });
}

}  // namespace
}  // namespace losa

#endif
