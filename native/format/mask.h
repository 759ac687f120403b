// Which positions of a weight are kept, and the N of every M in that.
#ifndef LOSA_FORMAT_MASK_H
#define LOSA_FORMAT_MASK_H

#include <cstddef>
#include <cstdint>
#include <vector>

namespace losa::format {

// N kept of every M positions of a row; n is 0 where there is no such pattern.
struct Pattern {
  unsigned n, m;
};

// nm stores codes of 1, 2, 4 or 8 bits where they are smaller than mask bits and whole groups fill 64
// positions; else 0.
unsigned position_bits(Pattern pattern);

struct Mask {
  Mask(size_t rows, size_t columns);

  uint64_t *row(size_t r) { return &words[r * words_per_row]; }
  const uint64_t *row(size_t r) const { return &words[r * words_per_row]; }

  size_t rows, columns, words_per_row;
  std::vector<uint64_t> words;   // [rows, words_per_row], lowest bit first; zero behind the columns
  std::vector<uint32_t> counts;  // [rows] bits
};

// A mask in which the rows 2 i and 2 i + 1 both keep what either of them keeps.
Mask share(const Mask &mask);

// Where each row begins in the stream of kept values, of i4 (`pairs`) each pair of rows in bytes; then the
// end.
std::vector<uint64_t> stream_starts(const Mask &mask, bool pairs);

// Bits of each run of M positions, at its lowest bit; M is a power of two up to 32.
inline uint64_t count_runs(uint64_t word, unsigned m) {
  word -= word >> 1 & 0x5555555555555555u;
  if (m >= 4) {
    word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
  }
  if (m >= 8) {
    word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  }
  if (m >= 16) {
    word = (word + (word >> 8)) & 0x00ff00ff00ff00ffu;
  }
  if (m >= 32) {
    word = (word + (word >> 16)) & 0x000000ff000000ffu;
  }
  return word;
}

// Whether every M positions of a row keep exactly N. A short last group may keep fewer, if as many positions
// as it lacks lie beyond the row.
bool keeps(const Mask &mask, Pattern pattern);

// Whether sliding windows hold a mask of whole tiles: there is a slot for every kept position, and if `exact`
// a kept position for every slot. Rows are looked at until one does not fit.
bool slides(const Mask &mask, bool exact);

// The pattern with the smallest M that a mask follows.
Pattern find_pattern(const Mask &mask);

// The same of those that an N:M of whole groups can hold with mask bits and without a count: 2:4 and 4:8.
Pattern find_half(const Mask &mask);

}  // namespace losa::format

#endif
