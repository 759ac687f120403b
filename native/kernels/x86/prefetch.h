// Weights are asked for before their turn. What a CPU fetches ahead by itself ends with each page and keeps
// few lines on the way, which on servers with slow and distant memory is half of what they can deliver.
#ifndef LOSA_PREFETCH_H
#define LOSA_PREFETCH_H

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace losa {
namespace {

// Measured on memory with 150 ns and 15 GB/s per core: less than 2 KiB comes late, more than 4 KiB is pushed
// out of the first cache again.
constexpr uintptr_t kAhead = 3072;
constexpr uintptr_t kCacheLine = 64;

// Always inlined: a function that only fetches has no effect that GCC knows of, so that it
// drops calls that it has not inlined early.
inline __attribute__((always_inline)) void fetch(uintptr_t address) {
  _mm_prefetch(reinterpret_cast<const char *>(address), _MM_HINT_T0);
}

// What is read in sequence: the line that follows `at` by kAhead bytes. Behind the end of a tensor it fetches
// what is there, or nothing; that is no access.
inline __attribute__((always_inline)) void fetch_ahead(const void *at) {
  fetch(reinterpret_cast<uintptr_t>(at) + kAhead);
}

// What two rows read side by side: they lie one after the other, so that neither of them can say what comes
// after both. Their bytes are spread over the steps that both take.
class Ahead {
 public:
  explicit Ahead(const uint8_t *nothing_more)  // stays where memory is; an address without any costs time
      : at_(reinterpret_cast<uintptr_t>(nothing_more)), step_(0) {}
  Ahead(const uint8_t *rows, size_t step) : at_(reinterpret_cast<uintptr_t>(rows) + kAhead), step_(step) {}

  // As many lines as a step has; a loop that looked at the size would cost more than a line too many.
  template <unsigned Lines>
  inline __attribute__((always_inline)) void next() {
    fetch(at_);
    if (Lines > 1) {
      fetch(at_ + kCacheLine);
    }
    if (Lines > 2) {
      fetch(at_ + 2 * kCacheLine);
      fetch(at_ + 3 * kCacheLine);
    }
    at_ += step_;
  }

 private:
  uintptr_t at_, step_;
};

// Bytes of a step where `bytes` are spread over `steps`, rounded up: a division takes as long as a step.
class PerStep {
 public:
  explicit PerStep(size_t steps) : part_((kWhole + steps - 1) / steps) {}
  size_t of(size_t bytes) const { return (bytes * part_ + kWhole - 1) / kWhole; }

 private:
  static constexpr size_t kWhole = size_t{1} << 20;
  size_t part_;
};

}  // namespace
}  // namespace losa

#endif
