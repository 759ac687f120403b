// Plain loops that compilers turn into vectors; on Linux the CPU chooses among three builds of each.
// They need -fno-trapping-math: only then may comparisons become selections.
#include "rounding.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LOSA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LOSA_CLONES
#endif
// What is not inlined into a clone is built for the oldest CPU.
#if defined(__GNUC__)
#define LOSA_INLINE inline __attribute__((always_inline))
#else
#define LOSA_INLINE inline
#endif

namespace losa {
namespace {

// Adding and subtracting it rounds to the nearest whole number, ties to even, below 2^22.
constexpr float ROUNDER = 12582912.0F;
constexpr size_t LANES = 16;
constexpr size_t PIECE = 256;

LOSA_INLINE float nearest(float x) { return (x + ROUNDER) - ROUNDER; }
LOSA_INLINE float inverse(float scale) { return scale == 0.0F ? 0.0F : 1.0F / scale; }

LOSA_INLINE void store(float value, float *out) { *out = value; }

LOSA_INLINE void store(float value, uint16_t *out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  *out = static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

LOSA_INLINE float load(float value) { return value; }

LOSA_INLINE float load(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

template <typename Out>
LOSA_INLINE void round_group(const Grid &grid, const float *weight, float scale, size_t count, Out *out) {
  const float factor = inverse(scale), low = grid.low, high = grid.high;
  for (size_t i = 0; i < count; ++i) {
    const float level = nearest(std::min(std::max(weight[i] * factor, low), high));
    store(level * scale + 0.0F, out + i);
  }
}

// The gradient of `count` <= PIECE weights; returns that of their scale.
template <typename Gradient>
LOSA_INLINE float gradient_piece(const Grid &grid, const float *__restrict weight, float scale,
                                 const Gradient *__restrict gradient, size_t count,
                                 float *__restrict weight_gradient) {
  const float factor = inverse(scale), low = grid.low, high = grid.high;
  float terms[PIECE];
  for (size_t i = 0; i < count; ++i) {
    const float ratio = weight[i] * factor, slope = load(gradient[i]);
    // Rounded, then clamped: half a level beyond the outermost ones is still inside of them.
    const float whole = nearest(std::min(std::max(ratio, low - 1.0F), high + 1.0F));
    const float level = std::min(std::max(whole, low), high);
    const float inside = whole == level ? 1.0F : 0.0F;
    weight_gradient[i] = slope * inside;
    terms[i] = slope * (level - ratio * inside);
  }
  float sums[LANES] = {};
  size_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    for (size_t lane = 0; lane < LANES; ++lane) {
      sums[lane] += terms[i + lane];
    }
  }
  for (; i < count; ++i) {
    sums[0] += terms[i];
  }
  float sum = 0.0F;
  for (const float lane : sums) {
    sum += lane;
  }
  return sum;
}

template <typename Gradient>
LOSA_INLINE float gradient_group(const Grid &grid, const float *weight, float scale, const Gradient *gradient,
                                 size_t count, float *weight_gradient) {
  float sum = 0.0F;
  for (size_t i = 0; i < count; i += PIECE) {
    const size_t some = std::min(PIECE, count - i);
    sum += gradient_piece(grid, weight + i, scale, gradient + i, some, weight_gradient + i);
  }
  return sum;
}

template <typename Out>
LOSA_INLINE void round_all(const Grid &grid, const float *weight, const float *scales, size_t begin,
                           size_t end, Out *out) {
  for (size_t row = begin; row < end; ++row) {
    for (size_t group = 0; group < grid.groups; ++group) {
      const size_t first = group * grid.width, count = std::min(grid.columns, first + grid.width) - first;
      const size_t place = row * grid.columns + first;
      round_group(grid, weight + place, scales[row * grid.groups + group], count, out + place);
    }
  }
}

template <typename Gradient>
LOSA_INLINE void gradient_all(const Grid &grid, const float *weight, const float *scales,
                              const Gradient *gradient, size_t begin, size_t end, float *weight_gradient,
                              float *scale_gradient) {
  for (size_t row = begin; row < end; ++row) {
    for (size_t group = 0; group < grid.groups; ++group) {
      const size_t first = group * grid.width, count = std::min(grid.columns, first + grid.width) - first;
      const size_t place = row * grid.columns + first, number = row * grid.groups + group;
      const float sum = gradient_group(grid, weight + place, scales[number], gradient + place, count,
                                       weight_gradient + place);
      scale_gradient[number] = sum;
    }
  }
}

}  // namespace

LOSA_CLONES void round_rows(const Grid &grid, const float *weight, const float *scales, size_t begin,
                            size_t end, float *out) {
  round_all(grid, weight, scales, begin, end, out);
}

LOSA_CLONES void round_rows(const Grid &grid, const float *weight, const float *scales, size_t begin,
                            size_t end, uint16_t *out) {
  round_all(grid, weight, scales, begin, end, out);
}

LOSA_CLONES void round_gradient(const Grid &grid, const float *weight, const float *scales,
                                const float *gradient, size_t begin, size_t end, float *weight_gradient,
                                float *scale_gradient) {
  gradient_all(grid, weight, scales, gradient, begin, end, weight_gradient, scale_gradient);
}

LOSA_CLONES void round_gradient(const Grid &grid, const float *weight, const float *scales,
                                const uint16_t *gradient, size_t begin, size_t end, float *weight_gradient,
                                float *scale_gradient) {
  gradient_all(grid, weight, scales, gradient, begin, end, weight_gradient, scale_gradient);
}

}  // namespace losa
