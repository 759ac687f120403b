// Drives a target: checks, and chooses the entry of its table.
#include "kernels/target.h"

using namespace losa;

namespace {

bool is_panel_row_aligned(size_t begin, size_t end, size_t rows) {
  return begin % LOSA_ROW_STEP == 0 && (end % LOSA_ROW_STEP == 0 || end == rows) && end <= rows;
}

// The entry of a target, or of the nearest base that has it.
template <typename Function>
Function *own_or_base(const Target *target, Function *Target::*entry) {
  while (target->*entry == nullptr) {
    target = target->base;
  }
  return target->*entry;
}

Multiply *Target::*entry_for(const losa_parts &p, size_t tokens) {
  if (p.layout == LOSA_TILED) {
    return &Target::multiply_tiles;
  }
  if (p.layout == LOSA_SLIDING) {
    return &Target::multiply_windows;
  }
  if (is_integer(p)) {
    return tokens == 1 ? &Target::matvec_levels : &Target::matmul_levels;
  }
  return tokens == 1 ? &Target::matvec_values : &Target::matmul_values;
}

}  // namespace

extern "C" size_t losa_activation_bytes(const losa_tensor *tensor, size_t tokens) {
  const losa_parts &p = tensor->parts;
  const size_t padded = padded_columns(p);
  if (!is_integer(p)) {
    return tokens * padded * sizeof(float);
  }
  return scale_bytes(tokens, padded / activation_group(p)) + tokens * padded + kSlack;
}

extern "C" size_t losa_scratch_bytes(const losa_tensor *tensor, size_t tokens) {
  const losa_parts &p = tensor->parts;
  const size_t padded = padded_columns(p);
  // A panel; for levels also its scales, at most one f32 for every 32 positions of every row.
  const size_t floats = kPanelRows * padded, scales = kPanelRows * (padded / 32);
  const size_t panel = is_integer(p) ? floats + scales * sizeof(float) : floats * sizeof(float);
  const size_t tile = in_tiles(p) && tokens > 1 ? Tiles(p).all_steps() * Tiles::kExpanded : 0;
  return tile > panel ? tile : panel;
}

extern "C" int losa_same_activations(const losa_tensor *a, const losa_tensor *b) {
  const losa_parts &p = a->parts, &q = b->parts;
  return p.columns == q.columns && is_integer(p) == is_integer(q) &&
         (!is_integer(p) || activation_group(p) == activation_group(q));
}

extern "C" int losa_prepare(const losa_tensor *tensor, const float *x, size_t ldx, size_t begin, size_t end,
                            size_t tokens, void *activations) {
  if (tensor == nullptr || x == nullptr || activations == nullptr) {
    return LOSA_NULL_POINTER;
  }
  const Target *target = current_target();
  if (target == nullptr) {
    return LOSA_BAD_TARGET;
  }
  const losa_parts &p = tensor->parts;
  const Activations a = activations_in(*tensor, activations, tokens);
  Quantize *const quantize = own_or_base(target, &Target::quantize);
  for (size_t token = begin; token < end; ++token) {
    const float *row = x + token * ldx;
    if (is_integer(p)) {
      quantize(row, p.columns, a.padded, activation_group(p), const_cast<int8_t *>(a.q) + token * a.padded,
               const_cast<float *>(a.scale) + token * a.groups,
               const_cast<int32_t *>(a.bias) + token * a.groups);
    } else {
      float *copy = const_cast<float *>(a.x) + token * a.padded;
      std::memcpy(copy, row, p.columns * sizeof(float));
      std::memset(copy + p.columns, 0, (a.padded - p.columns) * sizeof(float));
    }
  }
  return LOSA_OK;
}

extern "C" int losa_swiglu(float *y, const float *up, size_t count) {
  if (y == nullptr || up == nullptr) {
    return LOSA_NULL_POINTER;
  }
  const Target *target = current_target();
  if (target == nullptr) {
    return LOSA_BAD_TARGET;
  }
  own_or_base(target, &Target::swiglu)(y, up, count);
  return LOSA_OK;
}

extern "C" int losa_matmul(const losa_tensor *tensor, const void *activations, size_t tokens, size_t begin,
                           size_t end, float *y, size_t ldy, void *scratch) {
  if (tensor == nullptr || activations == nullptr || y == nullptr || scratch == nullptr) {
    return LOSA_NULL_POINTER;
  }
  const Target *target = current_target();
  if (target == nullptr) {
    return LOSA_BAD_TARGET;
  }
  if (!is_panel_row_aligned(begin, end, tensor->parts.rows)) {
    return LOSA_BAD_PARAMETER;
  }
  const Activations a = activations_in(*tensor, activations, tokens);
  const losa_parts &p = tensor->parts;
  Multiply *const multiply = own_or_base(target, entry_for(p, tokens));
  multiply(*tensor, a, begin, end, y, ldy, scratch);
  return LOSA_OK;
}
