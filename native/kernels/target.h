// What an instruction set implements. One table per target; matmul.cpp drives it.
#ifndef LOSA_TARGET_H
#define LOSA_TARGET_H

#include "format/layout.h"

namespace losa {

struct Target {
  const char *name;

  // One token: x [columns] -> q [padded], scale and bias [padded / group]; q is zero from `columns` on.
  void (*quantize)(const float *x, size_t columns, size_t padded, size_t group, int8_t *q, float *scale,
                   int32_t *bias);

  // Rows [begin, end) times one token: y [rows].
  void (*matvec)(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                 void *scratch);

  // Rows [begin, end) times all tokens: y [tokens, rows] with row stride ldy. `scratch` has room for
  // kPanelRows rows of padded_columns(t) levels or floats.
  void (*matmul)(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t ldy,
                 void *scratch);
};

extern const Target kScalar;
#if defined(LOSA_X86)
extern const Target kAvx2, kAvx512, kAvx512Vnni;
#elif defined(LOSA_ARM)
extern const Target kNeon;
#endif

// The chosen target; null if LOSA_KERNELS names one that cannot run.
const Target *current_target();

// Calls quantize(x, group, q, scale, bias) for every group of a token; what lies behind the columns is zero.
template <typename Quantize>
static inline void each_group(const float *x, size_t columns, size_t padded, size_t group, int8_t *q,
                              float *scale, int32_t *bias, Quantize quantize) {
  for (size_t start = 0, g = 0; start < padded; start += group, ++g) {
    if (start + group <= columns) {
      quantize(x + start, group, q + start, scale + g, bias + g);
      continue;
    }
    float copy[kPadding] = {};
    if (start < columns) {
      std::memcpy(copy, x + start, (columns - start) * sizeof(float));
    }
    quantize(copy, group, q + start, scale + g, bias + g);
  }
}

// Panels of up to kPanelRows rows: expanded once, then multiplied with every token while in the cache.
template <typename Value, typename Expand, typename Multiply>
static inline void each_panel(const losa_tensor &t, const Activations &a, size_t begin, size_t end,
                              void *scratch, Expand expand, Multiply multiply) {
  auto *panel = static_cast<Value *>(scratch);
  for (size_t first = begin; first < end; first += kPanelRows) {
    const size_t rows = end - first < kPanelRows ? end - first : kPanelRows;
    for (size_t r = 0; r < rows; ++r) {
      expand(t, first + r, panel + r * a.padded);
    }
    multiply(panel, first, rows);
  }
}

}  // namespace losa

#endif
