#include "format/pack.h"

#include <cstring>
#include <stdexcept>

#include "format/codes.h"
#include "format/layout.h"

namespace losa::format {
namespace {

enum Component { kPositions, kValues, kScale, kTable, kComponents };
constexpr size_t kTableBytes = 16;

size_t place_of_scale(const losa_parts &p, size_t row, size_t group) {
  return p.value_type == LOSA_I4 ? scale_index(p, row, group) : row;
}

TileShape shape_of(const losa_parts &p) {
  const bool sliding = p.layout == LOSA_SLIDING;
  return {p.rows, p.columns, sliding ? 2u : p.n, sliding ? kQuad : p.m, p.value_type == LOSA_I4, sliding};
}

// i4 rows share bytes: the odd one has the high nibbles.
int shift_of(size_t row) { return row % 2 ? 4 : 0; }

bool is_whole(const losa_parts &p) { return p.rows % kTile == 0 && p.columns % kTile == 0; }

bool is_written(const losa_parts &p) {
  switch (p.layout) {
    case LOSA_NM:
      return p.n >= 1 && p.n < p.m && p.columns % p.m == 0 && position_bits({p.n, p.m}) == 0;
    case LOSA_TILED:
      return is_integer(p) && is_whole(p) && p.n >= 1 &&
             (p.m == kTile ? p.n < p.m : p.m == kQuad && p.n <= 2);
    case LOSA_SLIDING:
      return is_integer(p) && is_whole(p) && p.n == 0 && p.m == 0;
    default:
      return (p.n == 0 || (in_pairs(p) && is_integer(p))) && p.m == 0;
  }
}

bool shares_masks(const Choice &choice) {
  return choice.layout == LOSA_BITMASK && choice.pattern.n == kSharedMasks.n;
}

}  // namespace

size_t scales_of_row(losa_value_type type, size_t columns, size_t group_size) {
  return type == LOSA_I4 ? (columns + group_size - 1) / group_size : type == LOSA_I8 ? 1 : 0;
}

Packer::Packer(const Mask &mask, const Choice &choice, const Values &values)
    : shared_(shares_masks(choice) ? share(mask) : Mask(0, 0)),
      mask_(shares_masks(choice) ? shared_ : mask),
      values_(values),
      scales_per_row_(scales_of_row(values.type, mask.columns, values.group_size)) {
  losa_parts &p = parts_;
  p.rows = static_cast<uint32_t>(mask.rows);
  p.columns = static_cast<uint32_t>(mask.columns);
  p.layout = static_cast<uint8_t>(choice.layout);
  p.value_type = static_cast<uint8_t>(values.type);
  p.scale_type = scales_per_row_ ? LOSA_SCALE_F16 : LOSA_SCALE_NONE;
  p.n = static_cast<uint8_t>(choice.pattern.n);
  p.m = static_cast<uint8_t>(choice.pattern.m);
  const bool i4 = values.type == LOSA_I4;
  p.group_size = i4 ? values.group_size : uint16_t{0};
  if (!is_written(p)) {
    throw std::invalid_argument("weights are not packed in this layout, type, shape and pattern");
  }
  p.scale.bytes = 2 * mask.rows * scales_per_row_;
  p.table.bytes = i4 ? kTableBytes : 0;
  if (in_tiles(p)) {
    tiles_ = shape_of(p);
    p.positions.bytes = tiles_.positions();
    p.values.bytes = tiles_.values();
  } else if (choice.layout == LOSA_DENSE) {
    p.values.bytes = mask.rows * dense_row_bytes(values.type, mask.columns);
  } else {
    starts_ = stream_starts(mask_, i4);
    p.positions.bytes = mask_lines(p) * mask.words_per_row * sizeof(uint64_t);
    p.values.bytes = stream_bytes(starts_.back() * value_bytes(p.value_type));
  }
  const uint64_t sizes[] = {p.positions.bytes, p.values.bytes, p.scale.bytes, p.table.bytes};
  for (size_t i = 0; i < kComponents; ++i) {
    places_[i] = round_up(bytes_, LOSA_ALIGNMENT);
    bytes_ = sizes[i] ? places_[i] + sizes[i] : bytes_;
  }
}

size_t Packer::row_step() const { return in_tiles(parts_) ? kTile : values_.type == LOSA_I4 ? 2 : 1; }

const losa_parts &Packer::place(uint8_t *memory) {
  memory_ = memory;
  losa_bytes *components[] = {&parts_.positions, &parts_.values, &parts_.scale, &parts_.table};
  for (size_t i = 0; i < kComponents; ++i) {
    components[i]->data = components[i]->bytes ? memory + places_[i] : nullptr;
  }
  if (!starts_.empty()) {
    std::memset(memory + places_[kValues], 0, parts_.values.bytes);  // rows share bytes; the padding is zero
  }
  if (parts_.table.bytes) {
    store_linear_table(memory + places_[kTable]);
  }
  return parts_;
}

void Packer::store(size_t first, size_t last, const Codes &codes) const {
  std::vector<uint8_t> room(mask_.columns * value_bytes(parts_.value_type));
  for (size_t row = first; row < last; ++row) {
    store_row(row, codes(row, room.data()));
    store_scales(row);
  }
}

void Packer::store_row(size_t row, const uint8_t *codes) const {
  uint8_t *positions = memory_ + places_[kPositions], *values = memory_ + places_[kValues];
  const uint64_t *words = mask_.row(row);
  if (in_tiles(parts_)) {
    if (row % kTile == 0) {
      clear_tile(tiles_, row / kTile, positions, values);
    }
    store_tile_row(tiles_, row, codes, words, positions, values);
  } else if (parts_.layout == LOSA_DENSE) {
    store_dense(values_.type, codes, mask_.columns,
                values + row * dense_row_bytes(values_.type, mask_.columns));
  } else {
    const size_t count = mask_.words_per_row, line = values_.type == LOSA_I4 ? row / 2 : row;
    if (!in_pairs(parts_)) {
      std::memcpy(positions + row * count * sizeof(uint64_t), words, count * sizeof(uint64_t));
    } else if (row % 2 == 0) {
      std::memcpy(positions + row / 2 * count * sizeof(uint64_t), words, count * sizeof(uint64_t));
    }
    store_kept(values_.type, codes, words, count, values + starts_[line] * value_bytes(parts_.value_type),
               shift_of(row));
  }
}

void Packer::store_scales(size_t row) const {
  uint8_t *scales = memory_ + places_[kScale];
  for (size_t g = 0; g < scales_per_row_; ++g) {
    std::memcpy(scales + sizeof(uint16_t) * place_of_scale(parts_, row, g),
                values_.scales + row * scales_per_row_ + g, sizeof(uint16_t));
  }
}

void load_row(const losa_tensor &tensor, size_t row, uint8_t *codes) {
  const losa_parts &p = tensor.parts;
  const auto type = static_cast<losa_value_type>(p.value_type);
  const auto *positions = static_cast<const uint8_t *>(p.positions.data);
  const auto *values = static_cast<const uint8_t *>(p.values.data);
  if (p.layout == LOSA_DENSE) {
    load_dense(type, values + row * dense_row_bytes(type, p.columns), p.columns, codes);
    return;
  }
  std::memset(codes, 0, p.columns * value_bytes(p.value_type));
  if (in_tiles(p)) {
    load_tile_row(shape_of(p), row, positions, values, codes);
    return;
  }
  const size_t bytes = position_row_bytes(p);
  std::vector<uint64_t> words(bytes / sizeof(uint64_t));
  std::memcpy(words.data(), positions + (in_pairs(p) ? row / 2 : row) * bytes, bytes);
  load_kept(type, values + row_start(tensor, row) * value_bytes(p.value_type), words.data(), words.size(),
            shift_of(row), codes);
}

void load_scales(const losa_parts &p, size_t row, uint16_t *scales) {
  const size_t count = scales_of_row(static_cast<losa_value_type>(p.value_type), p.columns, p.group_size);
  const auto *from = static_cast<const uint8_t *>(p.scale.data);
  for (size_t g = 0; g < count; ++g) {
    std::memcpy(scales + g, from + sizeof(uint16_t) * place_of_scale(p, row, g), sizeof(uint16_t));
  }
}

}  // namespace losa::format
