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
