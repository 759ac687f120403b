// Two rows that share a mask in AVX2: their codes are the nibbles of bytes, which are placed once for both.
#ifndef LOSA_AVX2_PAIR_ROWS_H
#define LOSA_AVX2_PAIR_ROWS_H

#include "kernels/x86/avx2_rows.h"

namespace losa {
namespace {

// Rows that are read as such pairs: all of this kind but those of i8, whose codes fill bytes.
inline bool are_nibbles(const losa_parts &p) { return in_pairs(p) && is_grouped(p); }

inline void unpack_pair_run(const uint8_t *planes, uint8_t *codes) {
  __m256i found[2];
  fetch_ahead(planes);
  split_nibbles(planes, found);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes), found[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes + 32), found[1]);
}

// By itself: what it needs takes no registers from loops over blocks.
__attribute__((noinline)) inline void unpack_pair(const uint8_t *planes, size_t bytes, uint8_t *codes) {
  ShortPair last;
  const size_t whole = bytes / kPlaneBytes, rest = bytes % kPlaneBytes;
  if (rest != 0) {
    last.start(planes + whole * kPlaneBytes, quarter_of(rest));
  }
  for (size_t i = 0; i < whole; ++i) {
    unpack_pair_run(planes + i * kPlaneBytes, codes + i * kBlock);
  }
  if (rest != 0) {
    last.finish(codes + whole * kBlock);
  }
}

// Codes of both rows, 64 positions at a time.
template <bool I4>
class PairOfRows {
 public:
  PairOfRows(const Matrix &m, size_t row)
      : mask_(m.position_row(row)), at_(I4 ? m.values + m.start(row, true) : m.room) {
    if (!I4) {
      unpack_pair(m.values + m.start(row, true), m.bytes_of(row, true), m.room);
    }
  }

  // The next block: a byte for each position.
  Block next() {
    const uint8_t *mask = mask_;
    mask_ += 8;
    fetch_ahead(mask);
    if (I4) {
      fetch_ahead(at_);
    }
    unsigned used;
    const Block found = scatter(mask, at_, &used);
    at_ += used;
    return found;
  }

  // What codes of the even row, and of the odd one, mean. Codes of i3 leave bit 7 of a byte zero, and the one
  // that a shift of words brings there: a shuffle looks at nothing else of the high nibble.
  static __m256i even(__m256i bytes, __m256i levels) {
    return I4 ? nibbles(bytes, 0, levels) : _mm256_shuffle_epi8(levels, bytes);
  }
  static __m256i odd(__m256i bytes, __m256i levels) {
    return I4 ? nibbles(bytes, 4, levels) : _mm256_shuffle_epi8(levels, _mm256_srli_epi16(bytes, 4));
  }

 private:
  const uint8_t *mask_, *at_;
};

}  // namespace
}  // namespace losa

#endif
