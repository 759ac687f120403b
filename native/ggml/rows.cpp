#include "rows.h"

#include <cstring>

#include "abi.h"

namespace losa::ggml {
namespace {

constexpr size_t kQ8Bytes = 2 + kBlock, kQ4Bytes = 2 + kBlock / 2;

template <typename T>
T load(const uint8_t *from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Levels of Q8_0 rows whose blocks share one finite scale: our i8. Blocks of zeros may have any scale.
bool read_q8(const uint8_t *stock, size_t blocks, uint8_t *levels, uint16_t *scale) {
  auto common = load<uint16_t>(stock);
  if ((common & 0x7c00) == 0x7c00) {
    common = 0;
  }
  bool found = false, sound = true;
  for (size_t b = 0; b < blocks; ++b, stock += kQ8Bytes, levels += kBlock) {
    std::memcpy(levels, stock + 2, kBlock);
    uint8_t any = 0, widest = 0;
    for (size_t i = 0; i < kBlock; ++i) {
      any |= levels[i];
      widest |= levels[i] == 0x80;  // -128 is not a level of ours
    }
    if (any == 0) {
      continue;
    }
    const auto here = load<uint16_t>(stock);
    sound = sound && widest == 0 && (here & 0x7c00) != 0x7c00 && (!found || here == common);
    common = here;
    found = true;
  }
  *scale = common;
  return sound;
}

// Nibbles of Q4_0 are levels + 8; our code is the level in two's complement, so one bit differs.
bool read_q4(const uint8_t *stock, size_t blocks, uint8_t *codes, uint16_t *scales) {
  bool sound = true;
  for (size_t b = 0; b < blocks; ++b, stock += kQ4Bytes, codes += kBlock) {
    scales[b] = load<uint16_t>(stock);
    sound = sound && (scales[b] & 0x7c00) != 0x7c00;
    for (size_t i = 0; i < kBlock / 2; i += 8) {  // eight bytes at once
      constexpr uint64_t nibbles = 0x0f0f0f0f0f0f0f0f, sign = 0x0808080808080808;
      const auto both = load<uint64_t>(stock + 2 + i);
      const uint64_t low = (both & nibbles) ^ sign, high = (both >> 4 & nibbles) ^ sign;
      std::memcpy(codes + i, &low, 8);
      std::memcpy(codes + i + kBlock / 2, &high, 8);
    }
  }
  return sound;
}

}  // namespace

losa_value_type value_type(int type) {
  return type == kF32 ? LOSA_F32 : type == kF16 ? LOSA_F16 : type == kQ8_0 ? LOSA_I8 : LOSA_I4;
}

size_t scales_per_row(int type, size_t columns) {
  return type == kQ8_0 ? 1 : type == kQ4_0 ? columns / kBlock : 0;
}

bool read_codes(int type, const uint8_t *stock, size_t columns, uint8_t *room, const uint8_t **codes,
                uint16_t *scales) {
  *codes = room;
  switch (type) {
    case kQ8_0:
      return read_q8(stock, columns / kBlock, room, scales);
    case kQ4_0:
      return read_q4(stock, columns / kBlock, room, scales);
    default:
      *codes = stock;
      return true;
  }
}

void write_codes(int type, const uint8_t *codes, size_t columns, const uint16_t *scales, uint8_t *stock) {
  if (type != kQ8_0 && type != kQ4_0) {
    std::memcpy(stock, codes, columns * (type == kF32 ? 4 : 2));
    return;
  }
  for (size_t b = 0; b < columns / kBlock; ++b, codes += kBlock) {
    std::memcpy(stock, scales + (type == kQ8_0 ? 0 : b), 2);
    stock += 2;
    if (type == kQ8_0) {
      std::memcpy(stock, codes, kBlock);
      stock += kBlock;
      continue;
    }
    for (size_t i = 0; i < kBlock / 2; ++i) {
      *stock++ = static_cast<uint8_t>((codes[i] ^ 8) | (codes[i + kBlock / 2] ^ 8) << 4);
    }
  }
}

}  // namespace losa::ggml
