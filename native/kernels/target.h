// What an instruction set implements: a table of eight functions, which matmul.cpp drives.
//
// A target names what it does better than its base, another target that every CPU which runs it runs too; a
// null entry is the base's. So functions of several targets work on the same memory: prepared activations
// look the same whoever wrote them, and scratch memory has room for the entry that needs most.
#ifndef LOSA_TARGET_H
#define LOSA_TARGET_H

#include "format/layout.h"

namespace losa {

// One token: x [columns] -> q [padded], scale and bias [padded / group]; q is zero from `columns` on.
// `padded` is a multiple of kPadding, `group` is 32, 64 or 128.
using Quantize = void(const float *x, size_t columns, size_t padded, size_t group, int8_t *q, float *scale,
                      int32_t *bias);

// y[token * ldy + row] for the rows [begin, end) and all tokens of the activations.
//
// An entry may assume:
// - that losa_tensor_open accepted `t`: reads stay inside of its components, behind whose values there are
//   LOSA_STREAM_SLACK bytes more where they are a stream (bitmask and N:M);
// - what losa_matmul checks: `begin` is a multiple of LOSA_ROW_STEP, `end` too or the number of rows;
// - what the driver chose it by: layout, kind of values, one token or not;
// - what nobody can check: `a` was prepared for this tensor or for one of losa_same_activations, y has room,
//   and so has `scratch`, losa_scratch_bytes of it, as aligned as a float is.
// It writes nothing but those rows of y and scratch memory.
using Multiply = void(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                      size_t ldy, void *scratch);

// y[i] = SiLU(y[i]) * up[i], where SiLU(g) = g / (1 + exp(-g)); y and up do not overlap.
using Swiglu = void(float *y, const float *up, size_t count);

struct Target {
  const char *name;
  const Target *base;  // null: there is none, and no entry is null

  // Activations of integer weights: int8 levels of -127..127, rounded to nearest, ties to even, so that all
  // targets find the same; a bias is -128 * the sum of its group. Float weights need no entry: the driver
  // copies their activations.
  Quantize *quantize = nullptr;

  // Rows of integer levels in every layout without tiles. Scratch memory: kPanelRows rows of
  // a.padded bytes, then kPanelRows floats for every 32 positions.
  Multiply *matvec_levels = nullptr;  // one token; ldy means nothing
  Multiply *matmul_levels = nullptr;  // several tokens

  // Rows of floats, F32 or F16, in every layout without tiles, which have none. Scratch memory: kPanelRows
  // rows of a.padded floats.
  Multiply *matvec_values = nullptr;  // one token; ldy means nothing
  Multiply *matmul_values = nullptr;  // several tokens

  // Tiles, of integer levels, with any number of tokens; rows and columns are multiples of kTile. Scratch
  // memory: that of levels, and with several tokens at least Tiles::kExpanded bytes for every step of a tile.
  Multiply *multiply_tiles = nullptr;    // LOSA_TILED
  Multiply *multiply_windows = nullptr;  // LOSA_SLIDING

  // The gate of an MLP, any number of values, to a relative error of 5e-7 where the gate is at least -87.
  Swiglu *swiglu = nullptr;
};

extern const Target kScalar;
Swiglu plain_swiglu;
#if defined(LOSA_X86)
extern const Target kAvx2, kAvxVnni, kAvx512, kAvx512Vnni;
#elif defined(LOSA_ARM)
extern const Target kNeon;
#endif

// The chosen target; null if LOSA_KERNELS names one that cannot run.
const Target *current_target();

// Parts that entries are made of. Each() works on one group of `length` positions, all of which are there.
using QuantizeGroup = void(const float *x, size_t length, int8_t *q, float *scale, int32_t *bias);

// The entry `quantize`, group by group.
template <QuantizeGroup Each>
static void quantize_groups(const float *x, size_t columns, size_t padded, size_t group, int8_t *q,
                            float *scale, int32_t *bias) {
  for (size_t start = 0, g = 0; start < padded; start += group, ++g) {
    if (start + group <= columns) {
      Each(x + start, group, q + start, scale + g, bias + g);
      continue;
    }
    float copy[kPadding] = {};
    if (start < columns) {
      std::memcpy(copy, x + start, (columns - start) * sizeof(float));
    }
    Each(copy, group, q + start, scale + g, bias + g);
  }
}

// A row, or as many as lie together, as a.padded levels or floats each, zero where nothing is kept.
template <typename Value>
using Expand = void(const losa_tensor &t, size_t row, Value *out);

// Expanded rows [first, first + rows), at most kPanelRows, times all tokens.
template <typename Value>
using MultiplyPanel = void(const losa_tensor &t, const Value *panel, size_t first, size_t rows,
                           const Activations &a, float *y, size_t ldy);

// An entry of any kind, panel by panel: rows are expanded once, `Step` at a time, then multiplied with every
// token while they are in the cache. kPanelRows is a multiple of `Step`.
template <typename Value, Expand<Value> Rows, MultiplyPanel<Value> Panel, size_t Step = 1>
static void multiply_panels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                            size_t ldy, void *scratch) {
  auto *panel = static_cast<Value *>(scratch);
  for (size_t first = begin; first < end; first += kPanelRows) {
    const size_t rows = end - first < kPanelRows ? end - first : kPanelRows;
    for (size_t r = 0; r < rows; r += Step) {
      Rows(t, first + r, panel + r * a.padded);
    }
    Panel(t, panel, first, rows, a, y, ldy);
  }
}

}  // namespace losa

#endif
