// A weight packed from rows of codes, as losa_deploy/layouts packs it, byte for byte; and rows of codes back.
//
// Codes are values of f32 and f16, levels of i8, and codes 0..15 of i4, one per byte. Pruned positions are
// zero.
#ifndef LOSA_FORMAT_PACK_H
#define LOSA_FORMAT_PACK_H

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "format/choose.h"
#include "format/mask.h"
#include "format/pack_tiles.h"
#include "losa/kernels.h"

namespace losa::format {

// What codes mean. Scales are f16, row after row: one per row of i8, one per group of i4, whose table is
// linear.
struct Values {
  losa_value_type type;
  uint16_t group_size;  // i4 only
  const uint16_t *scales;
};

size_t scales_of_row(losa_value_type type, size_t columns, size_t group_size);

// Writes the components into memory of the caller. Mask and scales have to outlive it.
class Packer {
 public:
  // Codes of a row, which may be in `room`: bytes for one row.
  using Codes = std::function<const uint8_t *(size_t row, uint8_t *room)>;

  // Throws std::invalid_argument for what is not written here: nm with short groups or position codes, and
  // tiles that the format does not have.
  Packer(const Mask &mask, const Choice &choice, const Values &values);

  size_t bytes() const { return bytes_; }
  // Rows that only one thread may store: those of a pair or a tile.
  size_t row_step() const;
  // Take memory of `bytes`, write what does not belong to rows, and say where the components are.
  const losa_parts &place(uint8_t *memory);
  // Store the rows [first, last): multiples of the step, or the end. Once for each row, after `place`.
  void store(size_t first, size_t last, const Codes &codes) const;

 private:
  void store_row(size_t row, const uint8_t *codes) const;
  void store_scales(size_t row) const;

  Mask shared_;  // of pairs of rows that share a mask
  const Mask &mask_;
  Values values_;
  size_t scales_per_row_;
  TileShape tiles_ = {};
  std::vector<uint64_t> starts_;  // of streams
  losa_parts parts_ = {};
  uint8_t *memory_ = nullptr;
  size_t places_[4] = {}, bytes_ = 0;  // of the components in memory, and where they end
};

// Codes of a row of an open tensor that was packed here; `codes` has room for a row.
void load_row(const losa_tensor &tensor, size_t row, uint8_t *codes);
// Its f16 scales.
void load_scales(const losa_parts &parts, size_t row, uint16_t *scales);

}  // namespace losa::format

#endif
