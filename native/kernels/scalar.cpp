// Plain C++: the definition of what every other target computes, and the fallback on any CPU.
#include <cmath>

#include "kernels/target.h"

namespace losa {
namespace {

void quantize(const float *x, size_t columns, size_t padded, size_t group, int8_t *q, float *scale,
              int32_t *bias) {
  for (size_t start = 0, g = 0; start < padded; start += group, ++g) {
    const size_t end = start + group < columns ? start + group : columns;
    float peak = 0.0f;
    for (size_t i = start; i < end; ++i) {
      peak = std::fmax(peak, std::fabs(x[i]));
    }
    scale[g] = peak / 127.0f;
    const float inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
    int sum = 0;
    for (size_t i = start; i < start + group; ++i) {
      const int level = i < end ? static_cast<int>(std::lrintf(x[i] * inverse)) : 0;
      q[i] = static_cast<int8_t>(level);
      sum += level;
    }
    bias[g] = -128 * sum;
  }
}

// Calls put(position, k) for the k-th kept position of a row.
template <typename Put>
void each_kept(const losa_parts &p, size_t row, Put put) {
  const Positions positions(p, row);
  size_t k = 0;
  for (size_t block = 0; block < positions.blocks; ++block) {
    for (uint64_t word = positions.word(block); word != 0; word &= word - 1, ++k) {
      put(block * kBlock + static_cast<size_t>(__builtin_ctzll(word)), k);
    }
  }
}

void expand_dense_i4(const losa_parts &p, size_t row, const int8_t *table, int8_t *out) {
  const uint8_t *bytes = static_cast<const uint8_t *>(p.values.data) + row * ((p.columns + 1u) / 2u);
  for (size_t start = 0; start < p.columns; start += kPadding) {
    const size_t count = p.columns - start < kPadding ? p.columns - start : kPadding;
    const size_t half = (count + 1) / 2;
    for (size_t j = 0; j < half; ++j) {
      const uint8_t byte = bytes[start / 2 + j];
      out[start + j] = table[byte & 15];
      if (half + j < count) {
        out[start + half + j] = table[byte >> 4];
      }
    }
  }
}

void expand_dense_i3(const losa_parts &p, size_t row, const int8_t *table, int8_t *out) {
  const uint8_t *bytes = static_cast<const uint8_t *>(p.values.data) + row * dense_row_bytes(p);
  for (size_t start = 0; start < p.columns; start += kPadding) {
    const size_t count = p.columns - start < kPadding ? p.columns - start : kPadding;
    uint8_t codes[kPadding];
    split_planes(bytes + start / 8 * 3, count, codes);
    for (size_t j = 0; j < count; ++j) {
      out[start + j] = table[codes[j]];
    }
  }
}

// I3: the code of a slot of step i of a tile whose values are at `values`.
unsigned code_of_planes(const Tiles &tiles, const uint8_t *values, size_t i, size_t slot) {
  const uint8_t *high = values + tiles.lines() * Tiles::kStep;
  const unsigned upper = high[i / Tiles::kPerHighLine * Tiles::kStep + slot] >> i % Tiles::kPerHighLine & 1u;
  return (values[i / Tiles::kPerLine * Tiles::kStep + slot] >> 2 * (i % Tiles::kPerLine) & 3u) | upper << 2;
}

// Tiles with positions of two bits: within quads, or within windows.
void expand_lines(const losa_parts &p, size_t row, const int8_t *table, int8_t *out) {
  const Tiles tiles(p);
  const bool sliding = p.layout == LOSA_SLIDING;
  const size_t tile = row / kTile, place = row % 8 * 4 + row % kTile / 8 * 2;
  const uint8_t *values = tiles.values + tile * tiles.value_lines() * Tiles::kStep;
  for (size_t i = 0; i < tiles.all_steps(); ++i) {
    const size_t line = tile * tiles.lines() + i / Tiles::kPerLine;
    for (size_t k = 0; k < 2; ++k) {
      const size_t slot = place + k, start = sliding ? 2 * (2 * i + k) : (2 * i + k) / p.n * kQuad;
      const size_t shift = 2 * (i % Tiles::kPerLine);
      const size_t at = start + (tiles.positions[line * Tiles::kStep + slot] >> shift & 3u) - sliding;
      if (p.value_type == LOSA_I3) {
        out[at] = table[code_of_planes(tiles, values, i, slot)];
      } else if (p.value_type == LOSA_I4) {
        out[at] = table[values[i / 2 * Tiles::kStep + slot] >> i % 2 * 4 & 15];
      } else {
        out[at] = static_cast<int8_t>(values[i * Tiles::kStep + slot]);
      }
    }
  }
}

void expand_tiles(const losa_parts &p, size_t row, const int8_t *table, int8_t *out) {
  const Tiles tiles(p);
  const size_t first = row / kTile * tiles.groups * tiles.steps, place = row % 8 * 4 + row % kTile / 8 * 2;
  for (size_t i = 0; i < tiles.groups * tiles.steps; ++i) {
    for (size_t slot = place; slot < place + 2; ++slot) {
      const uint8_t value = tiles.values[(first + i) * Tiles::kStep + slot];
      const size_t start = i / tiles.steps * kTile;
      if (p.value_type == LOSA_I4) {
        out[start + (value & 15)] = static_cast<int8_t>(out[start + (value & 15)] + table[value >> 4]);
      } else {
        const uint8_t both = tiles.positions[(first + i) * kTile + slot % kTile];
        const size_t at = start + (slot < kTile ? both & 15u : both >> 4u);
        out[at] = static_cast<int8_t>(out[at] + static_cast<int8_t>(value));  // a free slot adds zero
      }
    }
  }
}

void expand_levels(const losa_tensor &t, size_t row, int8_t *out) {
  const losa_parts &p = t.parts;
  std::memset(out, 0, padded_columns(p));
  const auto *values = static_cast<const uint8_t *>(p.values.data);
  const auto *table = static_cast<const int8_t *>(p.table.data);
  if (p.layout == LOSA_DENSE) {
    if (p.value_type == LOSA_I4) {
      expand_dense_i4(p, row, table, out);
    } else if (p.value_type == LOSA_I3) {
      expand_dense_i3(p, row, table, out);
    } else {
      std::memcpy(out, values + row * p.columns, p.columns);
    }
    return;
  }
  if (in_tiles(p)) {
    (in_lines(p) ? expand_lines : expand_tiles)(p, row, table, out);
    return;
  }
  const uint8_t *first = values + row_start(t, row);
  if (p.value_type == LOSA_I4) {
    const unsigned shift = row % 2 ? 4 : 0;
    each_kept(p, row, [&](size_t position, size_t k) { out[position] = table[(first[k] >> shift) & 15]; });
  } else if (p.value_type == LOSA_I3) {
    const size_t bytes = stream_row_bytes(t, row);
    const bool pair = in_pairs(p), odd = row % 2 != 0;
    each_kept(p, row, [&](size_t at, size_t k) {
      out[at] = table[pair ? kept_code_of_pair(first, bytes, k, odd) : kept_code(first, bytes, k)];
    });
  } else {
    each_kept(p, row, [&](size_t position, size_t k) { out[position] = static_cast<int8_t>(first[k]); });
  }
}

float load_value(const losa_parts &p, size_t index) {
  const auto *bytes = static_cast<const uint8_t *>(p.values.data);
  if (p.value_type == LOSA_F32) {
    float value;
    std::memcpy(&value, bytes + index * 4, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, bytes + index * 2, 2);
  return half_to_float(half);
}

void expand_values(const losa_tensor &t, size_t row, float *out) {
  const losa_parts &p = t.parts;
  std::memset(out, 0, padded_columns(p) * sizeof(float));
  if (p.layout == LOSA_DENSE) {
    for (size_t i = 0; i < p.columns; ++i) {
      out[i] = load_value(p, row * p.columns + i);
    }
    return;
  }
  const size_t first = row_start(t, row);
  each_kept(p, row, [&](size_t position, size_t k) { out[position] = load_value(p, first + k); });
}

float dot_levels(const losa_parts &p, const int8_t *row, size_t r, const Activations &a, size_t token) {
  const size_t group = activation_group(p);
  const int8_t *q = a.q + token * a.padded;
  float total = 0.0f;
  for (size_t g = 0; g < a.groups; ++g) {
    int sum = 0;
    for (size_t i = g * group; i < (g + 1) * group; ++i) {
      sum += q[i] * row[i];
    }
    const bool scaled = is_grouped(p) && g < weight_groups(p);
    const float weight_scale = scaled ? load_scale(p, scale_index(p, r, g)) : 1.0f;
    total += a.scale[token * a.groups + g] * weight_scale * static_cast<float>(sum);
  }
  return p.value_type == LOSA_I8 ? total * load_scale(p, r) : total;
}

void levels_panel(const losa_tensor &t, const int8_t *panel, size_t first, size_t rows, const Activations &a,
                  float *y, size_t ldy) {
  for (size_t token = 0; token < a.tokens; ++token) {
    for (size_t r = 0; r < rows; ++r) {
      y[token * ldy + first + r] = dot_levels(t.parts, panel + r * a.padded, first + r, a, token);
    }
  }
}

void values_panel(const losa_tensor &, const float *panel, size_t first, size_t rows, const Activations &a,
                  float *y, size_t ldy) {
  for (size_t token = 0; token < a.tokens; ++token) {
    for (size_t r = 0; r < rows; ++r) {
      float total = 0.0f;
      for (size_t i = 0; i < a.padded; ++i) {
        total += a.x[token * a.padded + i] * panel[r * a.padded + i];
      }
      y[token * ldy + first + r] = total;
    }
  }
}

// Tiles and windows too: they are expanded as other rows are.
constexpr Multiply *multiply_levels = multiply_panels<int8_t, expand_levels, levels_panel>;
constexpr Multiply *multiply_values = multiply_panels<float, expand_values, values_panel>;

constexpr Target table() {
  Target target{"scalar", nullptr};
  target.quantize = quantize;
  target.matvec_levels = multiply_levels;
  target.matmul_levels = multiply_levels;
  target.matvec_values = multiply_values;
  target.matmul_values = multiply_values;
  target.multiply_tiles = multiply_levels;
  target.multiply_windows = multiply_levels;
  target.swiglu = plain_swiglu;
  return target;
}

}  // namespace

constexpr Target kScalar = table();

}  // namespace losa
