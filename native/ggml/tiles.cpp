#include "tiles.h"

namespace losa::ggml {
namespace {

// Where the k-th slot of a row is.
struct Slot {
  Slot(const TileShape &shape, size_t row, size_t group, size_t k)
      : step((row / kTile * (shape.columns / kTile) + group) * shape.steps() + k / 2),
        byte(row % 8 * 4 + row % kTile / 8 * 2 + k % 2),
        value(step * 2 * kTile + byte),
        position(step * kTile + byte % kTile),
        shift(byte < kTile ? 0 : 4) {}

  size_t step, byte, value, position;
  int shift;  // of its position in the byte that two slots share
};

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

void store_tile_row(const TileShape &shape, size_t row, const uint8_t *codes, const uint64_t *words,
                    uint8_t *positions, uint8_t *values) {
  for (size_t group = 0; group < shape.columns / kTile; ++group) {
    auto kept = static_cast<unsigned>(words[group / 4] >> (group % 4 * kTile) & 0xffff);
    for (unsigned bit = 1; static_cast<size_t>(__builtin_popcount(kept)) < shape.n; bit <<= 1) {
      kept |= bit;
    }
    for (size_t k = 0; k < shape.n; ++k, kept &= kept - 1) {
      const auto at = static_cast<unsigned>(__builtin_ctz(kept));
      const uint8_t code = codes[group * kTile + at];
      const Slot slot(shape, row, group, k);
      if (shape.i4) {
        values[slot.value] = static_cast<uint8_t>(code << 4 | at);
      } else {
        values[slot.value] = code;
        positions[slot.position] = static_cast<uint8_t>(positions[slot.position] | at << slot.shift);
      }
    }
  }
}

void load_tile_row(const TileShape &shape, size_t row, const uint8_t *positions, const uint8_t *values,
                   uint8_t *codes) {
  for (size_t group = 0; group < shape.columns / kTile; ++group) {
    for (size_t k = 0; k < shape.n; ++k) {
      const Slot slot(shape, row, group, k);
      const uint8_t value = values[slot.value];
      if (shape.i4) {
        codes[group * kTile + (value & 15)] = value >> 4;
      } else {
        codes[group * kTile + (positions[slot.position] >> slot.shift & 15)] = value;
      }
    }
  }
}

}  // namespace losa::ggml
