// Rows of i3 in a stream of kept values: codes are unpacked ahead of the mask that places them.
#ifndef LOSA_PLANES_H
#define LOSA_PLANES_H

#include "format/layout.h"

namespace losa {
namespace {

// 128 codes from the planes of a block of up to so many: `quarter` bytes of lower bits, then half as many of
// the highest. Behind the codes of a short block it finds others, and reads up to 32 bytes behind its planes.
// Runs overlap and are put down in ascending order, so that every loop has a fixed length, which compilers
// turn into whole registers.
inline void unpack_short_block(const uint8_t *planes, size_t quarter, uint8_t *codes) {
  constexpr size_t kLow = kPadding / 4, kHigh = kPadding / 8;
  const size_t eighth = (quarter + 1) / 2;
  uint8_t low[kLow], high[kHigh], lower[kPadding] = {}, highest[kPadding] = {};
  std::memcpy(low, planes, kLow);
  std::memcpy(high, planes + quarter, kHigh);
  for (size_t k = 0; k < 4; ++k) {
    uint8_t run[kLow];
    for (size_t j = 0; j < kLow; ++j) {
      run[j] = static_cast<uint8_t>(low[j] >> 2 * k & 3);
    }
    std::memcpy(lower + k * quarter, run, kLow);
  }
  for (size_t k = 0; k < 8; ++k) {
    uint8_t run[kHigh];
    for (size_t j = 0; j < kHigh; ++j) {
      run[j] = static_cast<uint8_t>((high[j] >> k & 1) << 2);
    }
    std::memcpy(highest + k * eighth, run, kHigh);
  }
  for (size_t j = 0; j < kPadding; ++j) {
    codes[j] = lower[j] | highest[j];
  }
}

inline void unpack_block(const uint8_t *planes, uint8_t *codes) {
  unpack_short_block(planes, kPadding / 4, codes);
}

// The kept codes of one row, in their order. `Whole` unpacks a block of 128; it may use the bits 4 to 6 of a
// byte for itself.
template <void (*Whole)(const uint8_t *planes, uint8_t *codes)>
class KeptCodes {
 public:
  KeptCodes(const uint8_t *row, size_t bytes) : planes_(row), left_(bytes) {}

  // 64 codes that are not taken yet; behind the last one of the row anything.
  const uint8_t *next() {
    if (end_ - at_ < kBlock && left_ != 0) {
      unpack();
    }
    return codes_ + at_;
  }

  void take(size_t count) { at_ += count; }

 private:
  // Several blocks at a time: what was just stored in pieces is waited for when it is loaded in others.
  static constexpr size_t kBlocks = 4;

  // By itself, because inlined it takes registers from loops that mostly place codes.
  __attribute__((noinline)) void unpack() {
    uint8_t rest[kBlock];
    std::memcpy(rest, codes_ + at_, kBlock);
    std::memcpy(codes_, rest, kBlock);
    end_ -= at_;
    at_ = 0;
    for (size_t i = 0; i < kBlocks && left_ != 0; ++i, end_ += kPadding) {
      if (left_ < kPlaneBytes) {
        unpack_short_block(planes_, quarter_of(left_), codes_ + end_);
        left_ = 0;
        continue;
      }
      Whole(planes_, codes_ + end_);
      planes_ += kPlaneBytes;
      left_ -= kPlaneBytes;
    }
  }

  const uint8_t *planes_;
  size_t left_;  // bytes of the row that are not unpacked yet
  size_t at_ = 0, end_ = 0;
  alignas(64) uint8_t codes_[kBlock + kBlocks * kPadding + kBlock];
};

}  // namespace
}  // namespace losa

#endif
