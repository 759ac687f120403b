// Rows of levels in NEON, one or a pair that shares a mask, 64 positions at a time. There is no expand
// instruction: a mask byte selects one of 256 byte shuffles, as on AVX2.
#ifndef LOSA_NEON_ROWS_H
#define LOSA_NEON_ROWS_H

#include <arm_neon.h>

#include "kernels/arm/neon_tiles.h"
#include "kernels/planes.h"
#include "kernels/shuffle_table.h"
#include "kernels/tag.h"

namespace losa {
namespace {

struct Block {
  int8x16_t part[4];  // 64 positions
};

inline uint8x8_t shuffle_of(unsigned mask) { return vcreate_u8(kShuffle.control[mask & 255]); }

inline uint8x8_t place(unsigned mask, const uint8_t *p) { return vtbl1_u8(vld1_u8(p), shuffle_of(mask)); }

// `Rows` blocks at the same positions.
template <size_t Rows>
struct Blocks {
  Block row[Rows];
};

// Bytes of the streams at `p`, which are `distance` apart, to the positions of `word`; `used` bytes were
// taken of each. What the mask says is looked up once for all.
template <size_t Rows>
inline Blocks<Rows> scatter(uint64_t word, const uint8_t *p, size_t distance, unsigned *used) {
  const uint64_t counts = vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(word))), 0);
  const uint64_t sums = counts * 0x0101010101010101u, before = sums << 8;
  *used = static_cast<unsigned>(sums >> 56);
  Blocks<Rows> out;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned low = 16 * i, high = 16 * i + 8;
    const uint8x8_t first = shuffle_of(static_cast<unsigned>(word >> low)),
                    second = shuffle_of(static_cast<unsigned>(word >> high));
    const uint8_t *from_low = p + (before >> low & 255), *from_high = p + (before >> high & 255);
    for (size_t r = 0; r < Rows; ++r) {
      const size_t at = r * distance;
      out.row[r].part[i] = vreinterpretq_s8_u8(
          vcombine_u8(vtbl1_u8(vld1_u8(from_low + at), first), vtbl1_u8(vld1_u8(from_high + at), second)));
    }
  }
  return out;
}

// The same count in every byte of the mask: the addresses do not wait for it.
inline Block scatter_fixed(uint64_t word, const uint8_t *p, unsigned count) {
  Block out;
  for (unsigned i = 0; i < 4; ++i) {
    const auto low = static_cast<unsigned>(word >> (16 * i));
    out.part[i] = vreinterpretq_s8_u8(
        vcombine_u8(place(low, p + 2 * i * count), place(low >> 8, p + (2 * i + 1) * count)));
  }
  return out;
}

inline unsigned count_per_byte(const losa_parts &p) {
  return p.layout == LOSA_NM && 8 % p.m == 0 ? 8u / p.m * p.n : 0;
}

inline int8x16_t table_of(const losa_parts &p) { return vld1q_s8(static_cast<const int8_t *>(p.table.data)); }

inline int8x16_t nibbles(int8x16_t bytes, bool high, int8x16_t levels) {
  const uint8x16_t raw = vreinterpretq_u8_s8(bytes);
  return vqtbl1q_s8(levels, high ? vshrq_n_u8(raw, 4) : vandq_u8(raw, vdupq_n_u8(15)));
}

inline Block levels_of(Block bytes, bool high, int8x16_t levels) {
  for (auto &part : bytes.part) {
    part = nibbles(part, high, levels);
  }
  return bytes;
}

// The codes number 16 i to 16 i + 15 of 128 of a dense i3 row: 32 bytes of lower bits, 16 of the highest.
inline uint8x16_t codes_of_planes(const uint8_t *bytes, size_t i) {
  return join_planes(vld1q_u8(bytes + i % 2 * 16), i / 2, vld1q_u8(bytes + 32), i);
}

inline void unpack_block(const uint8_t *planes, uint8_t *codes) {
  for (size_t i = 0; i < kPadding / 16; ++i) {
    vst1q_u8(codes + 16 * i, codes_of_planes(planes, i));
  }
}

// One row of any layout, which shares no mask, as levels, 64 positions at a time.
class Row {
 public:
  static constexpr size_t kRows = 1;

  Row(const losa_tensor &t, size_t row)
      : parts_(t.parts),
        dense_(t.parts.layout == LOSA_DENSE),
        grouped_(is_grouped(t.parts)),
        planes_(!dense_ && t.parts.value_type == LOSA_I3),
        high_(row % 2 != 0 && !planes_),
        count_(count_per_byte(t.parts)),
        positions_(dense_ ? Positions() : Positions(t.parts, row)),
        at_(static_cast<const uint8_t *>(t.parts.values.data) +
            (dense_ ? row * dense_row_bytes(t.parts) : row_start(t, row))),
        kept_(at_, planes_ ? stream_row_bytes(t, row) : 0),
        levels_(grouped_ ? table_of(t.parts) : vdupq_n_s8(0)) {}

  Blocks<1> next(size_t block) {
    if (dense_) {
      return {grouped_ ? dense_codes(block * kBlock) : dense_levels(block * kBlock)};
    }
    const uint64_t word = positions_.word(block);
    unsigned used = 8 * count_;
    const uint8_t *from = planes_ ? kept_.next() : at_;
    Block found = count_ ? scatter_fixed(word, from, count_) : scatter<1>(word, from, 0, &used).row[0];
    at_ += used;
    kept_.take(used);
    return {grouped_ ? levels_of(found, high_, levels_) : found};
  }

 private:
  static Block load(const uint8_t *p) {
    const auto *levels = reinterpret_cast<const int8_t *>(p);
    return {{vld1q_s8(levels), vld1q_s8(levels + 16), vld1q_s8(levels + 32), vld1q_s8(levels + 48)}};
  }

  Block dense_levels(size_t start) const {
    if (start + kBlock <= parts_.columns) {
      return load(at_ + start);
    }
    uint8_t copy[kBlock] = {};
    std::memcpy(copy, at_ + start, parts_.columns - start);
    return load(copy);
  }

  Block dense_codes(size_t start) const {
    const bool planes = parts_.value_type == LOSA_I3;
    const size_t first = start / kPadding * kPadding, left = parts_.columns - first;
    const uint8_t *bytes = at_ + (planes ? first / 8 * 3 : first / 2);
    Block found;
    if (left < kPadding) {
      uint8_t codes[kPadding] = {};
      (planes ? split_planes : split_dense_tail)(bytes, left, codes);
      found = levels_of(load(codes + (start - first)), false, levels_);
    } else if (planes) {
      for (size_t i = 0; i < 4; ++i) {
        found.part[i] = vqtbl1q_s8(levels_, codes_of_planes(bytes, (start - first) / 16 + i));
      }
    } else {
      found = levels_of(load(bytes), start != first, levels_);
    }
    return found;
  }

  const losa_parts &parts_;
  bool dense_, grouped_, planes_, high_;
  unsigned count_;
  Positions positions_;
  const uint8_t *at_;
  KeptCodes<unpack_block, 4> kept_;  // of i3, which has no use for at_
  int8x16_t levels_;
};

// Two rows that share a mask, or the last one twice: levels of i8 row by row, codes of others as nibbles of
// bytes.
template <losa_value_type Type>
class PairOfRows {
 public:
  static constexpr size_t kRows = 2;

  PairOfRows(const losa_tensor &t, size_t row)
      : positions_(t.parts, row),
        at_(static_cast<const uint8_t *>(t.parts.values.data) + row_start(t, row)),
        odd_(Type == LOSA_I8 && row + 1 < t.parts.rows ? row_start(t, row + 1) - row_start(t, row) : 0),
        kept_(at_, Type == LOSA_I3 ? stream_row_bytes(t, row) : 0),
        levels_(Type == LOSA_I8 ? vdupq_n_s8(0) : table_of(t.parts)) {}

  Blocks<2> next(size_t block) {
    const uint64_t word = positions_.word(block);
    unsigned used;
    if constexpr (Type == LOSA_I8) {
      const Blocks<2> found = scatter<2>(word, at_, odd_, &used);
      at_ += used;
      return found;
    }
    const Block bytes = scatter<1>(word, Type == LOSA_I3 ? kept_.next() : at_, 0, &used).row[0];
    at_ += used;
    kept_.take(used);
    return {levels_of(bytes, false, levels_), levels_of(bytes, true, levels_)};
  }

 private:
  Positions positions_;
  const uint8_t *at_;
  size_t odd_;                            // of i8, from the even row to the odd one
  KeptPairs<unpack_pair_block, 4> kept_;  // of i3, which has no use for at_
  int8x16_t levels_;
};

// Calls use(tag) with a tag of the class that reads the rows of an integer tensor.
template <typename Use>
void with_rows(const losa_parts &p, Use use) {
  if (!in_pairs(p)) {
    use(Tag<Row>());
  } else if (p.value_type == LOSA_I8) {
    use(Tag<PairOfRows<LOSA_I8>>());
  } else if (p.value_type == LOSA_I4) {
    use(Tag<PairOfRows<LOSA_I4>>());
  } else {
    use(Tag<PairOfRows<LOSA_I3>>());
  }
}

}  // namespace
}  // namespace losa

#endif
