// Codes of a row, one value or byte per position, as a stream of kept codes or as a dense row, and back.
#ifndef LOSA_FORMAT_CODES_H
#define LOSA_FORMAT_CODES_H

#include <cstddef>
#include <cstdint>

#include "losa/kernels.h"

namespace losa::format {

// Set bits where the code is not zero; both zeros of a float count. Returns how many.
size_t find_kept(losa_value_type type, const uint8_t *codes, size_t columns, uint64_t *words);

// Kept codes of `count` mask words one after another. i4 puts them into the low (0) or high (4) nibbles of
// bytes that have zeros there.
void store_kept(losa_value_type type, const uint8_t *codes, const uint64_t *words, size_t count, uint8_t *out,
                int shift);
// Inverse: `codes` is zero before.
void load_kept(losa_value_type type, const uint8_t *in, const uint64_t *words, size_t count, int shift,
               uint8_t *codes);

// A dense row (docs/formats.md, "dense"), its bytes, and back.
size_t dense_row_bytes(losa_value_type type, size_t columns);
void store_dense(losa_value_type type, const uint8_t *codes, size_t columns, uint8_t *out);
void load_dense(losa_value_type type, const uint8_t *in, size_t columns, uint8_t *codes);

// The default table of i4, [16]: codes 0..7 are levels 0..7, 8..15 are -8..-1.
void store_linear_table(uint8_t *table);

}  // namespace losa::format

#endif
