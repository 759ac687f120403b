// Rows of codes as tiles, of N of every 4 or 16 positions or of sliding windows (docs/formats.md), and back.
#ifndef LOSA_PACK_TILES_H
#define LOSA_PACK_TILES_H

#include <cstddef>
#include <cstdint>

#include "format/layout.h"
#include "format/mask.h"

namespace losa::format {

// A weight as tiles that keep `n` of every `m`, 4 or 16; i8, or i4. Sliding windows lie as 2:4.
struct TileShape {
  size_t rows, columns, n, m;
  bool i4, sliding;

  bool quads() const { return m != kTile; }
  size_t tiles() const { return rows / kTile; }
  size_t steps() const { return quads() ? 2 * n : (n + 1) / 2; }  // of a group of 16 positions
  size_t all_steps() const { return columns / kTile * steps(); }  // of a tile
  size_t lines() const { return (all_steps() + 3) / 4; }          // of the positions of quads
  // Bytes.
  size_t values() const { return tiles() * all_steps() * (quads() && i4 ? kTile : 2 * kTile); }
  size_t positions() const { return quads() ? tiles() * lines() * 2 * kTile : i4 ? 0 : values() / 2; }
  size_t bytes() const { return values() + positions(); }
};

// The smallest tiles that hold a mask, i8 or i4; of equal ones rather 2:4 than sliding windows, and these
// than N:16. n is 0 if there are none. `exact` ones have no slots without a kept weight, except for those
// that make an odd N even.
TileShape find_tiles(const Mask &mask, bool i4, bool exact);

void clear_tile(const TileShape &shape, size_t tile, uint8_t *positions, uint8_t *values);

// Slots of one row from its codes, one byte per position. `words` is its mask: groups that keep fewer than N,
// and windows without a kept position of their own, get slots with code 0. Its tile has to be clear before.
void store_tile_row(const TileShape &shape, size_t row, const uint8_t *codes, const uint64_t *words,
                    uint8_t *positions, uint8_t *values);

// Inverse: `codes` is zero before.
void load_tile_row(const TileShape &shape, size_t row, const uint8_t *positions, const uint8_t *values,
                   uint8_t *codes);

}  // namespace losa::format

#endif
