// Rows of ggml's types as rows of codes, one value or byte per position, and back.
#ifndef LOSA_GGML_ROWS_H
#define LOSA_GGML_ROWS_H

#include <cstddef>
#include <cstdint>

#include "losa/kernels.h"

namespace losa::ggml {

constexpr size_t kBlock = 32;  // positions of a block of Q8_0 and Q4_0

losa_value_type value_type(int type);
size_t code_bytes(int type);

// Codes of a stock row: levels of Q8_0, codes of Q4_0 (one per byte), the row itself otherwise. `room` has
// columns * code_bytes, and `scales` room for those of the row. False if our types cannot hold the row.
bool read_codes(int type, const uint8_t *stock, size_t columns, uint8_t *room, const uint8_t **codes,
                uint16_t *scales);
// Inverse.
void write_codes(int type, const uint8_t *codes, size_t columns, const uint16_t *scales, uint8_t *stock);

// f16 scales that a row has.
size_t scales_per_row(int type, size_t columns);

// Set bits where the code is not zero; both zeros of a float count. Returns how many.
size_t find_kept(int type, const uint8_t *codes, size_t columns, uint64_t *words);

// Kept codes one after another. i4 writes them into the low (0) or high (4) nibbles of bytes.
void store_kept(int type, const uint8_t *codes, const uint64_t *words, size_t count, uint8_t *out, int shift);
void load_kept(int type, const uint8_t *in, const uint64_t *words, size_t count, int shift, uint8_t *codes);

// A dense i4 row (docs/formats.md, "dense") from its codes, one per byte, and back.
void store_dense_i4(const uint8_t *codes, size_t columns, uint8_t *out);
void load_dense_i4(const uint8_t *in, size_t columns, uint8_t *codes);
// Codes 0..7 are levels 0..7, 8..15 are -8..-1.
void store_linear_table(uint8_t *table);

}  // namespace losa::ggml

#endif
