#include "tiles.h"

#include <cstring>

namespace losa::ggml {
namespace {

// The slots of one row: those of a step are two neighbouring bytes.
struct RowSlots {
  RowSlots(const TileShape &shape, size_t row)
      : byte(row % 8 * 4 + row % kTile / 8 * 2),
        first_step(row / kTile * (shape.columns / kTile) * shape.steps()),
        shift(byte < kTile ? 0 : 4) {}

  size_t value(size_t step) const { return (first_step + step) * 2 * kTile + byte; }
  // Of its position, in a byte that another row shares.
  size_t position(size_t step) const { return (first_step + step) * kTile + byte % kTile; }

  size_t byte, first_step;
  int shift;
};

// The lowest `n` positions that are kept, completed with the lowest others.
unsigned complete(unsigned kept, size_t n) {
  auto count = static_cast<size_t>(__builtin_popcount(kept));
  for (unsigned bit = 1; count < n; bit <<= 1) {
    count += (kept & bit) == 0;
    kept |= bit;
  }
  return kept;
}

}  // namespace

size_t most_kept(const std::vector<uint64_t> &words, size_t per_row, size_t rows, size_t columns) {
  if (rows % kTile != 0 || columns % kTile != 0 || words.size() != rows * per_row) {
    return 0;
  }
  int most = 0;
  for (const uint64_t word : words) {
    for (unsigned at = 0; at < 64; at += kTile) {
      const int here = __builtin_popcountll(word >> at & 0xffff);
      most = here > most ? here : most;
    }
  }
  return static_cast<size_t>(most);
}

void clear_tile(const TileShape &shape, size_t tile, uint8_t *positions, uint8_t *values) {
  const size_t tiles = shape.rows / kTile;
  std::memset(values + tile * (shape.values() / tiles), 0, shape.values() / tiles);
  std::memset(positions + tile * (shape.positions() / tiles), 0, shape.positions() / tiles);
}

void store_tile_row(const TileShape &shape, size_t row, const uint8_t *codes, const uint64_t *words,
                    uint8_t *positions, uint8_t *values) {
  const RowSlots slots(shape, row);
  const size_t n = shape.n, steps = shape.steps();
  for (size_t group = 0; group < shape.columns / kTile; ++group, codes += kTile) {
    unsigned kept = complete(words[group / 4] >> (group % 4 * kTile) & 0xffff, n);
    uint8_t *value = values + slots.value(group * steps);
    uint8_t *position = shape.i4 ? nullptr : positions + slots.position(group * steps);
    for (size_t k = 0; k < n; ++k, kept &= kept - 1) {
      const auto at = static_cast<unsigned>(__builtin_ctz(kept));
      const size_t step = k / 2;
      if (position == nullptr) {
        value[step * 2 * kTile + k % 2] = static_cast<uint8_t>(codes[at] << 4 | at);
      } else {
        value[step * 2 * kTile + k % 2] = codes[at];
        uint8_t &shared = position[step * kTile + k % 2];
        shared = static_cast<uint8_t>(shared | at << slots.shift);
      }
    }
  }
}

void load_tile_row(const TileShape &shape, size_t row, const uint8_t *positions, const uint8_t *values,
                   uint8_t *codes) {
  const RowSlots slots(shape, row);
  for (size_t group = 0; group < shape.columns / kTile; ++group, codes += kTile) {
    for (size_t k = 0; k < shape.n; ++k) {
      const size_t step = group * shape.steps() + k / 2;
      const uint8_t value = values[slots.value(step) + k % 2];
      if (shape.i4) {
        codes[value & 15] = value >> 4;
      } else {
        codes[positions[slots.position(step) + k % 2] >> slots.shift & 15] = value;
      }
    }
  }
}

}  // namespace losa::ggml
