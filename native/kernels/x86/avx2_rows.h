// One row of levels in AVX2, sparse or dense, 64 positions at a time, and its scales.
#ifndef LOSA_AVX2_ROWS_H
#define LOSA_AVX2_ROWS_H

#include "kernels/planes.h"
#include "kernels/tag.h"
#include "kernels/x86/avx2_shuffle.h"
#include "kernels/x86/prefetch.h"

namespace losa {
namespace {

// What the rows of a tensor share.
struct Matrix : RowPlaces {
  explicit Matrix(const losa_tensor &t)
      : RowPlaces(t),
        groups(is_grouped(t.parts) ? weight_groups(t.parts) : 0),
        row_bytes(t.parts.layout == LOSA_DENSE ? dense_row_bytes(t.parts) : 0),
        shuffles(code_shuffles(t.parts)),
        count(shuffles ? 16u / t.parts.m * t.parts.n : count_per_byte(t.parts)),
        levels(is_grouped(t.parts) ? load_table(t.parts) : _mm256_setzero_si256()) {
    const __m256i second =
        _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_set1_epi8(static_cast<char>(count)), 1);
    offsets = shuffles ? second : fixed_offsets(count);
  }

  // Makes every level larger by `offset`, that of pruned positions too.
  void raise(int offset) { levels = _mm256_add_epi8(levels, _mm256_set1_epi8(static_cast<char>(offset))); }

  size_t groups;
  size_t row_bytes;  // dense
  const CodeShuffles *shuffles;
  unsigned count;  // values of a mask byte, or of a code byte, where that is the same for all
  __m256i levels, offsets;
  uint8_t *room = nullptr;  // a stream of i3: for the codes of one row, two padded rows large
};

// Levels of one sparse row, 64 positions at a time. Codes: mask bits are made from the codes of N:M. All that
// differs is known when this is compiled, because a branch in this loop is felt.
template <bool I4, bool Fixed, bool Codes>
class SparseRow {
 public:
  static constexpr bool kGrouped = I4;

  SparseRow(const Matrix &m, size_t row)
      : positions_(m.positions_of(row)),
        mask_(positions_.bytes),
        at_(m.values + m.start(row, I4)),
        count_(m.count),
        offsets_(m.offsets),
        shift_(row % 2 ? 4 : 0),
        levels_(m.levels) {}

  size_t blocks() const { return positions_.blocks; }

  inline LOSA_ALWAYS_INLINE Block next(size_t block) {
    const uint8_t *mask = mask_;
    mask_ += 8;
    fetch_ahead(mask);
    fetch_ahead(at_);
    uint64_t word;
    if (Codes) {
      word = positions_.word(block);
      mask = reinterpret_cast<const uint8_t *>(&word);
    }
    Block found;
    if (Fixed) {
      found = scatter_fixed(mask, at_, count_, offsets_);
      at_ += 8 * count_;
    } else {
      unsigned used;
      found = scatter(mask, at_, &used);
      at_ += used;
    }
    return I4 ? Block{nibbles(found.low, shift_, levels_), nibbles(found.high, shift_, levels_)} : found;
  }

 private:
  Positions positions_;
  const uint8_t *mask_;
  const uint8_t *at_;
  unsigned count_;
  __m256i offsets_;
  int shift_;
  __m256i levels_;
};

// Levels of one row of a pattern whose code byte describes 16 positions. Behind the last group it finds
// values of the next row, or zeros: activations are zero there.
template <bool I4>
class CodesRow {
 public:
  static constexpr bool kGrouped = I4;

  CodesRow(const Matrix &m, size_t row)
      : positions_(m.positions_of(row)),
        at_(m.values + m.start(row, I4)),
        shuffles_(*m.shuffles),
        slots_(m.count),
        offsets_(m.offsets),
        shift_(row % 2 ? 4 : 0),
        levels_(m.levels) {}

  size_t blocks() const { return positions_.blocks; }

  inline LOSA_ALWAYS_INLINE Block next(size_t block) {
    const uint8_t *codes = positions_.bytes + 4 * block;
    fetch_ahead(codes);
    fetch_ahead(at_);
    const Block found = {scatter_codes(shuffles_, codes, at_, offsets_),
                         scatter_codes(shuffles_, codes + 2, at_ + 2 * slots_, offsets_)};
    at_ += 4 * slots_;
    return I4 ? Block{nibbles(found.low, shift_, levels_), nibbles(found.high, shift_, levels_)} : found;
  }

 private:
  Positions positions_;
  const uint8_t *at_;
  const CodeShuffles &shuffles_;
  size_t slots_;
  __m256i offsets_;
  int shift_;
  __m256i levels_;
};

// Levels of one dense row; the last block is copied, so that nothing behind the row is read.
template <bool I4>
class DenseRow {
 public:
  static constexpr bool kGrouped = I4;

  DenseRow(const Matrix &m, size_t row)
      : columns_(m.columns), row_(m.values + row * m.row_bytes), levels_(m.levels) {}

  size_t blocks() const { return (columns_ + kBlock - 1) / kBlock; }

  inline LOSA_ALWAYS_INLINE Block next(size_t block) {
    const size_t start = block * kBlock;
    if (I4) {
      return next_i4(start);
    }
    if (start + kBlock <= columns_) {
      fetch_ahead(row_ + start);
      return load(row_ + start);
    }
    alignas(32) uint8_t copy[kBlock] = {};
    std::memcpy(copy, row_ + start, columns_ - start);
    return load(copy);
  }

 private:
  static Block load(const uint8_t *p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 32))};
  }

  inline LOSA_ALWAYS_INLINE Block next_i4(size_t start) {
    const size_t first = start / kPadding * kPadding;
    if (first + kPadding <= columns_) {
      const int shift = start == first ? 0 : 4;
      const Block bytes = load(row_ + first / 2);
      return {nibbles(bytes.low, shift, levels_), nibbles(bytes.high, shift, levels_)};
    }
    alignas(32) uint8_t codes[kPadding] = {};
    split_dense_tail(row_ + first / 2, columns_ - first, codes);
    const Block found = load(codes + (start - first));
    return {nibbles(found.low, 0, levels_), nibbles(found.high, 0, levels_)};
  }

  size_t columns_;
  const uint8_t *row_;
  __m256i levels_;
};

// 128 codes of i3 as 64 bytes: 32 bytes of lower bits, 16 of the highest. Code number i < 64 is in the low
// nibble of byte i, the one 64 behind it in the high nibble.
inline LOSA_ALWAYS_INLINE void split_nibbles(const uint8_t *bytes, __m256i codes[2]) {
  const __m256i lower = _mm256_set1_epi8(0x33), highest = _mm256_set1_epi8(0x44);
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes));
  const __m256i high =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes + 32)));
  // Bit 2 k of a byte belongs to codes[k]; of the upper half it was bit 2 k + 1.
  const __m256i bits = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  const auto pair = [&](__m256i two, __m256i top) {
    return _mm256_or_si256(_mm256_and_si256(two, lower), _mm256_and_si256(top, highest));
  };
  codes[0] = pair(low, _mm256_slli_epi16(bits, 2));
  codes[1] = pair(_mm256_srli_epi16(low, 2), bits);
}

// Codes of 128 positions of a dense i3 row, 32 in each. They are indices of a byte shuffle, which looks at
// the low nibble and at bit 7, and nothing else: what bits 4 to 6 hold is left there.
inline LOSA_ALWAYS_INLINE void split_run(const uint8_t *bytes, __m256i codes[4]) {
  split_nibbles(bytes, codes);
  codes[2] = _mm256_srli_epi16(codes[0], 4);
  codes[3] = _mm256_srli_epi16(codes[1], 4);
}

// Levels of one dense i3 row, a run of 128 positions after the other; blocks come in their order.
class DenseRowOfPlanes {
 public:
  static constexpr bool kGrouped = true;

  DenseRowOfPlanes(const Matrix &m, size_t row)
      : columns_(m.columns), row_(m.values + row * m.row_bytes), levels_(m.levels) {}

  size_t blocks() const { return (columns_ + kBlock - 1) / kBlock; }

  inline LOSA_ALWAYS_INLINE Block next(size_t block) {
    const size_t start = block * kBlock, first = start / kPadding * kPadding;
    if (start == first) {
      load_run(first);
    }
    const size_t half = start == first ? 0 : 2;
    return {_mm256_shuffle_epi8(levels_, codes_[half]), _mm256_shuffle_epi8(levels_, codes_[half + 1])};
  }

 private:
  void load_run(size_t first) {
    const uint8_t *bytes = row_ + first / 8 * 3;
    if (first + kPadding <= columns_) {
      split_run(bytes, codes_);
      return;
    }
    const size_t left = columns_ - first;
    uint8_t copy[kPadding] = {};  // nothing behind the row is read
    std::memcpy(copy, bytes, planes_row_bytes(left));
    alignas(32) uint8_t codes[kPadding];
    ShortBlock last;
    last.start(copy, plane_bytes(left, 2));
    last.finish(codes);
    std::memcpy(codes_, codes, sizeof codes_);
  }

  size_t columns_;
  const uint8_t *row_;
  __m256i levels_, codes_[4] = {};
};

// Stored one by one: GCC copies an array of registers in pieces.
inline void unpack_run(const uint8_t *planes, uint8_t *codes) {
  __m256i found[4];
  fetch_ahead(planes);
  split_run(planes, found);
  for (size_t i = 0; i < 4; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes + 32 * i), found[i]);
  }
}

// By itself: what it needs takes no registers from loops over blocks.
__attribute__((noinline)) inline void unpack_row(const uint8_t *planes, size_t bytes, uint8_t *codes) {
  ShortBlock last;
  const size_t whole = bytes / kPlaneBytes, rest = bytes % kPlaneBytes;
  if (rest != 0) {
    last.start(planes + whole * kPlaneBytes, quarter_of(rest));
  }
  for (size_t i = 0; i < whole; ++i) {
    unpack_run(planes + i * kPlaneBytes, codes + i * kPadding);
  }
  if (rest != 0) {
    last.finish(codes + whole * kPadding);
  }
}

// Levels of one sparse i3 row: its codes are unpacked, placed, and then looked up as those of a dense one.
template <bool Codes>
class SparseRowOfPlanes {
 public:
  static constexpr bool kGrouped = true;

  SparseRowOfPlanes(const Matrix &m, size_t row)
      : positions_(m.positions_of(row)), at_(m.room), levels_(m.levels) {
    unpack_row(m.values + m.start(row, false), m.bytes_of(row, false), m.room);
  }

  size_t blocks() const { return positions_.blocks; }

  inline LOSA_ALWAYS_INLINE Block next(size_t block) {
    const uint8_t *mask = positions_.bytes + block * positions_.step;
    fetch_ahead(mask);
    uint64_t word;
    if (Codes) {
      word = positions_.word(block);
      mask = reinterpret_cast<const uint8_t *>(&word);
    }
    unsigned used;
    const Block codes = scatter(mask, at_, &used);
    at_ += used;
    return {_mm256_shuffle_epi8(levels_, codes.low), _mm256_shuffle_epi8(levels_, codes.high)};
  }

 private:
  Positions positions_;
  const uint8_t *at_;
  __m256i levels_;
};

// Scales of one row of weights, per activation group.
template <bool Grouped>
class RowScales {
 public:
  RowScales(const losa_parts &p, size_t row, size_t groups)
      : halves_(static_cast<const uint8_t *>(p.scale.data) + 2 * row * groups),
        readable_((p.scale.bytes - 2 * row * groups) / 2),
        groups_(groups),
        whole_(Grouped ? 1.0f : load_scale(p, row)) {}

  float whole() const { return whole_; }  // i8: the scale of the row; others have one per group only

  // Groups behind the last one hold no weights.
  float group(size_t g) const {
    if (!Grouped) {
      return whole_;
    }
    uint16_t half = 0;
    if (g < groups_) {
      std::memcpy(&half, halves_ + 2 * g, 2);
    }
    return _cvtsh_ss(half);
  }

  // Grouped: times the scales of a token, of eight groups from g on. What lies behind the last group means
  // nothing.
  void times(const Activations &a, size_t g, float products[8]) const {
    if (g + 8 <= readable_) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(halves_ + 2 * g));
      _mm256_store_ps(products, _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_loadu_ps(a.scale + g)));
      return;
    }
    for (size_t i = 0; i < 8; ++i) {
      products[i] = g + i < a.groups ? group(g + i) * a.scale[g + i] : 0.0f;
    }
  }

 private:
  const uint8_t *halves_;
  size_t readable_, groups_;  // scales from there to the end of the tensor, and of the row
  float whole_;
};

// Calls use(tag) with a tag of the class that reads the rows of the tensor.
template <bool I4, typename Use>
void with_reader_of(const losa_tensor &t, Use use) {
  const losa_parts &p = t.parts;
  if (p.layout == LOSA_DENSE) {
    use(Tag<DenseRow<I4>>());
  } else if (code_shuffles(p) != nullptr) {
    use(Tag<CodesRow<I4>>());
  } else if (count_per_byte(p) != 0) {
    use(Tag<SparseRow<I4, true, false>>());
  } else if (p.layout == LOSA_NM && p.position_bits != 0) {
    use(Tag<SparseRow<I4, false, true>>());
  } else {
    use(Tag<SparseRow<I4, false, false>>());
  }
}

template <typename Use>
void with_reader_of_planes(const losa_parts &p, Use use) {
  if (p.layout == LOSA_DENSE) {
    use(Tag<DenseRowOfPlanes>());
  } else if (p.layout == LOSA_NM && p.position_bits != 0) {
    use(Tag<SparseRowOfPlanes<true>>());
  } else {
    use(Tag<SparseRowOfPlanes<false>>());
  }
}

template <typename Use>
void with_reader(const losa_tensor &t, Use use) {
  if (t.parts.value_type == LOSA_I3) {
    with_reader_of_planes(t.parts, use);
    return;
  }
  t.parts.value_type == LOSA_I4 ? with_reader_of<true>(t, use) : with_reader_of<false>(t, use);
}

}  // namespace
}  // namespace losa

#endif
