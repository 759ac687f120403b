// AVX2, FMA and F16C. AVX2 has no expand instruction: a mask byte selects one of 256 byte shuffles that
// put up to 8 kept values in their places.
#include <immintrin.h>

#include <type_traits>

#include "kernels/target.h"
#include "kernels/x86/avx2_panel.h"
#include "kernels/x86/avx2_rows.h"
#include "kernels/x86/avx2_tiles.h"

namespace losa {
namespace {

inline float sum(__m256 v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}

inline __m256i load_x(const int8_t *x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)); }

// 32 products as 16-bit sums of two. Narrow levels are unsigned (avx2_panel.h); others would need 9 bits
// without their sign: |w| * sign(x, w).
template <bool Narrow>
inline __m256i products(__m256i w, const int8_t *x) {
  return Narrow ? _mm256_maddubs_epi16(w, load_x(x))
                : _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(load_x(x), w));
}

// Sums of a group, in eight parts. Narrow: the bias takes the offset of the levels off again.
template <bool Narrow>
inline __m256 widened(__m256i pairs, const Activations &a, size_t g) {
  const __m128i bias = Narrow ? _mm_srai_epi32(_mm_cvtsi32_si128(a.bias[g]), 4) : _mm_setzero_si128();
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_zextsi128_si256(bias), sums_of_two(pairs)));
}

// One or two blocks, which are a group of a row. Sums of four products of narrow levels fit 16 bits.
template <bool Narrow, size_t Count, typename Row>
inline __m256 dot_group(Row &row, const Activations &a, size_t g, size_t first) {
  __m256i acc = _mm256_setzero_si256();
  for (size_t block = first; block < first + Count; ++block) {
    const Block w = row.next(block);
    const int8_t *x = a.q + block * kBlock;
    const __m256i low = products<Narrow>(w.low, x), high = products<Narrow>(w.high, x + 32);
    acc = Narrow ? _mm256_add_epi16(acc, _mm256_add_epi16(low, high))
                 : _mm256_add_epi32(acc, _mm256_add_epi32(sums_of_two(low), sums_of_two(high)));
  }
  return Narrow ? widened<true>(acc, a, g) : _mm256_cvtepi32_ps(acc);
}

// Blocks `first` to `last` of a row, which start a group; `scales` are those of their groups.
template <bool Narrow, size_t Group, typename Row>
inline __m256 dot_blocks(Row &row, const float *scales, const Activations &a, size_t first, size_t last,
                         __m256 total) {
  if constexpr (Group == kBlock / 2) {  // each half of a block has its own scale
    for (size_t block = first; block < last; ++block) {
      const Block w = row.next(block);
      const int8_t *x = a.q + block * kBlock;
      const __m256 low = widened<Narrow>(products<Narrow>(w.low, x), a, 2 * block);
      const __m256 high = widened<Narrow>(products<Narrow>(w.high, x + 32), a, 2 * block + 1);
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
__m256 dot_row(Row row, const RowScales<Row::kI4> &scales, const Activations &a, size_t block) {
  const size_t blocks = row.blocks();
  __m256 total = _mm256_setzero_ps();
  if constexpr (!Row::kI4) {  // the scale of the row is applied to the sum
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

// The first `runs` times 128 positions of a dense i4 row: 64 bytes hold two blocks, so that nothing is loaded
// or decided twice.
template <bool Narrow, size_t Group>
__m256 dot_runs(const Matrix &m, const uint8_t *bytes, size_t runs, const RowScales<true> &scales,
                const Activations &a) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256 total = _mm256_setzero_ps();
  for (size_t run = 0; run < runs; ++run, bytes += kPadding / 2) {
    fetch_ahead(bytes);
    const __m256i first = load_step(bytes), second = load_step(bytes + 32);
    const __m256i codes[4] = {_mm256_and_si256(first, low), _mm256_and_si256(second, low),
                              _mm256_and_si256(_mm256_srli_epi16(first, 4), low),
                              _mm256_and_si256(_mm256_srli_epi16(second, 4), low)};
    const int8_t *x = a.q + run * kPadding;
    __m256i pairs[4];
    for (size_t i = 0; i < 4; ++i) {
      pairs[i] = products<Narrow>(_mm256_shuffle_epi8(m.levels, codes[i]), x + 32 * i);
    }
    constexpr size_t kGroups = kPadding / Group, kEach = 4 / kGroups;
    for (size_t k = 0; k < kGroups; ++k) {
      const size_t g = run * kGroups + k;
      __m256i acc = Narrow ? pairs[k * kEach] : sums_of_two(pairs[k * kEach]);
      for (size_t i = 1; i < kEach; ++i) {
        const __m256i next = pairs[k * kEach + i];
        acc = Narrow ? _mm256_add_epi16(acc, next) : _mm256_add_epi32(acc, sums_of_two(next));
      }
      const __m256 sums = Narrow ? widened<true>(acc, a, g) : _mm256_cvtepi32_ps(acc);
      total = _mm256_fmadd_ps(sums, _mm256_set1_ps(a.scale[g] * scales.group(g)), total);
    }
  }
  return total;
}

template <bool Narrow, size_t Group, typename Row>
void dot_rows(const losa_parts &p, const Matrix &m, const Activations &a, size_t begin, size_t end,
              float *y) {
  for (size_t r = begin; r < end; ++r) {
    const RowScales<Row::kI4> scales(p, r, m.groups);
    __m256 total = _mm256_setzero_ps();
    size_t block = 0;
    if constexpr (std::is_same_v<Row, DenseRow<true>>) {
      const size_t runs = m.columns / kPadding;
      total = dot_runs<Narrow, Group>(m, m.values + r * ((m.columns + 1) / 2), runs, scales, a);
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
  if constexpr (Row::kI4) {
    group == 32   ? dot_rows<Narrow, 32, Row>(p, m, a, begin, end, y)
    : group == 64 ? dot_rows<Narrow, 64, Row>(p, m, a, begin, end, y)
                  : dot_rows<Narrow, 128, Row>(p, m, a, begin, end, y);
  } else {
    dot_rows<false, kBlock, Row>(p, m, a, begin, end, y);
  }
}

// 8 floats from the stream to the positions of a mask byte; zero elsewhere.
inline __m256 scatter_floats(unsigned mask, __m256 kept) {
  const __m128i ranks = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(&kShuffle.control[mask]));
  const __m256i index = _mm256_cvtepi8_epi32(ranks);
  const __m256 placed = _mm256_permutevar8x32_ps(kept, index);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), placed);
}

template <bool Half>
inline __m256 load_floats(const uint8_t *p) {
  if (Half) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  }
  return _mm256_loadu_ps(reinterpret_cast<const float *>(p));
}

// Calls use(position, 8 values) for every 8 positions of a sparse row.
template <bool Half, typename Use>
void each_eight(const losa_tensor &t, size_t row, Use use) {
  constexpr size_t size = Half ? 2 : 4;
  const Positions positions(t.parts, row);
  const uint8_t *at = static_cast<const uint8_t *>(t.parts.values.data) + size * row_start(t, row);
  for (size_t block = 0; block < positions.blocks; ++block) {
    uint64_t word = positions.word(block);
    for (size_t i = 0; i < 8; ++i, word >>= 8) {
      const auto mask = static_cast<unsigned>(word & 255);
      fetch_ahead(at);
      use(block * kBlock + 8 * i, scatter_floats(mask, load_floats<Half>(at)));
      at += size * static_cast<unsigned>(__builtin_popcount(mask));
    }
  }
}

template <bool Half>
void expand_dense(const losa_parts &p, size_t row, float *out) {
  constexpr size_t size = Half ? 2 : 4;
  const uint8_t *from = static_cast<const uint8_t *>(p.values.data) + size * row * p.columns;
  size_t i = 0;
  for (; i + 8 <= p.columns; i += 8) {
    _mm256_storeu_ps(out + i, load_floats<Half>(from + size * i));
  }
  alignas(32) uint8_t tail[32] = {};
  std::memcpy(tail, from + size * i, size * (p.columns - i));
  if (i < padded_columns(p)) {
    _mm256_storeu_ps(out + i, load_floats<Half>(tail));
    std::memset(out + i + 8, 0, (padded_columns(p) - i - 8) * sizeof(float));
  }
}

void expand_values(const losa_tensor &t, size_t row, float *out) {
  const losa_parts &p = t.parts;
  const bool half = p.value_type == LOSA_F16;
  if (p.layout == LOSA_DENSE) {
    half ? expand_dense<true>(p, row, out) : expand_dense<false>(p, row, out);
    return;
  }
  size_t end = 0;
  const auto put = [&](size_t position, __m256 values) {
    _mm256_storeu_ps(out + position, values);
    end = position + 8;
  };
  half ? each_eight<true>(t, row, put) : each_eight<false>(t, row, put);
  std::memset(out + end, 0, (padded_columns(p) - end) * sizeof(float));
}

template <bool Half>
float dot_values(const losa_tensor &t, size_t row, const Activations &a) {
  __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  each_eight<Half>(t, row, [&](size_t position, __m256 values) {
    acc[position / 8 % 2] = _mm256_fmadd_ps(values, _mm256_loadu_ps(a.x + position), acc[position / 8 % 2]);
  });
  return sum(_mm256_add_ps(acc[0], acc[1]));
}

void values_panel(const float *panel, size_t first, size_t rows, const Activations &a, float *y, size_t ldy);

void matvec_values(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                   float *scratch) {
  for (size_t row = begin; row < end; ++row) {
    if (t.parts.layout == LOSA_DENSE) {
      expand_values(t, row, scratch);
      values_panel(scratch, row, 1, a, y, 0);
    } else {
      y[row] = t.parts.value_type == LOSA_F16 ? dot_values<true>(t, row, a) : dot_values<false>(t, row, a);
    }
  }
}

void matvec(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, void *scratch) {
  const losa_parts &p = t.parts;
  if (!is_integer(p)) {
    matvec_values(t, a, begin, end, y, static_cast<float *>(scratch));
    return;
  }
  if (p.layout == LOSA_TILED) {
    multiply_tiles(p, a, begin, end, y, 0, scratch);
    return;
  }
  Matrix matrix(t);
  const bool narrow = is_narrow(p);
  if (narrow) {
    matrix.raise(kNarrow);
  }
  with_reader(t, [&](auto tag) {
    using Row = typename decltype(tag)::Row;
    narrow ? dot_all<true, Row>(p, matrix, a, begin, end, y)
           : dot_all<false, Row>(p, matrix, a, begin, end, y);
  });
}

void values_panel(const float *panel, size_t first, size_t rows, const Activations &a, float *y, size_t ldy) {
  for (size_t token = 0; token < a.tokens; token += 4) {
    const size_t tokens = a.tokens - token < 4 ? a.tokens - token : 4;
    const float *x[4];
    for (size_t k = 0; k < 4; ++k) {
      x[k] = a.x + (token + (k < tokens ? k : 0)) * a.padded;
    }
    for (size_t r = 0; r < rows; r += 2) {
      const size_t pair = rows - r < 2 ? 1 : 2;
      const float *w[2] = {panel + r * a.padded, panel + (r + pair - 1) * a.padded};
      __m256 acc[2][4];
      for (auto &row : acc) {
        for (auto &v : row) {
          v = _mm256_setzero_ps();
        }
      }
      for (size_t i = 0; i < a.padded; i += 8) {
        const __m256 w0 = _mm256_loadu_ps(w[0] + i), w1 = _mm256_loadu_ps(w[1] + i);
        for (int k = 0; k < 4; ++k) {
          const __m256 v = _mm256_loadu_ps(x[k] + i);
          acc[0][k] = _mm256_fmadd_ps(w0, v, acc[0][k]);
          acc[1][k] = _mm256_fmadd_ps(w1, v, acc[1][k]);
        }
      }
      for (size_t k = 0; k < tokens; ++k) {
        for (size_t i = 0; i < pair; ++i) {
          y[(token + k) * ldy + first + r + i] = sum(acc[i][k]);
        }
      }
    }
  }
}

inline float largest(__m256 v) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}

inline int sum(__m256i v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

// One group of `length` floats, a multiple of 32.
void quantize_group(const float *x, size_t length, int8_t *q, float *scale, int32_t *bias) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 peak = _mm256_setzero_ps();
  for (size_t i = 0; i < length; i += 8) {
    peak = _mm256_max_ps(peak, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
  }
  const float top = largest(peak);
  *scale = top / 127.0f;
  const __m256 inverse = _mm256_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
  __m256i total = _mm256_setzero_si256();
  for (size_t i = 0; i < length; i += 32) {
    __m256i v[4];
    for (int k = 0; k < 4; ++k) {
      v[k] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * k), inverse));
      total = _mm256_add_epi32(total, v[k]);
    }
    // The packs work within 128-bit lanes; the permutation puts the groups of four back in order.
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(q + i), _mm256_permutevar8x32_epi32(bytes, order));
  }
  *bias = -128 * sum(total);
}

void quantize(const float *x, size_t columns, size_t padded, size_t group, int8_t *q, float *scale,
              int32_t *bias) {
  each_group(x, columns, padded, group, q, scale, bias, quantize_group);
}

void matmul(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t ldy,
            void *scratch) {
  if (t.parts.layout == LOSA_TILED) {
    multiply_tiles(t.parts, a, begin, end, y, ldy, scratch);
    return;
  }
  if (is_integer(t.parts)) {
    matmul_levels(t, a, begin, end, y, ldy, static_cast<uint8_t *>(scratch));
    return;
  }
  each_panel<float>(
      t, a, begin, end, scratch, expand_values,
      [&](const float *panel, size_t first, size_t rows) { values_panel(panel, first, rows, a, y, ldy); });
}

}  // namespace

const Target kAvx2 = {"avx2", quantize, matvec, matmul};

}  // namespace losa
