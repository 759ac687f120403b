// NEON with the dot product extension (ARMv8.2): signed by signed bytes, so no offset is needed.
#include <arm_neon.h>

#include "kernels/arm/neon_rows.h"
#include "kernels/arm/neon_tiles.h"
#include "kernels/target.h"

namespace losa {
namespace {

inline float row_scale(const losa_parts &p, size_t row, size_t g) {
  if (p.value_type == LOSA_I8) {
    return load_scale(p, row);
  }
  return g < weight_groups(p) ? load_scale(p, row * weight_groups(p) + g) : 0.0f;
}

inline int32x4_t dot(int32x4_t acc, int8x16_t w, const int8_t *x) { return vdotq_s32(acc, w, vld1q_s8(x)); }

inline size_t blocks_of_row(const losa_parts &p) { return (p.columns + kBlock - 1) / kBlock; }

// The rows of a reader times one token: y [Rows::kRows]; behind the last row there are results too.
template <typename Rows>
void dot_rows(const losa_tensor &t, size_t first, const Activations &a, float *y) {
  const losa_parts &p = t.parts;
  const size_t group = activation_group(p);
  Rows rows(t, first);
  float32x4_t total[Rows::kRows];
  int32x4_t acc[Rows::kRows];
  for (size_t r = 0; r < Rows::kRows; ++r) {
    total[r] = vdupq_n_f32(0.0f);
    acc[r] = vdupq_n_s32(0);
  }
  const auto finish = [&](size_t g) {
    for (size_t r = 0; r < Rows::kRows; ++r) {
      const float scale = first + r < p.rows ? row_scale(p, first + r, g) : 0.0f;
      total[r] = vfmaq_n_f32(total[r], vcvtq_f32_s32(acc[r]), a.scale[g] * scale);
      acc[r] = vdupq_n_s32(0);
    }
  };
  for (size_t block = 0, blocks = blocks_of_row(p); block < blocks; ++block) {
    const auto w = rows.next(block);
    const int8_t *x = a.q + block * kBlock;
    for (size_t i = 0; i < 4; ++i) {
      for (size_t r = 0; r < Rows::kRows; ++r) {
        acc[r] = dot(acc[r], w.row[r].part[i], x + 16 * i);
      }
      const size_t end = block * kBlock + 16 * (i + 1);
      if (end % group == 0 || (block + 1 == blocks && i == 3)) {
        finish((end - 1) / group);
      }
    }
  }
  for (size_t r = 0; r < Rows::kRows; ++r) {
    y[r] = vaddvq_f32(total[r]);
  }
}

template <typename Rows>
void expand_levels(const losa_tensor &t, size_t first, int8_t *out) {
  Rows rows(t, first);
  const size_t blocks = blocks_of_row(t.parts), padded = padded_columns(t.parts);
  for (size_t block = 0; block < blocks; ++block) {
    const auto w = rows.next(block);
    for (size_t r = 0; r < Rows::kRows; ++r) {
      for (size_t i = 0; i < 4; ++i) {
        vst1q_s8(out + r * padded + block * kBlock + 16 * i, w.row[r].part[i]);
      }
    }
  }
  for (size_t r = 0; r < Rows::kRows; ++r) {
    std::memset(out + r * padded + blocks * kBlock, 0, padded - blocks * kBlock);
  }
}

// Two expanded rows times four tokens.
void levels_panel(const losa_tensor &t, const int8_t *panel, size_t first, size_t rows, const Activations &a,
                  float *y, size_t ldy) {
  const size_t group = activation_group(t.parts);
  for (size_t token = 0; token < a.tokens; token += 4) {
    for (size_t r = 0; r < rows; r += 2) {
      // Past the ends the last row or token is repeated and its result not stored.
      size_t row[2] = {r, r + 1 < rows ? r + 1 : r}, at[4];
      for (size_t k = 0; k < 4; ++k) {
        at[k] = token + k < a.tokens ? token + k : a.tokens - 1;
      }
      float32x4_t total[2][4];
      for (size_t i = 0; i < 8; ++i) {
        total[i / 4][i % 4] = vdupq_n_f32(0.0f);
      }
      for (size_t g = 0; g < a.groups; ++g) {
        int32x4_t acc[2][4];
        for (size_t i = 0; i < 8; ++i) {
          acc[i / 4][i % 4] = vdupq_n_s32(0);
        }
        for (size_t i = g * group; i < (g + 1) * group; i += 16) {
          const int8x16_t w0 = vld1q_s8(panel + row[0] * a.padded + i),
                          w1 = vld1q_s8(panel + row[1] * a.padded + i);
          for (size_t k = 0; k < 4; ++k) {
            const int8x16_t x = vld1q_s8(a.q + at[k] * a.padded + i);
            acc[0][k] = vdotq_s32(acc[0][k], w0, x);
            acc[1][k] = vdotq_s32(acc[1][k], w1, x);
          }
        }
        for (size_t i = 0; i < 2; ++i) {
          const float scale = row_scale(t.parts, first + row[i], g);
          for (size_t k = 0; k < 4; ++k) {
            const float factor = scale * a.scale[at[k] * a.groups + g];
            total[i][k] = vfmaq_n_f32(total[i][k], vcvtq_f32_s32(acc[i][k]), factor);
          }
        }
      }
      for (size_t k = 0; k < 4 && token + k < a.tokens; ++k) {
        for (size_t i = 0; i < 2 && r + i < rows; ++i) {
          y[(token + k) * ldy + first + r + i] = vaddvq_f32(total[i][k]);
        }
      }
    }
  }
}

// The kept values of a row as f32, eight positions at a time, zero elsewhere.
void expand_values(const losa_tensor &t, size_t row, float *out) {
  const losa_parts &p = t.parts;
  const size_t size = value_bytes(p.value_type);
  const auto *values = static_cast<const uint8_t *>(p.values.data);
  const auto value = [&](const uint8_t *at) {
    if (size == 4) {
      float f;
      std::memcpy(&f, at, 4);
      return f;
    }
    uint16_t half;
    std::memcpy(&half, at, 2);
    return half_to_float(half);
  };
  std::memset(out, 0, padded_columns(p) * sizeof(float));
  if (p.layout == LOSA_DENSE) {
    for (size_t i = 0; i < p.columns; ++i) {
      out[i] = value(values + size * (row * p.columns + i));
    }
    return;
  }
  const Positions positions(p, row);
  const uint8_t *at = values + size * row_start(t, row);
  for (size_t block = 0; block < positions.blocks; ++block) {
    for (uint64_t word = positions.word(block); word != 0; word &= word - 1, at += size) {
      out[block * kBlock + static_cast<size_t>(__builtin_ctzll(word))] = value(at);
    }
  }
}

void values_panel(const losa_tensor &, const float *panel, size_t first, size_t rows, const Activations &a,
                  float *y, size_t ldy) {
  for (size_t token = 0; token < a.tokens; ++token) {
    const float *x = a.x + token * a.padded;
    for (size_t r = 0; r < rows; ++r) {
      const float *w = panel + r * a.padded;
      float32x4_t acc[2] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
      for (size_t i = 0; i < a.padded; i += 8) {
        acc[0] = vfmaq_f32(acc[0], vld1q_f32(w + i), vld1q_f32(x + i));
        acc[1] = vfmaq_f32(acc[1], vld1q_f32(w + i + 4), vld1q_f32(x + i + 4));
      }
      y[token * ldy + first + r] = vaddvq_f32(vaddq_f32(acc[0], acc[1]));
    }
  }
}

void matvec_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t,
                   void *) {
  with_rows(t.parts, [&](auto tag) {
    using Rows = typename decltype(tag)::Type;
    for (size_t row = begin; row < end; row += Rows::kRows) {
      float found[Rows::kRows];
      dot_rows<Rows>(t, row, a, found);
      std::memcpy(y + row, found, (end - row < Rows::kRows ? end - row : Rows::kRows) * sizeof(float));
    }
  });
}

void matmul_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t ldy,
                   void *scratch) {
  with_rows(t.parts, [&](auto tag) {
    using Rows = typename decltype(tag)::Type;
    multiply_panels<int8_t, expand_levels<Rows>, levels_panel, Rows::kRows>(t, a, begin, end, y, ldy,
                                                                            scratch);
  });
}

void quantize_group(const float *x, size_t length, int8_t *q, float *scale, int32_t *bias) {
  float32x4_t peak = vdupq_n_f32(0.0f);
  for (size_t i = 0; i < length; i += 4) {
    peak = vmaxq_f32(peak, vabsq_f32(vld1q_f32(x + i)));
  }
  const float top = vmaxvq_f32(peak);
  *scale = top / 127.0f;
  const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
  int32x4_t total = vdupq_n_s32(0);
  for (size_t i = 0; i < length; i += 8) {
    const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse));
    const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), inverse));
    total = vaddq_s32(total, vaddq_s32(low, high));
    vst1_s8(q + i, vqmovn_s16(vcombine_s16(vqmovn_s32(low), vqmovn_s32(high))));
  }
  *bias = -128 * vaddvq_s32(total);
}

constexpr Multiply *multiply_values = multiply_panels<float, expand_values, values_panel>;

constexpr Target table() {
  Target target{"neon", &kScalar};
  target.quantize = quantize_groups<quantize_group>;
  target.matvec_levels = matvec_levels;
  target.matmul_levels = matmul_levels;
  target.matvec_values = multiply_values;
  target.matmul_values = multiply_values;
  target.multiply_tiles = multiply_tiles;
  target.multiply_windows = multiply_windows;
  return target;
}

}  // namespace

constexpr Target kNeon = table();

}  // namespace losa
