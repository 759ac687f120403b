#include "rows.h"

#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "abi.h"

namespace losa::ggml {
namespace {

constexpr size_t kDenseBlock = 128;  // positions of a block of dense i4
constexpr size_t kQ8Bytes = 2 + kBlock, kQ4Bytes = 2 + kBlock / 2;

template <typename T>
T load(const uint8_t *from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Bit i is set where byte i of eight is not zero: no carry crosses a byte, and the product gathers the tops.
uint64_t nonzero_bytes(uint64_t x) {
  constexpr uint64_t low = 0x7f7f7f7f7f7f7f7f;
  const uint64_t top = (((x & low) + low) | x) & ~low;
  return ((top >> 7) * 0x0102040810204080) >> 56;
}

// The same for four halves, without their signs.
uint64_t nonzero_halves(uint64_t x) {
  constexpr uint64_t low = 0x7fff7fff7fff7fff;
  const uint64_t top = ((x & low) + low) & ~low;
  return (((top >> 15) * 0x0001000200040008) >> 48) & 15;
}

bool is_zero(int type, const uint8_t *codes, size_t at) {
  switch (type) {
    case kF32:
      return (load<uint32_t>(codes + 4 * at) & 0x7fffffff) == 0;
    case kF16:
      return (load<uint16_t>(codes + 2 * at) & 0x7fff) == 0;
    default:
      return codes[at] == 0;
  }
}

uint64_t word_of(int type, const uint8_t *codes, size_t positions) {
  uint64_t word = 0;
#if defined(__SSE2__)
  if (positions == 64 && type != kF32 && type != kF16) {
    const __m128i zero = _mm_setzero_si128();
    for (unsigned i = 0; i < 64; i += 16) {
      const __m128i here = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + i));
      const auto zeros = static_cast<unsigned>(_mm_movemask_epi8(_mm_cmpeq_epi8(here, zero)));
      word |= uint64_t{~zeros & 0xffff} << i;
    }
    return word;
  }
#endif
  if (positions == 64 && type != kF32) {
    const unsigned step = type == kF16 ? 4 : 8;
    for (unsigned i = 0; i < 64; i += step, codes += 8) {
      const auto x = load<uint64_t>(codes);
      word |= (type == kF16 ? nonzero_halves(x) : nonzero_bytes(x)) << i;
    }
    return word;
  }
  for (size_t i = 0; i < positions; ++i) {
    word |= uint64_t{!is_zero(type, codes, i)} << i;
  }
  return word;
}

template <typename T>
void compact(const uint8_t *codes, const uint64_t *words, size_t count, uint8_t *out) {
  for (size_t w = 0; w < count; ++w, codes += 64 * sizeof(T)) {
    for (uint64_t word = words[w]; word != 0; word &= word - 1, out += sizeof(T)) {
      std::memcpy(out, codes + sizeof(T) * static_cast<size_t>(__builtin_ctzll(word)), sizeof(T));
    }
  }
}

template <typename T>
void scatter(const uint8_t *in, const uint64_t *words, size_t count, uint8_t *codes) {
  for (size_t w = 0; w < count; ++w, codes += 64 * sizeof(T)) {
    for (uint64_t word = words[w]; word != 0; word &= word - 1, in += sizeof(T)) {
      std::memcpy(codes + sizeof(T) * static_cast<size_t>(__builtin_ctzll(word)), in, sizeof(T));
    }
  }
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

size_t code_bytes(int type) { return type == kF32 ? 4 : type == kF16 ? 2 : 1; }

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
    std::memcpy(stock, codes, columns * code_bytes(type));
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

size_t find_kept(int type, const uint8_t *codes, size_t columns, uint64_t *words) {
  size_t kept = 0;
  for (size_t at = 0; at < columns; at += 64) {
    const size_t here = columns - at < 64 ? columns - at : 64;
    const uint64_t word = word_of(type, codes + at * code_bytes(type), here);
    *words++ = word;
    kept += static_cast<size_t>(__builtin_popcountll(word));
  }
  return kept;
}

void store_kept(int type, const uint8_t *codes, const uint64_t *words, size_t count, uint8_t *out,
                int shift) {
  switch (type) {
    case kF32:
      return compact<uint32_t>(codes, words, count, out);
    case kF16:
      return compact<uint16_t>(codes, words, count, out);
    case kQ8_0:
      return compact<uint8_t>(codes, words, count, out);
    default:
      for (size_t w = 0; w < count; ++w, codes += 64) {
        for (uint64_t word = words[w]; word != 0; word &= word - 1, ++out) {
          *out = static_cast<uint8_t>(*out | codes[__builtin_ctzll(word)] << shift);
        }
      }
  }
}

void load_kept(int type, const uint8_t *in, const uint64_t *words, size_t count, int shift, uint8_t *codes) {
  switch (type) {
    case kF32:
      return scatter<uint32_t>(in, words, count, codes);
    case kF16:
      return scatter<uint16_t>(in, words, count, codes);
    case kQ8_0:
      return scatter<uint8_t>(in, words, count, codes);
    default:
      for (size_t w = 0; w < count; ++w, codes += 64) {
        for (uint64_t word = words[w]; word != 0; word &= word - 1, ++in) {
          codes[__builtin_ctzll(word)] = (*in >> shift) & 15;
        }
      }
  }
}

void store_linear_table(uint8_t *table) {
  for (int code = 0; code < 16; ++code) {
    table[code] = static_cast<uint8_t>(code < 8 ? code : code - 16);
  }
}

void store_dense_i4(const uint8_t *codes, size_t columns, uint8_t *out) {
  for (size_t at = 0; at < columns; at += kDenseBlock) {
    const size_t n = columns - at < kDenseBlock ? columns - at : kDenseBlock, half = (n + 1) / 2;
    for (size_t j = 0; j < half; ++j) {
      const int high = half + j < n ? codes[at + half + j] << 4 : 0;
      *out++ = static_cast<uint8_t>(codes[at + j] | high);
    }
  }
}

void load_dense_i4(const uint8_t *in, size_t columns, uint8_t *codes) {
  for (size_t at = 0; at < columns; at += kDenseBlock) {
    const size_t n = columns - at < kDenseBlock ? columns - at : kDenseBlock, half = (n + 1) / 2;
    for (size_t j = 0; j < half; ++j, ++in) {
      codes[at + j] = *in & 15;
      if (half + j < n) {
        codes[at + half + j] = *in >> 4;
      }
    }
  }
}

}  // namespace losa::ggml
