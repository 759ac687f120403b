// Rounding of weights to a grid and its straight-through gradients, for training on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace losa {

// A weight [rows, columns] with one scale per `width` positions of a row: scales [rows, groups].
struct Grid {
  size_t rows;
  size_t columns;
  size_t width;
  size_t groups;
  float low;
  float high;
};

// out = level(weight / scale) * scale, as f32 or as bf16 bits; rows [begin, end). Zero scales give zeros.
void round_rows(const Grid &grid, const float *weight, const float *scales, size_t begin, size_t end,
                float *out);
void round_rows(const Grid &grid, const float *weight, const float *scales, size_t begin, size_t end,
                uint16_t *out);

// Gradients of weight and scales from that of the rounded weight, f32 or bf16 bits; rows [begin, end).
// d/dweight passes inside of the levels; d/dscale is level - weight / scale inside, level outside (LSQ).
void round_gradient(const Grid &grid, const float *weight, const float *scales, const float *gradient,
                    size_t begin, size_t end, float *weight_gradient, float *scale_gradient);
void round_gradient(const Grid &grid, const float *weight, const float *scales, const uint16_t *gradient,
                    size_t begin, size_t end, float *weight_gradient, float *scale_gradient);

}  // namespace losa
