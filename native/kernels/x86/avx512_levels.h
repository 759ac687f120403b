// One token times rows of levels in AVX-512 with VBMI2 and VNNI, from registers.
#ifndef LOSA_AVX512_LEVELS_H
#define LOSA_AVX512_LEVELS_H

#include "kernels/x86/avx512_rows.h"

namespace losa {
namespace {

constexpr size_t kChunk = 16;  // groups whose scales are multiplied at once

// What the sums of rows are multiplied with, and what is added to them for the bias: of i4 and i3, scales of
// the weights times those of the activations, for two rows while the two before them are computed, because
// single floats out of what was stored in wholes wait until that has reached the cache. Of i8, the scales of
// the activations: that of a row is applied to its sum.
template <typename Row>
class Factors {
  static constexpr bool kGrouped = are_grouped(Row::kLevels);
  static constexpr float kBias = Row::kLevels == Levels::kRaised ? 1.0f / 16 : 1.0f;  // of level + 8

 public:
  Factors(const losa_parts &p, const Activations &a, float *scratch)
      : halves_(static_cast<const uint8_t *>(p.scale.data)),
        there_(kGrouped ? weight_groups(p) : 0),
        scales_(a.scale),
        groups_(a.groups),
        stride_(round_up(a.groups, kChunk) + kChunk),
        biases_(scratch),
        rows_(scratch + stride_) {
    __m512 all = _mm512_setzero_ps();
    for (size_t g = 0; g < groups_; g += kChunk) {
      const __mmask16 some = first_of(groups_ - g);
      const __m512 bias = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(some, a.bias + g));
      const __m512 scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, scales_ + g), _mm512_set1_ps(kBias));
      _mm512_storeu_ps(biases_ + g, _mm512_mul_ps(scale, bias));
      all = _mm512_fmadd_ps(scale, bias, all);
    }
    if (!kGrouped) {
      _mm512_storeu_ps(biases_, all);
    }
  }

  // Makes those of a row ready; four rows can be so at a time.
  template <typename Parity>
  void fill(size_t row) {
    if (!kGrouped) {
      return;
    }
    float *start = rows_ + row % 4 * stride_;
    const uint8_t *halves = halves_ + 2 * row * there_;
    __m512 added = _mm512_setzero_ps();
    const auto chunk = [&](size_t g, __mmask16 weights, __mmask16 some) {
      const __m512 weight = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(weights, halves + 2 * g));
      fetch_ahead(halves + 2 * g);
      added = _mm512_fmadd_ps(weight, _mm512_loadu_ps(biases_ + g), added);
      const __m512 factor = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, scales_ + g), weight);
      _mm512_storeu_ps(start + kChunk + g, _mm512_mul_ps(factor, _mm512_set1_ps(1.0f / Parity::kScaled)));
    };
    size_t g = 0;
    for (; g + kChunk <= there_; g += kChunk) {
      chunk(g, 0xffff, 0xffff);
    }
    for (; g < groups_; g += kChunk) {
      chunk(g, first_of(there_ > g ? there_ - g : 0), first_of(groups_ - g));
    }
    _mm512_storeu_ps(start, added);
  }

  const float *of(size_t row) const { return kGrouped ? rows_ + row % 4 * stride_ + kChunk : scales_; }

  // Lanes whose sum is the bias of a row.
  __m512 start(size_t row) const { return _mm512_loadu_ps(kGrouped ? rows_ + row % 4 * stride_ : biases_); }

 private:
  static __mmask16 first_of(size_t count) {
    return static_cast<__mmask16>(count < kChunk ? (1u << count) - 1u : 0xffffu);
  }

  const uint8_t *halves_;
  size_t there_;  // groups of a row of weights; those of the activations may be more
  const float *scales_;
  size_t groups_, stride_;
  float *biases_, *rows_;
};

// What comes after two rows, per run of 128 positions of theirs.
template <typename Row>
class AfterPairs {
 public:
  AfterPairs(const losa_parts &p, const Matrix512 &m)
      : m_(m),
        rows_(p.rows),
        per_run_(m.runs),
        position_step_(per_run_.of(2 * m.position_bytes >> m.mask_shift)) {}

  struct Pair {
    void next() {
      values.template next<Row::kLines>();
      if (Row::kMasked) {
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
    const size_t first = Row::start(m_, row), last = Row::start(m_, row + 2);
    const uint8_t *positions = m_.position_row(row);
    return {Ahead(m_.values + first, per_run_.of(last - first)), Ahead(positions, position_step_)};
  }

 private:
  const Matrix512 &m_;
  size_t rows_;
  PerStep per_run_;
  size_t position_step_;
};

// One block of two rows times one token: two independent chains of addresses keep more loads in flight.
template <bool Second, bool Whole, typename A, typename B>
inline __attribute__((always_inline)) void add_block(A &first, B &second, size_t block, const int8_t *q,
                                                     __m512i *acc0, __m512i *acc1) {
  const __m512i x = load512(q + block * kBlock);
  *acc0 = dot(*acc0, first.template next_scaled<Second, Whole>(block), x);
  *acc1 = dot(*acc1, second.template next_scaled<Second, Whole>(block), x);
}

// total += sums * factor; groups of 32 have two factors for a block.
template <bool Narrow>
inline __m512 scaled(__m512 total, __m512i sums, const float *factor) {
  const __m512 scale =
      Narrow ? _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(factor[0]), _mm512_set1_ps(factor[1]))
             : _mm512_set1_ps(factor[0]);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, total);
}

// Blocks `block` and the one after it, which are a run of 128 positions. Whole: both lie inside of the rows.
// Else the second may be missing. The factors are those of the run.
template <size_t Group, bool Whole, typename A, typename B>
inline __attribute__((always_inline)) void add_run(A &first, B &second, size_t block, bool more,
                                                   const int8_t *q, const float *factor0,
                                                   const float *factor1, __m512 *total0, __m512 *total1) {
  constexpr size_t half = kPadding / Group / 2;
  constexpr bool kNarrow = Group == 32;
  __m512i acc0 = _mm512_setzero_si512(), acc1 = acc0;
  add_block<false, Whole>(first, second, block, q, &acc0, &acc1);
  if (Group != kPadding) {
    *total0 = scaled<kNarrow>(*total0, acc0, factor0);
    *total1 = scaled<kNarrow>(*total1, acc1, factor1);
    acc0 = acc1 = _mm512_setzero_si512();
  }
  if (Whole || more) {
    add_block<true, Whole>(first, second, block + 1, q, &acc0, &acc1);
  } else if (Group != kPadding) {
    return;
  }
  *total0 = scaled<kNarrow>(*total0, acc0, factor0 + half);
  *total1 = scaled<kNarrow>(*total1, acc1, factor1 + half);
}

// Rows row0 and row1 times one token: y [2].
template <size_t Group, typename A, typename B>
inline void dot_two(const Matrix512 &m, const int8_t *q, const Factors<A> &factors,
                    typename AfterPairs<A>::Pair after, size_t row0, size_t row1, float *y) {
  constexpr size_t kPerRun = kPadding / Group;
  A first(m, row0);
  B second(m, row1);
  __m512 total0 = factors.start(row0), total1 = factors.start(row1);
  const float *factor0 = factors.of(row0), *factor1 = factors.of(row1);
  const size_t runs = m.runs, whole = A::whole_runs(m);
  size_t run = 0;
  for (; run < whole; ++run) {
    after.next();
    add_run<Group, true>(first, second, 2 * run, true, q, factor0, factor1, &total0, &total1);
    factor0 += kPerRun;
    factor1 += kPerRun;
  }
  if (run < runs) {
    add_run<Group, false>(first, second, 2 * run, 2 * run + 1 < m.blocks, q, factor0, factor1, &total0,
                          &total1);
  }
  y[0] = _mm512_reduce_add_ps(total0);
  y[1] = _mm512_reduce_add_ps(total1);
}

template <size_t Group, typename Row>
void matvec_rows(const losa_parts &p, const Matrix512 &m, const Activations &a, size_t begin, size_t end,
                 float *y, float *scratch) {
  using Even = typename Row::Even;
  using Odd = typename Row::Odd;
  constexpr bool kGrouped = are_grouped(Row::kLevels);
  Factors<Even> factors(p, a, scratch);
  const AfterPairs<Even> after(p, m);
  const auto fill_two = [&](size_t row) {
    if (row < end) {
      factors.template fill<Even>(row);
    }
    if (row + 1 < end) {
      factors.template fill<Odd>(row + 1);
    }
  };
  const auto scale_of = [&](size_t row) { return kGrouped ? 1.0f : load_scale(p, row); };
  fill_two(begin);
  size_t row = begin;
  for (; row + 2 <= end; row += 2) {
    fill_two(row + 2);
    dot_two<Group, Even, Odd>(m, a.q, factors, after.of(row), row, row + 1, y + row);
    y[row] *= scale_of(row);
    y[row + 1] *= scale_of(row + 1);
  }
  if (row < end) {  // alone: the second result is dropped
    float twice[2];
    dot_two<Group, Even, Even>(m, a.q, factors, after.of(row), row, row, twice);
    y[row] = twice[0] * scale_of(row);
  }
}

inline void matvec_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                          size_t, void *scratch) {
  const losa_parts &p = t.parts;
  const Matrix512 matrix(t);
  auto *room = static_cast<float *>(scratch);
  with_rows(p, [&](auto tag) {
    using Row = typename decltype(tag)::Row;
    switch (activation_group(p)) {
      case 32:
        return matvec_rows<32, Row>(p, matrix, a, begin, end, y, room);
      case 64:
        return matvec_rows<64, Row>(p, matrix, a, begin, end, y, room);
      default:
        return matvec_rows<128, Row>(p, matrix, a, begin, end, y, room);
    }
  });
}

}  // namespace
}  // namespace losa

#endif
