// Rows of codes as tiles of N of every 16 positions (docs/formats.md), and back.
#ifndef LOSA_GGML_TILES_H
#define LOSA_GGML_TILES_H

#include <cstddef>
#include <cstdint>
#include <vector>

#include "losa/kernels.h"

namespace losa::ggml {

constexpr size_t kTile = LOSA_TILE;

// A weight as tiles: i8, or i4 where positions are in the bytes of the values.
struct TileShape {
  size_t rows, columns, n;
  bool i4;

  size_t steps() const { return (n + 1) / 2; }
  size_t values() const { return rows * columns / kTile * steps() * 2; }  // bytes
  size_t positions() const { return i4 ? 0 : values() / 2; }
};

// Most bits that 16 positions of a mask have; rows of `per_row` words. 0 if the shape is none of tiles.
size_t most_kept(const std::vector<uint64_t> &words, size_t per_row, size_t rows, size_t columns);

void clear_tile(const TileShape &shape, size_t tile, uint8_t *positions, uint8_t *values);

// Slots of one row from its codes, one byte per position. `words` is its mask: groups that keep fewer than N
// get slots with code 0. Its tile has to be clear before.
void store_tile_row(const TileShape &shape, size_t row, const uint8_t *codes, const uint64_t *words,
                    uint8_t *positions, uint8_t *values);

// Inverse: `codes` is zero before.
void load_tile_row(const TileShape &shape, size_t row, const uint8_t *positions, const uint8_t *values,
                   uint8_t *codes);

}  // namespace losa::ggml

#endif
