// Two rows that share a mask in AVX2: their codes are the nibbles of bytes, which are placed once for both.
#ifndef LOSA_AVX2_PAIR_ROWS_H
#define LOSA_AVX2_PAIR_ROWS_H

#include "kernels/x86/avx2_rows.h"

namespace losa {
namespace {

// Rows that are read as such pairs: all of this kind but those of i8, whose codes fill bytes.
inline bool are_nibbles(const losa_parts &p) { return in_pairs(p) && is_grouped(p); }

// Blocks of planes of a pair of i3, each 64 bytes. By itself: what it needs takes no registers from loops
// over blocks.
__attribute__((noinline)) inline void unpack_pairs(const uint8_t *planes, size_t count, uint8_t *codes) {
  for (; count != 0; --count, planes += kPlaneBytes, codes += kBlock) {
    __m256i found[2];
    fetch_ahead(planes);
    split_nibbles(planes, found);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes), found[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes + 32), found[1]);
  }
}

// The same of the first `count` blocks, and of the short one at the end of a pair of so many bytes.
__attribute__((noinline)) inline void begin_pair(const uint8_t *planes, size_t bytes, size_t count,
                                                 uint8_t *codes) {
  const size_t whole = bytes / kPlaneBytes, rest = bytes % kPlaneBytes;
  ShortPair last;
  if (rest != 0) {
    last.start(planes + whole * kPlaneBytes, quarter_of(rest));
  }
  unpack_pairs(planes, count, codes);
  if (rest != 0) {
    last.finish(codes + whole * kBlock);
  }
}

// Codes of both rows, 64 positions at a time.
template <bool I4>
class PairOfRows {
 public:
  PairOfRows(const Matrix &m, size_t row)
      : mask_(m.position_row(row)), at_(I4 ? m.values + m.start(row, true) : m.room), room_(m.room) {
    if (!I4) {
      planes_ = m.values + m.start(row, true);
      const size_t bytes = m.bytes_of(row, true);
      whole_ = bytes / kPlaneBytes;
      done_ = whole_ < kFirst ? whole_ : kFirst;
      begin_pair(planes_, bytes, done_, room_);
    }
  }

  // Before the next so many blocks. Codes of i3 are unpacked little by little, so that their bytes arrive
  // while others are multiplied.
  void prepare(size_t blocks) {
    for (size_t i = 0; i < blocks; i += kCacheLine / 8) {
      fetch_ahead(mask_ + 8 * i);
    }
    if (!I4) {
      const size_t used = static_cast<size_t>(at_ - room_), wanted = used / kBlock + 1 + blocks;
      if (done_ < whole_ && done_ < wanted) {
        const size_t until = wanted < whole_ ? wanted : whole_;
        unpack_pairs(planes_ + done_ * kPlaneBytes, until - done_, room_ + done_ * kBlock);
        done_ = until;
      }
    }
  }

  // The next block: a byte for each position.
  inline LOSA_ALWAYS_INLINE Block next() {
    if (I4) {
      fetch_ahead(at_);
    }
    unsigned used;
    const Block found = scatter(mask_, at_, &used);
    mask_ += 8;
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
  static constexpr size_t kFirst = 8;

  const uint8_t *mask_, *at_;
  uint8_t *room_;
  const uint8_t *planes_ = nullptr;
  size_t whole_ = 0, done_ = 0;  // blocks of planes, and how many of them are unpacked
};

}  // namespace
}  // namespace losa

#endif
