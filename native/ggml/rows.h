// Rows of ggml's types as rows of codes (format/pack.h), and back.
#ifndef LOSA_GGML_ROWS_H
#define LOSA_GGML_ROWS_H

#include <cstddef>
#include <cstdint>

#include "losa/kernels.h"

namespace losa::ggml {

constexpr size_t kBlock = 32;  // positions of a block of Q8_0 and Q4_0

losa_value_type value_type(int type);

// Codes of a stock row: levels of Q8_0, codes of Q4_0 (one per byte), the row itself otherwise. `room` is for
// a row of codes, and `scales` for those of the row. False if our types cannot hold the row.
bool read_codes(int type, const uint8_t *stock, size_t columns, uint8_t *room, const uint8_t **codes,
                uint16_t *scales);
// Inverse.
void write_codes(int type, const uint8_t *codes, size_t columns, const uint16_t *scales, uint8_t *stock);

// f16 scales that a row has.
size_t scales_per_row(int type, size_t columns);

}  // namespace losa::ggml

#endif
