// The byte shuffles that place kept values on CPUs without an expand instruction, x86 and ARM.
#ifndef LOSA_SHUFFLE_TABLE_H
#define LOSA_SHUFFLE_TABLE_H

#include <cstdint>

namespace losa {
namespace {

// For each mask byte the rank of every position among the kept ones, or 0x80 (a shuffle writes zero).
struct ShuffleTable {
  alignas(64) uint64_t control[256];

  constexpr ShuffleTable() : control{} {
    for (unsigned byte = 0; byte < 256; ++byte) {
      uint64_t row = 0, rank = 0;
      for (unsigned i = 0; i < 8; ++i) {
        row |= (byte >> i & 1 ? rank++ : uint64_t{0x80}) << (8 * i);
      }
      control[byte] = row;
    }
  }
};
constexpr ShuffleTable kShuffle;

}  // namespace
}  // namespace losa

#endif
