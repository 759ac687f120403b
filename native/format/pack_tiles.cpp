#include "format/pack_tiles.h"

#include <algorithm>
#include <cstring>

namespace losa::format {
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

// Without the instruction, which not every CPU has, the compiler's own count is a call.
size_t count_bits(unsigned mask) {
  mask -= mask >> 1 & 0x5555;
  mask = (mask & 0x3333) + (mask >> 2 & 0x3333);
  mask = (mask + (mask >> 4)) & 0x0f0f;
  return (mask + (mask >> 8)) & 31;
}

// The lowest `n` of 16 positions that are kept, completed with the lowest others.
unsigned complete(unsigned kept, size_t n) {
  size_t count = count_bits(kept);
  for (unsigned bit = 1; count < n; bit <<= 1) {
    count += (kept & bit) == 0;
    kept |= bit;
  }
  return kept;
}

void store_groups(const TileShape &shape, size_t row, const uint8_t *codes, const uint64_t *words,
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
        value[step * 2 * kTile + k % 2] = static_cast<uint8_t>(unsigned{codes[at]} << 4 | at);
      } else {
        value[step * 2 * kTile + k % 2] = codes[at];
        uint8_t &shared = position[step * kTile + k % 2];
        shared = static_cast<uint8_t>(shared | at << slots.shift);
      }
    }
  }
}

void load_groups(const TileShape &shape, size_t row, const uint8_t *positions, const uint8_t *values,
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

// A row of quads: its slots lie in the bytes `byte` and the next of every 32.
struct RowQuads {
  RowQuads(const TileShape &shape, size_t row)
      : byte(row % 8 * 4 + row % kTile / 8 * 2),
        first_line(row / kTile * shape.lines()),
        first_step(row / kTile * shape.all_steps()),
        i4(shape.i4) {}

  size_t position(size_t step) const { return (first_line + step / 4) * 2 * kTile + byte; }
  size_t value(size_t step) const {
    return (i4 ? (first_step + step) / 2 : first_step + step) * 2 * kTile + byte;
  }

  size_t byte, first_line, first_step;
  bool i4;
};

// For each mask of a quad its lowest positions, two bits each, completed with the lowest others.
struct QuadTable {
  uint8_t positions[16];

  explicit constexpr QuadTable(unsigned n) : positions{} {
    for (unsigned mask = 0; mask < 16; ++mask) {
      unsigned kept = mask, count = 0, found = 0;
      for (unsigned at = 0; at < kQuad; ++at) {
        count += kept >> at & 1;
      }
      for (unsigned at = 0; at < kQuad && count < n; ++at) {
        count += (kept >> at & 1) == 0;
        kept |= 1u << at;
      }
      for (unsigned at = 0; at < kQuad && found < n; ++at) {
        if ((kept >> at & 1) != 0) {
          positions[mask] = static_cast<uint8_t>(positions[mask] | at << 2 * found++);
        }
      }
    }
  }
};
constexpr QuadTable kOneOfQuad(1), kTwoOfQuad(2);

// A line of a row: up to eight slots.
struct Line {
  unsigned places[2] = {};  // two bits each, of the even slots and of the odd ones
  uint8_t levels[8] = {};

  void set(size_t slot, unsigned place, uint8_t level) {
    places[slot % 2] |= place << slot / 2 * 2;
    levels[slot] = level;
  }

  // Its first bytes are at `position` and `value`.
  template <bool I4>
  void store(size_t slots, uint8_t *position, uint8_t *value) const {
    for (size_t k = 0; k < 2; ++k) {
      position[k] = static_cast<uint8_t>(places[k]);
      for (size_t step = 0; step < slots / 2; step += I4 ? 2 : 1) {
        const uint8_t low = levels[2 * step + k];
        value[(I4 ? step / 2 : step) * 2 * kTile + k] =
            I4 ? static_cast<uint8_t>(low | levels[2 * step + 2 + k] << 4) : low;
      }
    }
  }
};

template <size_t N, bool I4>
void store_line(const uint8_t *codes, uint64_t kept, size_t slots, uint8_t *position, uint8_t *value) {
  const QuadTable &table = N == 1 ? kOneOfQuad : kTwoOfQuad;
  Line line;
  for (size_t slot = 0; slot < slots; ++slot) {
    const size_t quad = slot / N;
    const unsigned at = table.positions[kept >> quad * kQuad & 15] >> slot % N * 2 & 3;
    line.set(slot, at, codes[quad * kQuad + at]);
  }
  line.store<I4>(slots, position, value);
}

template <size_t N, bool I4>
void store_lines(const TileShape &shape, size_t row, const uint8_t *codes, const uint64_t *words,
                 uint8_t *positions, uint8_t *values) {
  constexpr size_t kColumns = 8 / N * kQuad;
  const RowQuads quads(shape, row);
  for (size_t column = 0, step = 0; column < shape.columns; column += kColumns, step += 4) {
    const uint64_t kept = words[column / 64] >> column % 64;
    uint8_t *position = positions + quads.position(step), *value = values + quads.value(step);
    if (column + kColumns <= shape.columns) {
      store_line<N, I4>(codes + column, kept, 8, position, value);
    } else {
      store_line<N, I4>(codes + column, kept, 4, position, value);  // half a line of 1:4
    }
  }
}

// For each mask of a window, of which the first places may be taken, the place of its slot: the first that is
// kept, so that none waits longer than it can, else the first that is free.
struct WindowTable {
  uint8_t places[3][16];

  constexpr WindowTable() : places{} {
    for (unsigned free = 0; free < 3; ++free) {
      for (unsigned mask = 0; mask < 16; ++mask) {
        unsigned place = free;
        while (place < kQuad && (mask >> place & 1) == 0) {
          ++place;
        }
        places[free][mask] = static_cast<uint8_t>(place < kQuad ? place : free);
      }
    }
  }
};
constexpr WindowTable kWindows;

// A line has the eight slots of 16 columns, whose windows begin one column before them and end one behind.
template <bool I4>
void store_windows(const TileShape &shape, size_t row, const uint8_t *codes, const uint64_t *words,
                   uint8_t *positions, uint8_t *values) {
  constexpr size_t kSlots = 8;
  const RowQuads quads(shape, row);
  unsigned free = 1;  // the first place of the first window lies before the row
  for (size_t column = 0, step = 0; column < shape.columns; column += kTile, step += 4) {
    const size_t at = column % 64;
    const uint64_t *word = words + column / 64;
    uint64_t kept = at != 0 ? *word >> (at - 1) : *word << 1 | (column != 0 ? word[-1] >> 63 : 0);
    if (at + kTile == 64 && column + kTile < shape.columns) {
      kept |= (word[1] & 1) << (kTile + 1);
    }
    Line line;
    for (size_t slot = 0; slot < kSlots; ++slot) {
      const unsigned place = kWindows.places[free][kept >> 2 * slot & 15];
      line.set(slot, place, codes[column + 2 * slot + place - 1]);
      free = place > 1 ? place - 1 : 0;
    }
    line.store<I4>(kSlots, positions + quads.position(step), values + quads.value(step));
  }
}

void store_quads(const TileShape &shape, size_t row, const uint8_t *codes, const uint64_t *words,
                 uint8_t *positions, uint8_t *values) {
  const auto store = shape.sliding  ? (shape.i4 ? store_windows<true> : store_windows<false>)
                     : shape.n == 1 ? (shape.i4 ? store_lines<1, true> : store_lines<1, false>)
                                    : (shape.i4 ? store_lines<2, true> : store_lines<2, false>);
  store(shape, row, codes, words, positions, values);
}

void load_quads(const TileShape &shape, size_t row, const uint8_t *positions, const uint8_t *values,
                uint8_t *codes) {
  const RowQuads quads(shape, row);
  for (size_t slot = 0; slot < shape.columns / kQuad * shape.n; ++slot) {
    const size_t step = slot / 2;
    const unsigned at = positions[quads.position(step) + slot % 2] >> step % 4 * 2 & 3;
    const unsigned value = values[quads.value(step) + slot % 2];
    const size_t first = shape.sliding ? 2 * slot - 1 : slot / shape.n * kQuad;
    codes[first + at] = static_cast<uint8_t>(shape.i4 ? value >> step % 2 * 4 & 15 : value);
  }
}

}  // namespace

TileShape find_tiles(const Mask &mask, bool i4, bool exact) {
  TileShape wide = {mask.rows, mask.columns, 0, kTile, i4, false},
            quads = {mask.rows, mask.columns, 0, kQuad, i4, false};
  if (mask.rows % kTile != 0 || mask.columns % kTile != 0) {
    return wide;
  }
  unsigned most = 0;
  uint64_t two = 0, three = 0;  // bits where a quad keeps at least so many
  for (const uint64_t word : mask.words) {
    const uint64_t fours = count_runs(word, 4), sixteens = count_runs(word, 16);
    two |= fours & 0x6666666666666666u;
    three |= (fours & 0x4444444444444444u) | (fours & fours >> 1 & 0x1111111111111111u);
    for (unsigned at = 0; at < 64; at += kTile) {
      most = std::max(most, static_cast<unsigned>(sixteens >> at & 31));
    }
  }
  const size_t most_of_quad = three != 0 ? 3 : two != 0 ? 2 : most != 0 ? 1 : 0;
  const auto holds = [&](size_t n, size_t m) {
    return !exact || keeps(mask, {static_cast<unsigned>(n), static_cast<unsigned>(m)});
  };
  wide.n = most < kTile && holds(most, kTile) ? most : 0;
  quads.n = most_of_quad <= 2 && holds(most_of_quad, kQuad) ? most_of_quad : 0;
  if (quads.n == 0) {
    const TileShape windows = {mask.rows, mask.columns, 2, kQuad, i4, true};
    const bool smaller = wide.n == 0 || windows.bytes() <= wide.bytes();
    return most != 0 && smaller && slides(mask, exact) ? windows : wide;
  }
  return quads.bytes() <= wide.bytes() ? quads : wide;
}

void clear_tile(const TileShape &shape, size_t tile, uint8_t *positions, uint8_t *values) {
  const size_t tiles = shape.tiles();
  std::memset(values + tile * (shape.values() / tiles), 0, shape.values() / tiles);
  std::memset(positions + tile * (shape.positions() / tiles), 0, shape.positions() / tiles);
}

void store_tile_row(const TileShape &shape, size_t row, const uint8_t *codes, const uint64_t *words,
                    uint8_t *positions, uint8_t *values) {
  (shape.quads() ? store_quads : store_groups)(shape, row, codes, words, positions, values);
}

void load_tile_row(const TileShape &shape, size_t row, const uint8_t *positions, const uint8_t *values,
                   uint8_t *codes) {
  (shape.quads() ? load_quads : load_groups)(shape, row, positions, values, codes);
}

}  // namespace losa::format
