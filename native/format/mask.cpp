#include "format/mask.h"

#include <algorithm>

namespace losa::format {
namespace {

constexpr size_t kWord = 64;
constexpr unsigned kMostM = 32;

// Kept ones of `width` positions of a row, 32 at most.
unsigned count_group(const uint64_t *row, size_t at, size_t width) {
  const size_t low = at % kWord, end = low + width;
  uint64_t bits = row[at / kWord] >> low;
  if (end > kWord) {
    bits |= row[at / kWord + 1] << (kWord - low);
  }
  return static_cast<unsigned>(__builtin_popcountll(bits & ((uint64_t{1} << width) - 1)));
}

bool row_keeps(const uint64_t *row, size_t columns, unsigned n, unsigned m) {
  size_t at = 0;
  if (kWord % m == 0) {
    const uint64_t expected = n * (~uint64_t{0} / ((uint64_t{1} << m) - 1));
    for (; at + kWord <= columns; at += kWord) {
      if (count_runs(row[at / kWord], m) != expected) {
        return false;
      }
    }
  }
  for (; at + m <= columns; at += m) {
    if (count_group(row, at, m) != n) {
      return false;
    }
  }
  if (at == columns) {
    return true;
  }
  const size_t width = columns - at;
  const unsigned last = count_group(row, at, width);
  return last <= n && last + (m - width) >= n;
}

// Slots of sliding windows, taken by kept positions from left to right: each takes the first free slot whose
// window it is in. That leaves the most to those behind it, because windows begin and end in the order of
// their slots. Position p is in the windows of the slots (p - 1) / 2, rounded down, to (p + 1) / 2. So of the
// slots from q - 1 on, which positions from 2 q on can take, those before 2 q have at most two: this state,
// or `kNoSlot` once a position found none, goes from byte to byte of a mask.
constexpr unsigned kNoSlot = 3;

struct Taken {
  uint8_t after[256];  // of each byte: the state behind it, two bits for each state before it

  constexpr Taken() : after{} {
    for (unsigned byte = 0; byte < 256; ++byte) {
      unsigned states = kNoSlot << 2 * kNoSlot;
      for (unsigned before = 0; before < kNoSlot; ++before) {
        states |= follow(byte, before) << 2 * before;
      }
      after[byte] = static_cast<uint8_t>(states);
    }
  }

  // Slots are counted from q - 1.
  static constexpr unsigned follow(unsigned byte, unsigned next) {
    for (unsigned p = 0; p < 8; ++p) {
      if ((byte >> p & 1) != 0) {
        const unsigned first = (p + 1) / 2;
        next = next > first ? next : first;
        if (next++ > first + 1) {
          return kNoSlot;
        }
      }
    }
    return next > 4 ? next - 4 : 0;
  }
};
constexpr Taken kTaken;

bool row_slides(const uint64_t *row, size_t columns) {
  unsigned state = 1;  // there is no slot -1
  for (size_t at = 0; at < columns; at += 8) {
    state = kTaken.after[row[at / kWord] >> at % kWord & 255] >> 2 * state & 3u;
  }
  return state <= 1;  // nor one behind the last
}

}  // namespace

unsigned position_bits(Pattern pattern) {
  const unsigned bits = pattern.m <= 2 ? 1 : pattern.m <= 4 ? 2 : pattern.m <= 16 ? 4 : 8;
  return pattern.n * bits < pattern.m && kWord % pattern.m == 0 ? bits : 0;
}

Mask::Mask(size_t rows, size_t columns)
    : rows(rows),
      columns(columns),
      words_per_row((columns + kWord - 1) / kWord),
      words(rows * words_per_row),
      counts(rows) {}

Mask share(const Mask &mask) {
  Mask shared = mask;
  for (size_t r = 0; r + 1 < mask.rows; r += 2) {
    uint64_t *even = shared.row(r), *odd = shared.row(r + 1);
    uint32_t count = 0;
    for (size_t w = 0; w < mask.words_per_row; ++w) {
      even[w] = odd[w] = even[w] | odd[w];
      count += static_cast<uint32_t>(__builtin_popcountll(even[w]));
    }
    shared.counts[r] = shared.counts[r + 1] = count;
  }
  return shared;
}

std::vector<uint64_t> stream_starts(const Mask &mask, bool pairs) {
  std::vector<uint64_t> starts = {0};
  const size_t step = pairs ? 2 : 1;
  starts.reserve(mask.rows / step + 2);
  for (size_t r = 0; r < mask.rows; r += step) {
    const uint32_t partner = pairs && r + 1 < mask.rows ? mask.counts[r + 1] : 0;
    starts.push_back(starts.back() + std::max(mask.counts[r], partner));
  }
  return starts;
}

bool keeps(const Mask &mask, Pattern pattern) {
  for (size_t r = 0; r < mask.rows; ++r) {
    if (!row_keeps(mask.row(r), mask.columns, pattern.n, pattern.m)) {
      return false;
    }
  }
  return true;
}

bool slides(const Mask &mask, bool exact) {
  for (size_t r = 0; r < mask.rows; ++r) {
    if ((exact && mask.counts[r] != mask.columns / 2) || !row_slides(mask.row(r), mask.columns)) {
      return false;
    }
  }
  return true;
}

Pattern find_pattern(const Mask &mask) {
  for (unsigned m = 2; mask.rows != 0 && m <= kMostM && m <= mask.columns; ++m) {
    const Pattern pattern = {count_group(mask.row(0), 0, m), m};
    if (pattern.n != 0 && pattern.n != m && keeps(mask, pattern)) {
      return pattern;
    }
  }
  return {0, 0};
}

Pattern find_half(const Mask &mask) {
  for (const unsigned m : {4u, 8u}) {
    if (mask.rows != 0 && mask.columns % m == 0 && keeps(mask, {m / 2, m})) {
      return {m / 2, m};
    }
  }
  return {0, 0};
}

}  // namespace losa::format
