// Rows of i3 in a stream of kept values: codes are unpacked ahead of the mask that places them.
#ifndef LOSA_PLANES_H
#define LOSA_PLANES_H

#include "format/layout.h"

namespace losa {
namespace {

// The last block of a row, which is shorter than 128, between two steps: what the first puts down in pieces,
// the second takes up in others, for which a CPU waits unless there is something else to do between them.
// All loops have a fixed length, so that compilers make registers of their words.
class ShortBlock {
  static constexpr size_t kLow = kPadding / 4, kHigh = kPadding / 8, kWord = sizeof(uint64_t);
  static constexpr uint64_t kEachByte = 0x0101010101010101;

 public:
  // `quarter` bytes of lower bits and half as many of the highest; it reads up to 32 bytes behind them. Runs
  // are put down in ascending order: each overwrites what the one before has too much.
  void start(const uint8_t *planes, size_t quarter) {
    const size_t eighth = (quarter + 1) / 2;
    uint64_t low[kLow / kWord], high[kHigh / kWord];
    std::memcpy(low, planes, kLow);
    std::memcpy(high, planes + quarter, kHigh);
    for (size_t k = 0; k < 4; ++k) {
      uint64_t run[kLow / kWord];
      for (size_t j = 0; j < kLow / kWord; ++j) {
        run[j] = low[j] >> 2 * k & 3 * kEachByte;
      }
      std::memcpy(reinterpret_cast<uint8_t *>(low_) + k * quarter, run, kLow);
    }
    for (size_t k = 0; k < 8; ++k) {
      uint64_t run[kHigh / kWord];
      for (size_t j = 0; j < kHigh / kWord; ++j) {
        run[j] = (high[j] >> k & kEachByte) << 2;
      }
      std::memcpy(reinterpret_cast<uint8_t *>(high_) + k * eighth, run, kHigh);
    }
  }

  // Its codes; behind them anything, 128 in all.
  void finish(uint8_t *codes) const {
    uint64_t joined[kPadding / kWord];
    for (size_t j = 0; j < kPadding / kWord; ++j) {
      joined[j] = low_[j] | high_[j];
    }
    std::memcpy(codes, joined, kPadding);
  }

 private:
  uint64_t low_[kPadding / kWord], high_[kPadding / kWord];
};

// The same of a pair of rows that share a mask: bytes with a code of the even row in the low nibble and one
// of the odd row in the high one. Its planes end with whole bytes.
class ShortPair {
  static constexpr size_t kLow = kPadding / 4, kHigh = kPadding / 8, kWord = sizeof(uint64_t);
  static constexpr uint64_t kLower = 0x3333333333333333, kHighest = 0x4444444444444444;

 public:
  void start(const uint8_t *planes, size_t quarter) {
    const size_t eighth = quarter / 2;
    uint64_t low[kLow / kWord], high[kHigh / kWord];
    std::memcpy(low, planes, kLow);
    std::memcpy(high, planes + quarter, kHigh);
    for (size_t k = 0; k < 2; ++k) {
      uint64_t run[kLow / kWord];
      for (size_t j = 0; j < kLow / kWord; ++j) {
        run[j] = low[j] >> 2 * k & kLower;
      }
      std::memcpy(reinterpret_cast<uint8_t *>(low_) + k * quarter, run, kLow);
    }
    for (size_t k = 0; k < 4; ++k) {
      uint64_t run[kHigh / kWord];
      for (size_t j = 0; j < kHigh / kWord; ++j) {
        run[j] = (k < 2 ? high[j] << (2 - k) : high[j] >> (k - 2)) & kHighest;
      }
      std::memcpy(reinterpret_cast<uint8_t *>(high_) + k * eighth, run, kHigh);
    }
  }

  // Its bytes; behind them anything, 64 in all.
  void finish(uint8_t *codes) const {
    uint64_t joined[kBlock / kWord];
    for (size_t j = 0; j < kBlock / kWord; ++j) {
      joined[j] = low_[j] | high_[j];
    }
    std::memcpy(codes, joined, kBlock);
  }

 private:
  uint64_t low_[kBlock / kWord], high_[kBlock / kWord];
};

// A whole block of such a pair in plain C++: of 128 codes 64 bytes.
inline void unpack_pair_block(const uint8_t *planes, uint8_t *codes) {
  ShortPair block;
  block.start(planes, quarter_of(kPlaneBytes));
  block.finish(codes);
}

// The kept codes of one row, or of a pair as bytes, in their order. Unpack is a target's: it makes `Codes` of
// the planes of a block, of a row 128, and may use the bits 4 to 6 of a byte for itself. `Blocks` are
// unpacked at a time.
template <void (*Unpack)(const uint8_t *planes, uint8_t *codes), size_t Blocks, typename Last = ShortBlock,
          size_t Codes = kPadding>
class KeptCodes {
 public:
  KeptCodes(const uint8_t *row, size_t bytes) : planes_(row), whole_(bytes / kPlaneBytes) {
    const size_t rest = bytes - whole_ * kPlaneBytes;
    short_ = rest != 0;
    if (short_) {
      last_.start(row + whole_ * kPlaneBytes, quarter_of(rest));
    }
  }

  // 64 codes that are not taken yet; behind the last one of the row anything.
  const uint8_t *next() {
    if (end_ - at_ < kBlock && (whole_ != 0 || short_)) {
      unpack();
    }
    return codes_ + at_;
  }

  void take(size_t count) { at_ += count; }

 private:
  // By itself, because inlined it takes registers from loops that mostly place codes.
  __attribute__((noinline)) void unpack() {
    uint8_t rest[kBlock];
    std::memcpy(rest, codes_ + end_ - kBlock, kBlock);
    std::memcpy(codes_, rest, kBlock);
    at_ = at_ + kBlock - end_;
    end_ = kBlock;
    const size_t count = whole_ < Blocks ? whole_ : Blocks;
    for (size_t i = 0; i < count; ++i, planes_ += kPlaneBytes, end_ += Codes) {
      Unpack(planes_, codes_ + end_);
    }
    whole_ -= count;
    if (count < Blocks && short_) {
      last_.finish(codes_ + end_);
      end_ += Codes;
      short_ = false;
    }
  }

  const uint8_t *planes_;
  size_t whole_;  // blocks that are not unpacked yet, and a short one
  bool short_;
  // Blocks are put down behind the last codes before them, of which fewer than 64 are not taken: so they are
  // aligned.
  size_t at_ = kBlock, end_ = kBlock;
  alignas(32) uint8_t codes_[kBlock + Blocks * Codes + kBlock];
  Last last_;
};

template <void (*Unpack)(const uint8_t *planes, uint8_t *codes), size_t Blocks>
using KeptPairs = KeptCodes<Unpack, Blocks, ShortPair, kBlock>;

}  // namespace
}  // namespace losa

#endif
