// Checks a packed tensor once, so that the kernels can trust every pointer and count afterwards.
#include "format/layout.h"

namespace losa {
namespace {

constexpr uint32_t kMost = 1u << 30;  // rows and columns: keeps every product below in 64 bits

bool known_pattern(const losa_parts &p) {
  if (p.m < 2 || p.m > 32 || p.n < 1 || p.n >= p.m) {
    return false;
  }
  if (p.position_bits == 0) {
    return true;
  }
  const unsigned bits = p.position_bits;
  const bool power = bits == 1 || bits == 2 || bits == 4 || bits == 8;
  return power && (1u << bits) >= p.m && kBlock % p.m == 0 && p.n * bits < p.m;
}

// What n, m and position_bits may be, and for tiles the shape.
bool known_positions(const losa_parts &p) {
  if (p.layout == LOSA_NM) {
    return known_pattern(p);
  }
  if (p.layout == LOSA_TILED) {
    const bool pattern = (p.m == kTile && p.n >= 1 && p.n < p.m) || (p.m == kQuad && p.n >= 1 && p.n <= 2);
    const bool shape = p.rows % kTile == 0 && p.columns % kTile == 0;
    return pattern && shape && p.position_bits == 0 && is_integer(p) &&
           (p.m == kQuad || p.value_type != LOSA_I3);
  }
  const bool shape = p.layout != LOSA_SLIDING || (p.rows % kTile == 0 && p.columns % kTile == 0);
  const bool shared = in_pairs(p) && is_integer(p);
  return shape && (p.n == 0 || shared) && p.m == 0 && p.position_bits == 0 &&
         (p.layout != LOSA_SLIDING || is_integer(p));
}

int check_parameters(const losa_parts &p) {
  const bool shape = p.rows >= 1 && p.columns >= 1 && p.rows <= kMost && p.columns <= kMost;
  if (!shape || p.layout > LOSA_SLIDING || p.value_type > LOSA_I3 || !known_positions(p)) {
    return LOSA_BAD_PARAMETER;
  }
  const bool group = p.group_size == 32 || p.group_size == 64 || p.group_size == 128;
  if (is_grouped(p) ? !group : p.group_size != 0) {
    return LOSA_BAD_PARAMETER;
  }
  if (p.value_type == LOSA_I8 ? p.scale_type == LOSA_SCALE_NONE || p.scale_type > LOSA_SCALE_F16
                              : p.scale_type != (is_grouped(p) ? LOSA_SCALE_F16 : LOSA_SCALE_NONE)) {
    return LOSA_BAD_PARAMETER;
  }
  return LOSA_OK;
}

bool has(const losa_bytes &part, uint64_t bytes) {
  return part.bytes == bytes && (bytes == 0 || part.data != nullptr);
}

int check_scales(const losa_parts &p) {
  uint64_t scales = 0;
  if (p.value_type == LOSA_I8) {
    scales = uint64_t{p.rows} * (p.scale_type == LOSA_SCALE_F32 ? 4 : 2);
  } else if (is_grouped(p)) {
    scales = uint64_t{p.rows} * weight_groups(p) * 2;
  }
  if (!has(p.scale, scales) || !has(p.table, is_grouped(p) ? 16 : 0)) {
    return LOSA_BAD_SIZE;
  }
  if (is_grouped(p)) {
    const auto *table = static_cast<const int8_t *>(p.table.data);
    for (int i = 0; i < 16; ++i) {
      const bool behind = p.value_type == LOSA_I3 && i >= 8;  // no code
      if (table[i] == -128 || (behind && table[i] != 0)) {    // the negation of -128 would not fit
        return LOSA_BAD_PARAMETER;
      }
    }
    if (table[0] != 0) {
      return LOSA_BAD_PARAMETER;
    }
  }
  return LOSA_OK;
}

uint64_t dense_bytes(const losa_parts &p) { return uint64_t{dense_row_bytes(p)} * p.rows; }

// Bytes that shape and pattern demand. How long a stream of values is, only the mask of a bitmask says.
struct Sizes {
  uint64_t positions, least_values, most_values;
};

Sizes tiled_sizes(const losa_parts &p) {
  const Tiles tiles(p);
  const uint64_t count = p.rows / kTile, values = count * tiles.value_lines() * Tiles::kStep;
  if (in_lines(p)) {
    return {count * tiles.lines() * Tiles::kStep, values, values};
  }
  return {p.value_type == LOSA_I8 ? values / 2 : 0, values, values};
}

Sizes sizes_of(const losa_parts &p) {
  if (p.layout == LOSA_DENSE) {
    return {0, dense_bytes(p), dense_bytes(p)};
  }
  if (in_tiles(p)) {
    return tiled_sizes(p);
  }
  const uint64_t streams = shares_values(p) ? (uint64_t{p.rows} + 1) / 2 : p.rows;
  const uint64_t most_of_row = p.value_type != LOSA_I3 ? p.columns
                               : in_pairs(p)           ? planes_pair_bytes(p.columns)
                                                       : planes_row_bytes(p.columns);
  const uint64_t of_row = p.layout == LOSA_NM ? slot_stride(p) : most_of_row;
  const uint64_t most = stream_bytes(streams * of_row * value_bytes(p.value_type));
  return {uint64_t{mask_lines(p)} * position_row_bytes(p), p.layout == LOSA_NM ? most : stream_bytes(0),
          most};
}

bool sizes_are_sound(const losa_parts &p) {
  const Sizes sizes = sizes_of(p);
  return has(p.positions, sizes.positions) && has(p.values, p.values.bytes) &&
         p.values.bytes >= sizes.least_values && p.values.bytes <= sizes.most_values;
}

// Codes lie in their group and ascend.
bool codes_are_sound(const losa_parts &p, const uint8_t *row) {
  const unsigned bits = p.position_bits, low = (1u << bits) - 1u;
  size_t at = 0;
  for (size_t g = 0; g < group_count(p); ++g) {
    int before = -1;
    for (unsigned k = 0; k < p.n; ++k, at += bits) {
      const int code = static_cast<int>((row[at / 8] >> (at % 8)) & low);
      if (code <= before || code >= p.m) {
        return false;
      }
      before = code;
    }
  }
  return true;
}

// Bits set in a row; -1 if one lies outside of the row, or a block of N:M has another count than it must.
int64_t row_count(const losa_parts &p, size_t row) {
  const Positions positions(p, row);
  const size_t width = row_width(p);
  const bool fixed = fixed_count(p) && p.position_bits == 0;
  int64_t count = 0;
  for (size_t block = 0; block < positions.blocks; ++block) {
    const uint64_t word = positions.word(block);
    const size_t left = width - block * kBlock;
    if (left < kBlock && (word >> left) != 0) {
      return -1;
    }
    const int here = __builtin_popcountll(word);
    if (fixed && here != static_cast<int>((left < kBlock ? left : kBlock) / p.m * p.n)) {
      return -1;
    }
    count += here;
  }
  return count;
}

int check_nm(const losa_parts &p, losa_tensor *tensor) {
  const auto *bytes = static_cast<const uint8_t *>(p.positions.data);
  for (size_t row = 0; row < p.rows; ++row) {
    if (p.position_bits && !codes_are_sound(p, bytes + row * position_row_bytes(p))) {
      return LOSA_BAD_POSITIONS;
    }
    if (row_count(p, row) != static_cast<int64_t>(slots_per_row(p))) {
      return LOSA_BAD_POSITIONS;
    }
  }
  tensor->kept = slots_per_row(p) * p.rows;
  return LOSA_OK;
}

// Eight slots in a word: the first slots of pairs are the even bytes, the second ones the odd bytes.
constexpr uint64_t kEach = 0x0101010101010101, kFirst = 0x00ff00ff00ff00ff, kSecond = ~kFirst;
constexpr size_t kWords = Tiles::kStep / 8;

// Positions of the slots of a step of N:16.
void step_positions(const losa_parts &p, const Tiles &tiles, size_t step, uint64_t at[kWords]) {
  constexpr uint64_t low = 15 * kEach;
  if (p.value_type == LOSA_I4) {
    for (size_t j = 0; j < kWords; ++j) {
      at[j] = load_word(tiles.values + step * Tiles::kStep + 8 * j) & low;
    }
    return;
  }
  for (size_t j = 0; j < kWords / 2; ++j) {
    const uint64_t pairs = load_word(tiles.positions + step * kTile + 8 * j);
    at[j] = pairs & low;
    at[j + kWords / 2] = pairs >> 4 & low;
  }
}

// Positions of a group ascend, and the free slots of an odd N are zero. Without a branch: a compiler computes
// several words at a time.
bool group_is_sound(const losa_parts &p, const Tiles &tiles, size_t first_step) {
  constexpr uint64_t top = 128 * kEach;
  uint64_t before[kWords] = {}, at[kWords], wrong = 0;
  for (size_t s = 0; s < tiles.steps; ++s) {
    step_positions(p, tiles, first_step + s, at);
    const uint64_t bound = s == 0 ? kFirst & top : 0;                     // below it is nothing
    const uint64_t free = p.n % 2 && s + 1 == tiles.steps ? kSecond : 0;  // only the first slots are taken
    for (size_t j = 0; j < kWords; ++j) {
      // A byte of 128 + position - 1 - (the one before it) keeps its highest bit if the position is larger.
      const uint64_t larger = (at[j] | top) - kEach - ((at[j] << 8 & kSecond) | (before[j] >> 8 & kFirst));
      wrong |= (~(larger | bound | free) & top) | (at[j] & free);
      before[j] = at[j];
    }
  }
  if (p.n % 2) {
    const uint8_t *last = tiles.values + (first_step + tiles.steps - 1) * Tiles::kStep;
    for (size_t j = 0; j < kWords; ++j) {
      wrong |= load_word(last + 8 * j) & kSecond;
    }
  }
  return wrong == 0;
}

// Both positions of every quad of a line of 2:4 ascend: fields of two bits are compared in place.
bool quads_ascend(const uint8_t *line) {
  uint64_t wrong = 0;
  for (size_t j = 0; j < kWords; ++j) {
    const uint64_t word = load_word(line + 8 * j), second = word >> 8;
    const uint64_t differs = word ^ second, above = second & differs;
    const uint64_t larger = above >> 1 | (above & ~(differs >> 1));
    wrong |= ~larger & kFirst & 0x55 * kEach;
  }
  return wrong == 0;
}

// Bits behind the first `bits` of each byte of a line are zero.
bool rest_is_zero(const uint8_t *line, size_t bits) {
  const uint64_t rest = (0xff << bits & 0xff) * kEach;
  uint64_t found = 0;
  for (size_t j = 0; j < kWords; ++j) {
    found |= load_word(line + 8 * j) & rest;
  }
  return found == 0;
}

// I3: bits of steps that are not there, at the end of both planes of every tile.
bool planes_end_in_zeros(const Tiles &tiles, uint64_t count) {
  const size_t low = 2 * (tiles.all_steps() % Tiles::kPerLine),
               high = tiles.all_steps() % Tiles::kPerHighLine;
  for (uint64_t tile = 0; tile < count; ++tile) {
    const uint8_t *values = tiles.values + tile * tiles.value_lines() * Tiles::kStep;
    const uint8_t *end = values + tiles.lines() * Tiles::kStep;
    if (low && !rest_is_zero(end - Tiles::kStep, low)) {
      return false;
    }
    if (high && !rest_is_zero(end + (tiles.high_lines() - 1) * Tiles::kStep, high)) {
      return false;
    }
  }
  return true;
}

int check_quads(const losa_parts &p, losa_tensor *tensor) {
  const Tiles tiles(p);
  const uint64_t count = p.rows / kTile, steps = tiles.all_steps(), lines = tiles.lines();
  const auto *at = tiles.positions;
  for (uint64_t i = 0; p.n == 2 && i < count * lines; ++i) {
    if (!quads_ascend(at + i * Tiles::kStep)) {
      return LOSA_BAD_POSITIONS;
    }
  }
  const uint64_t rest = 2 * (steps % Tiles::kPerLine);
  for (uint64_t tile = 1; rest && tile <= count; ++tile) {
    if (!rest_is_zero(at + (tile * lines - 1) * Tiles::kStep, rest)) {
      return LOSA_BAD_POSITIONS;
    }
  }
  if (p.value_type == LOSA_I3 && !planes_end_in_zeros(tiles, count)) {
    return LOSA_BAD_POSITIONS;
  }
  tensor->kept = count * kTile * (p.columns / kQuad) * p.n;
  return LOSA_OK;
}

// Positions ascend in every row of a tile of windows and lie inside of it. Windows move on by 2, so that a
// code may be at most one less than that of the slot before.
bool windows_are_sound(const Tiles &tiles, const uint8_t *lines) {
  constexpr uint64_t top = 128 * kEach, low = 3 * kEach;
  uint64_t before[kWords], at[kWords], wrong = 0;
  for (auto &word : before) {
    word = 2 * kEach;  // the first code is not 0
  }
  for (size_t s = 0; s < tiles.all_steps(); ++s) {
    const uint8_t *line = lines + s / Tiles::kPerLine * Tiles::kStep;
    for (size_t j = 0; j < kWords; ++j) {
      at[j] = load_word(line + 8 * j) >> 2 * (s % Tiles::kPerLine) & low;
      // A byte of 128 + code + 1 - (the one before it) keeps its highest bit if the code is at most one less.
      wrong |= ~((at[j] | top) + kEach - ((at[j] << 8 & kSecond) | (before[j] >> 8 & kFirst))) & top;
      before[j] = at[j];
    }
  }
  for (const uint64_t last : before) {
    wrong |= (last & last >> 1) & kSecond & kEach;  // the last code is not 3
  }
  return wrong == 0;
}

int check_sliding(const losa_parts &p, losa_tensor *tensor) {
  const Tiles tiles(p);
  const uint64_t count = p.rows / kTile;
  for (uint64_t tile = 0; tile < count; ++tile) {
    if (!windows_are_sound(tiles, tiles.positions + tile * tiles.lines() * Tiles::kStep)) {
      return LOSA_BAD_POSITIONS;
    }
  }
  if (p.value_type == LOSA_I3 && !planes_end_in_zeros(tiles, count)) {
    return LOSA_BAD_POSITIONS;
  }
  tensor->kept = count * kTile * (p.columns / 2);
  return LOSA_OK;
}

int check_tiled(const losa_parts &p, losa_tensor *tensor) {
  if (p.m == kQuad) {
    return check_quads(p, tensor);
  }
  const Tiles tiles(p);
  const uint64_t groups = p.rows / kTile * uint64_t{tiles.groups};
  for (size_t group = 0; group < groups; ++group) {
    if (!group_is_sound(p, tiles, group * tiles.steps)) {
      return LOSA_BAD_POSITIONS;
    }
  }
  tensor->kept = groups * kTile * p.n;
  return LOSA_OK;
}

int check_bitmask(const losa_parts &p, uint64_t *starts, losa_tensor *tensor) {
  uint64_t total = 0, pair = 0;
  for (size_t row = 0; row < p.rows; ++row) {
    const int64_t count = row_count(p, row);
    if (count < 0) {
      return LOSA_BAD_POSITIONS;
    }
    const auto kept = static_cast<uint64_t>(count);
    tensor->kept += kept;
    if (!shares_values(p)) {
      starts[row] = total;
      total += p.value_type == LOSA_I3 ? planes_row_bytes(kept) : kept;
    } else if (p.value_type == LOSA_I3) {
      if (row % 2 == 0) {
        starts[row / 2] = total;
        total += planes_pair_bytes(kept);
      }
    } else if (row % 2 == 0) {
      starts[row / 2] = total;
      pair = kept;
      total += row + 1 == p.rows ? kept : 0;
    } else {
      total += kept > pair ? kept : pair;
    }
  }
  if (p.value_type == LOSA_I3) {
    starts[mask_lines(p)] = total;
  }
  return has(p.values, stream_bytes(total * value_bytes(p.value_type))) ? LOSA_OK : LOSA_BAD_SIZE;
}

uint64_t read_uint(const uint8_t *bytes, int count) {
  uint64_t value = 0;
  for (int i = count - 1; i >= 0; --i) {
    value = value << 8 | bytes[i];
  }
  return value;
}

}  // namespace
}  // namespace losa

using namespace losa;

extern "C" int losa_parts_check(const losa_parts *parts) {
  if (parts == nullptr) {
    return LOSA_NULL_POINTER;
  }
  int status = check_parameters(*parts);
  if (status == LOSA_OK) {
    status = check_scales(*parts);
  }
  return status != LOSA_OK || sizes_are_sound(*parts) ? status : LOSA_BAD_SIZE;
}

extern "C" size_t losa_starts_count(const losa_parts *parts) {
  if (losa_parts_check(parts) != LOSA_OK || parts->layout != LOSA_BITMASK) {
    return 0;
  }
  const size_t rows = parts->rows, streams = shares_values(*parts) ? (rows + 1) / 2 : rows;
  return parts->value_type == LOSA_I3 ? streams + 1 : streams;
}

extern "C" int losa_tensor_open(const losa_parts *parts, uint64_t *starts, losa_tensor *tensor) {
  if (parts == nullptr || tensor == nullptr) {
    return LOSA_NULL_POINTER;
  }
  const losa_parts &p = *parts;
  const int status = losa_parts_check(parts);
  if (status != LOSA_OK) {
    return status;
  }
  *tensor = {p, starts, 0};
  if (p.layout == LOSA_DENSE) {
    tensor->kept = uint64_t{p.rows} * p.columns;
    return LOSA_OK;
  }
  if (p.layout == LOSA_TILED) {
    return check_tiled(p, tensor);
  }
  if (p.layout == LOSA_SLIDING) {
    return check_sliding(p, tensor);
  }
  if (p.layout == LOSA_NM) {
    return check_nm(p, tensor);
  }
  return starts == nullptr ? LOSA_NULL_POINTER : check_bitmask(p, starts, tensor);
}

extern "C" int losa_blob_parts(const void *blob, uint64_t bytes, losa_parts *parts) {
  if (blob == nullptr || parts == nullptr) {
    return LOSA_NULL_POINTER;
  }
  const auto *head = static_cast<const uint8_t *>(blob);
  if (bytes < LOSA_HEADER_BYTES || std::memcmp(head, "LOSA", 4) != 0 ||
      read_uint(head + 4, 2) != LOSA_FORMAT_VERSION || read_uint(head + 6, 2) != LOSA_HEADER_BYTES) {
    return LOSA_BAD_HEADER;
  }
  losa_parts p = {};
  p.layout = head[8];
  p.value_type = head[9];
  p.scale_type = head[10];
  p.n = head[11];
  p.m = head[12];
  p.position_bits = head[13];
  p.group_size = static_cast<uint16_t>(read_uint(head + 14, 2));
  p.rows = static_cast<uint32_t>(read_uint(head + 16, 4));
  p.columns = static_cast<uint32_t>(read_uint(head + 20, 4));
  losa_bytes *components[] = {&p.positions, &p.values, &p.scale, &p.table};
  uint64_t end = LOSA_HEADER_BYTES;
  for (int i = 0; i < 4; ++i) {
    const uint64_t offset = read_uint(head + 32 + 16 * i, 8), size = read_uint(head + 40 + 16 * i, 8);
    if (size == 0) {
      continue;
    }
    // In order and without overlap; the subtraction cannot wrap because offset <= bytes is tested first.
    if (offset % LOSA_ALIGNMENT != 0 || offset < end || offset > bytes || size > bytes - offset) {
      return LOSA_BAD_RANGE;
    }
    *components[i] = {head + offset, size};
    end = offset + size;
  }
  *parts = p;
  return LOSA_OK;
}

extern "C" const char *losa_status_text(int status) {
  switch (status) {
    case LOSA_OK:
      return "ok";
    case LOSA_NULL_POINTER:
      return "a pointer is null";
    case LOSA_BAD_HEADER:
      return "no packed tensor of format 1";
    case LOSA_BAD_PARAMETER:
      return "a layout, type, shape or pattern outside of the format";
    case LOSA_BAD_SIZE:
      return "a component has not the bytes that shape and mask demand";
    case LOSA_BAD_POSITIONS:
      return "a position lies outside of the row, or the mask is not N of every M";
    case LOSA_BAD_RANGE:
      return "a component lies outside of the data, overlaps another or is not aligned";
    case LOSA_BAD_TARGET:
      return "LOSA_KERNELS names a target that this CPU cannot run";
    default:
      return "unknown status";
  }
}

extern "C" int losa_mask_count(const uint8_t *mask, size_t bytes, uint64_t *count) {
  if ((mask == nullptr && bytes != 0) || count == nullptr) {
    return LOSA_NULL_POINTER;
  }
  uint64_t total = 0;
  for (size_t i = 0; i < bytes; ++i) {
    total += static_cast<uint64_t>(__builtin_popcount(mask[i]));
  }
  *count = total;
  return LOSA_OK;
}
