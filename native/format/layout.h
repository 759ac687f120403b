// Internal view of a checked tensor: how the positions and values of one row are found.
#ifndef LOSA_LAYOUT_H
#define LOSA_LAYOUT_H

#include <cstring>

#include "format/sizes.h"
#include "losa/kernels.h"

// Every function here is static and every class local to the file that includes it: files are compiled for
// different instruction sets, and the linker must not put the AVX2 copy of a function into the scalar target.

namespace losa {

constexpr size_t kBlock = 64;     // positions of one mask word: a kernel's step
constexpr size_t kPadding = 128;  // prepared activations and expanded rows are padded to this many positions

static inline size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }
static inline bool is_integer(const losa_parts &p) { return p.value_type >= LOSA_I8; }
// Codes of a few bits: a table of levels, and a scale per group of positions.
static inline bool is_grouped(const losa_parts &p) { return p.value_type >= LOSA_I4; }

// Positions that share one activation scale: the groups of the weight, or a block where it has row scales.
static inline size_t activation_group(const losa_parts &p) { return is_grouped(p) ? p.group_size : kBlock; }

// Rows in tiles of 16.
static inline bool in_tiles(const losa_parts &p) {
  return p.layout == LOSA_TILED || p.layout == LOSA_SLIDING;
}
// ... whose slots have positions of two bits, in lines.
static inline bool in_lines(const losa_parts &p) { return in_tiles(p) && p.m != kTile; }

static inline size_t value_bytes(uint8_t type) { return type == LOSA_F32 ? 4 : type == LOSA_F16 ? 2 : 1; }

// Dense rows: `n` codes, at most a block of 128, take so many bytes in each plane.
static inline size_t plane_bytes(size_t n, size_t bits) { return (n * bits + 7) / 8; }

// Both planes of a block of i3, of a row of n codes, and the lower plane of a block whose planes take
// `bytes`.
constexpr size_t kPlaneBytes = kPadding / 8 * 3;
static inline size_t planes_row_bytes(size_t n) {
  const size_t rest = n % kPadding;
  return (n - rest) / 8 * 3 + plane_bytes(rest, 2) + plane_bytes(rest, 1);
}
static inline size_t quarter_of(size_t bytes) { return bytes * 2 / 3; }

// LOSA_BITMASK: the rows 2 i and 2 i + 1 share a mask, which is stored once.
static inline bool in_pairs(const losa_parts &p) { return p.layout == LOSA_BITMASK && p.n == 2; }
// Masks, or other lines of positions, of so many rows.
static inline size_t mask_lines(const losa_parts &p) {
  return in_pairs(p) ? (p.rows + size_t{1}) / 2 : p.rows;
}

// I3 in such pairs: bytes of both rows, which keep n codes each, in blocks of 64 codes of the even row and 64
// of the odd one. Those of the last block are filled up to a multiple of four.
static inline size_t planes_pair_bytes(size_t n) { return planes_row_bytes(2 * round_up(n, 4)); }

// True where the values of two rows lie together: in the nibbles of bytes, or as such a pair.
static inline bool shares_values(const losa_parts &p) {
  return p.value_type == LOSA_I4 || (p.value_type == LOSA_I3 && in_pairs(p));
}

static inline size_t dense_row_bytes(const losa_parts &p) {
  switch (p.value_type) {
    case LOSA_I4:
      return (p.columns + size_t{1}) / 2;
    case LOSA_I3:
      return planes_row_bytes(p.columns);
    default:
      return p.columns * value_bytes(p.value_type);
  }
}

// A stream of so many bytes with its padding.
static inline uint64_t stream_bytes(uint64_t raw) {
  return (raw + LOSA_ALIGNMENT - 1) / LOSA_ALIGNMENT * LOSA_ALIGNMENT + LOSA_STREAM_SLACK;
}

// N:M: groups and values of a row.
static inline size_t group_count(const losa_parts &p) { return (p.columns + p.m - 1u) / p.m; }
static inline size_t slots_per_row(const losa_parts &p) { return group_count(p) * p.n; }

// N:M: how far the values of rows, of i4 of pairs of rows, are apart: in values, of i4 and i3 in bytes.
static inline size_t slot_stride(const losa_parts &p) {
  return p.value_type == LOSA_I3 ? planes_row_bytes(slots_per_row(p)) : slots_per_row(p);
}

// Positions of a row: the last group of N:M may reach beyond the columns.
static inline size_t row_width(const losa_parts &p) {
  return p.layout == LOSA_NM ? group_count(p) * p.m : p.columns;
}
static inline size_t padded_columns(const losa_parts &p) { return round_up(row_width(p), kPadding); }

// Bytes of positions per block of 64, and per row.
static inline size_t position_bytes_per_block(const losa_parts &p) {
  return p.layout == LOSA_NM && p.position_bits ? kBlock / p.m * p.n * p.position_bits / 8 : kBlock / 8;
}
static inline size_t position_row_bytes(const losa_parts &p) {
  return (row_width(p) + kBlock - 1) / kBlock * position_bytes_per_block(p);
}

// True if every block of 64 positions keeps the same count, so that a kernel need not count bits.
static inline bool fixed_count(const losa_parts &p) { return p.layout == LOSA_NM && kBlock % p.m == 0; }

// First value of a row: an index into values, or for i4 the first byte of the row's pair, for i3 that of the
// row, or of a pair that shares a mask.
static inline size_t row_start(const losa_tensor &t, size_t row) {
  const losa_parts &p = t.parts;
  const size_t line = shares_values(p) ? row / 2 : row;
  return p.layout == LOSA_NM ? slot_stride(p) * line : t.starts[line];
}

// I3: bytes of a row of a stream, or of a pair that shares a mask.
static inline size_t stream_row_bytes(const losa_tensor &t, size_t row) {
  const size_t line = shares_values(t.parts) ? row / 2 : row;
  return t.parts.layout == LOSA_NM ? slot_stride(t.parts) : t.starts[line + 1] - t.starts[line];
}

static inline uint64_t load_word(const uint8_t *bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

// Mask word of 64 positions from the codes of N:M: `groups` groups are used, the rest is zero.
static inline uint64_t word_of_codes(const uint8_t *codes, unsigned n, unsigned m, unsigned bits,
                                     size_t groups) {
  uint64_t word = 0;
  unsigned at = 0;
  for (size_t g = 0; g < groups; ++g) {
    for (unsigned k = 0; k < n; ++k, at += bits) {
      const unsigned code = (codes[at / 8] >> (at % 8)) & ((1u << bits) - 1u);
      word |= uint64_t{1} << (g * m + code);
    }
  }
  return word;
}

// For patterns whose code byte describes 16 positions (1:2, 1:4, 1:8, 2:16): code byte -> mask bits.
struct CodeTable {
  uint16_t mask[256];

  constexpr CodeTable(unsigned n, unsigned m, unsigned bits) : mask{} {
    for (unsigned byte = 0; byte < 256; ++byte) {
      unsigned at = 0, word = 0;
      for (unsigned g = 0; g < 16 / m; ++g) {
        for (unsigned k = 0; k < n; ++k, at += bits) {
          word |= 1u << (g * m + (((byte >> at) & ((1u << bits) - 1u)) % m));
        }
      }
      mask[byte] = static_cast<uint16_t>(word);
    }
  }
};
inline constexpr CodeTable kOneOfTwo(1, 2, 1), kOneOfFour(1, 4, 2), kOneOfEight(1, 8, 4),
    kTwoOfSixteen(2, 16, 4);

static inline const CodeTable *code_table(unsigned n, unsigned m, unsigned bits) {
  if (bits == 0) {
    return nullptr;
  }
  return n == 1 && m == 2    ? &kOneOfTwo
         : n == 1 && m == 4  ? &kOneOfFour
         : n == 1 && m == 8  ? &kOneOfEight
         : n == 2 && m == 16 ? &kTwoOfSixteen
                             : nullptr;
}

namespace {

// The mask words of one row, in whichever form they are stored.
struct Positions {
  const uint8_t *bytes;
  size_t step;    // bytes per block
  size_t blocks;  // blocks of 64 positions
  size_t groups;  // groups of the whole row (codes only)
  unsigned n, m, bits;
  const CodeTable *table;

  Positions() = default;  // of a layout without positions
  Positions(const losa_parts &p, size_t row)
      : bytes(static_cast<const uint8_t *>(p.positions.data) +
              (in_pairs(p) ? row / 2 : row) * position_row_bytes(p)),
        step(position_bytes_per_block(p)),
        blocks(position_row_bytes(p) / step),
        groups(p.layout == LOSA_NM ? group_count(p) : 0),
        n(p.n),
        m(p.m),
        bits(p.layout == LOSA_NM ? p.position_bits : 0),
        table(code_table(n, m, bits)) {}

  uint64_t word(size_t block) const { return word_at(bytes, block); }

  // Of a row like this one that begins at `row`.
  uint64_t word_at(const uint8_t *row, size_t block) const {
    return bits == 0 ? load_word(row + block * 8) : word_from_codes(row, block);
  }

 private:
  // By itself, because inlined it takes registers from loops that mostly read masks.
  __attribute__((noinline)) uint64_t word_from_codes(const uint8_t *row, size_t block) const {
    const size_t per_block = kBlock / m, left = groups - block * per_block;
    const uint8_t *codes = row + block * step;
    if (table == nullptr || left < per_block) {
      return word_of_codes(codes, n, m, bits, left < per_block ? left : per_block);
    }
    return table->mask[codes[0]] | uint64_t{table->mask[codes[1]]} << 16 |
           uint64_t{table->mask[codes[2]]} << 32 | uint64_t{table->mask[codes[3]]} << 48;
  }
};

}  // namespace

constexpr size_t kSlack = 32;  // bytes behind prepared activations

// Prepared activations. Integer weights: scales f32 and biases int32 [tokens, groups], a bias being -128 *
// the sum of the group: what a kernel adds that multiplies by levels + 128; then at a multiple of 64 bytes
// int8 [tokens, padded]. There is something to read before the int8 and behind: eight scales are read at
// once, and sliding windows begin one position before their row and end one behind it. Float weights: f32
// [tokens, padded].
struct Activations {
  const int8_t *q;
  const float *scale;
  const int32_t *bias;
  const float *x;
  size_t padded, groups, tokens;
};

static inline size_t scale_bytes(size_t tokens, size_t groups) {
  return round_up(tokens * groups * (sizeof(float) + sizeof(int32_t)), kBlock);
}

static inline Activations activations_in(const losa_tensor &t, const void *memory, size_t tokens) {
  const size_t padded = padded_columns(t.parts), groups = padded / activation_group(t.parts);
  const auto *scale = static_cast<const float *>(memory);
  const auto *bias = reinterpret_cast<const int32_t *>(scale + tokens * groups);
  const auto *q = static_cast<const int8_t *>(memory) + scale_bytes(tokens, groups);
  return {q, scale, bias, static_cast<const float *>(memory), padded, groups, tokens};
}

// Codes of a block of n positions of a dense i3 row: its lower bits, then its highest.
static inline void split_planes(const uint8_t *bytes, size_t n, uint8_t *codes) {
  const size_t quarter = plane_bytes(n, 2), eighth = plane_bytes(n, 1);
  for (size_t i = 0; i < n; ++i) {
    const unsigned low = bytes[i % quarter] >> i / quarter * 2 & 3u;
    const unsigned high = bytes[quarter + i % eighth] >> i / eighth & 1u;
    codes[i] = static_cast<uint8_t>(low | high << 2);
  }
}

// I3: code number k of a row of a stream that takes so many bytes.
static inline unsigned kept_code(const uint8_t *row, size_t bytes, size_t k) {
  const size_t start = k / kPadding * kPlaneBytes, i = k % kPadding, left = bytes - start;
  const size_t quarter = quarter_of(left < kPlaneBytes ? left : kPlaneBytes), eighth = (quarter + 1) / 2;
  const unsigned low = row[start + i % quarter] >> i / quarter * 2 & 3u;
  return low | (row[start + quarter + i % eighth] >> i / eighth & 1u) << 2;
}

// The same of a pair of rows that takes so many bytes: code number k of one of them.
static inline unsigned kept_code_of_pair(const uint8_t *pair, size_t bytes, size_t k, bool odd) {
  constexpr size_t kHalf = kPadding / 2;
  const size_t start = k / kHalf, left = bytes - start * kPlaneBytes;
  const size_t half = left < kPlaneBytes ? left * 4 / 3 : kHalf;
  return kept_code(pair, bytes, start * kPadding + (odd ? half : 0) + k % kHalf);
}

static inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 1023u;
  uint32_t bits;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in float
    const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  } else {
    bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (fraction << 13);
  }
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

static inline float load_scale(const losa_parts &p, size_t index) {
  if (p.scale_type == LOSA_SCALE_F32) {
    float value;
    std::memcpy(&value, static_cast<const uint8_t *>(p.scale.data) + index * 4, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, static_cast<const uint8_t *>(p.scale.data) + index * 2, 2);
  return half_to_float(half);
}

// Codes of the last block of a dense i4 row, n < 128 positions split in halves of their own.
static inline void split_dense_tail(const uint8_t *bytes, size_t n, uint8_t *codes) {
  const size_t half = (n + 1) / 2;
  for (size_t j = 0; j < half; ++j) {
    codes[j] = bytes[j] & 15;
    if (half + j < n) {
      codes[half + j] = bytes[j] >> 4;
    }
  }
}

// Largest magnitude among the levels of an i4 table.
static inline int widest_level(const losa_parts &p) {
  int widest = 0;
  for (int i = 0; i < 16; ++i) {
    const int level = static_cast<const int8_t *>(p.table.data)[i];
    widest = level > widest ? level : -level > widest ? -level : widest;
  }
  return widest;
}

static inline size_t weight_groups(const losa_parts &p) {
  return (p.columns + p.group_size - 1u) / p.group_size;
}

// Where the scale of a group of an i4 row is stored.
static inline size_t scale_index(const losa_parts &p, size_t row, size_t group) {
  return in_tiles(p) ? (row / kTile * weight_groups(p) + group) * kTile + row % kTile
                     : row * weight_groups(p) + group;
}

namespace {

// Where the rows of a tensor are found, computed once: a row of a small model takes no longer than that does.
struct RowPlaces {
  explicit RowPlaces(const losa_tensor &t)
      : values(static_cast<const uint8_t *>(t.parts.values.data)),
        starts(t.starts),
        columns(t.parts.columns),
        slots(t.parts.layout == LOSA_NM ? slot_stride(t.parts) : 0),
        mask_shift(in_pairs(t.parts) ? 1 : 0) {
    if (t.parts.layout != LOSA_DENSE) {
      first_positions = Positions(t.parts, 0);
      position_bytes = position_row_bytes(t.parts);
    }
  }

  const uint8_t *position_row(size_t row) const {
    return first_positions.bytes + (row >> mask_shift) * position_bytes;
  }

  Positions positions_of(size_t row) const {
    Positions found = first_positions;
    found.bytes = position_row(row);
    return found;
  }

  // First value of a row; two rows may share their bytes.
  size_t start(size_t row, bool shared) const {
    const size_t line = shared ? row / 2 : row;
    return slots ? slots * line : starts[line];
  }

  // I3: of a row of a stream, or of those that share bytes.
  size_t bytes_of(size_t row, bool shared) const {
    const size_t line = shared ? row / 2 : row;
    return slots ? slots : starts[line + 1] - starts[line];
  }

  const uint8_t *values;
  const uint64_t *starts;
  size_t columns, slots, position_bytes = 0;
  unsigned mask_shift;  // 1 where two rows share a mask
  Positions first_positions;
};

// LOSA_TILED: a step holds two slots of each row of a tile. Bytes 4 i + 2 h and the next belong to row
// 8 h + i, so that sums of neighbours, even and odd ones apart, are rows in their order.
// N:16: a step is 32 bytes of values; of i4, positions are in their low nibbles, of i8 beside them.
// 1:4 and 2:4: the steps of a tile form one sequence, of which a line of 32 bytes holds the positions of
// four; of i4 one has the codes of two, of i3 lines of lower bits those of four, then one the highest of
// eight. LOSA_SLIDING: as 2:4, but a position is one of the window that its slot has.
struct Tiles {
  explicit Tiles(const losa_parts &p)
      : values(static_cast<const uint8_t *>(p.values.data)),
        positions(static_cast<const uint8_t *>(p.positions.data)),
        groups(p.columns / kTile),
        steps(p.layout == LOSA_SLIDING ? 4u
              : p.m == kQuad           ? 2u * p.n
                                       : (p.n + 1u) / 2u),
        type(p.value_type),
        lined(in_lines(p)),
        per_scale(activation_group(p) / kTile) {}

  static constexpr size_t kStep = 2 * kTile, kPerLine = 4, kPerHighLine = 8;
  static constexpr size_t kExpanded = 3 * kStep;  // a step in scratch memory: avx2_tiles.h

  size_t all_steps() const { return groups * steps; }  // of a tile
  size_t lines() const { return (all_steps() + kPerLine - 1) / kPerLine; }
  // Of 32 bytes of values, of a tile. I3: lines() of lower bits, then high_lines().
  size_t high_lines() const { return (all_steps() + kPerHighLine - 1) / kPerHighLine; }
  size_t value_lines() const {
    return !lined || type == LOSA_I8 ? all_steps()
           : type == LOSA_I4         ? all_steps() / 2
                                     : lines() + high_lines();
  }

  const uint8_t *values, *positions;
  size_t groups, steps;  // groups of 16 positions of a row, steps of a group
  uint8_t type;
  bool lined;
  size_t per_scale;  // groups that share a scale of the activations
};

}  // namespace

}  // namespace losa

#endif
