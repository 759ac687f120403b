#include "format/codes.h"

#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "format/layout.h"

namespace losa::format {
namespace {

constexpr size_t kDenseBlock = 128;  // positions of a block of dense i4

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

bool is_zero(losa_value_type type, const uint8_t *codes, size_t at) {
  switch (type) {
    case LOSA_F32:
      return (load<uint32_t>(codes + 4 * at) & 0x7fffffff) == 0;
    case LOSA_F16:
      return (load<uint16_t>(codes + 2 * at) & 0x7fff) == 0;
    default:
      return codes[at] == 0;
  }
}

uint64_t word_of(losa_value_type type, const uint8_t *codes, size_t positions) {
  uint64_t word = 0;
#if defined(__SSE2__)
  if (positions == 64 && type != LOSA_F32 && type != LOSA_F16) {
    const __m128i zero = _mm_setzero_si128();
    for (unsigned i = 0; i < 64; i += 16) {
      const __m128i here = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + i));
      const auto zeros = static_cast<unsigned>(_mm_movemask_epi8(_mm_cmpeq_epi8(here, zero)));
      word |= uint64_t{~zeros & 0xffff} << i;
    }
    return word;
  }
#endif
  if (positions == 64 && type != LOSA_F32) {
    const unsigned step = type == LOSA_F16 ? 4 : 8;
    for (unsigned i = 0; i < 64; i += step, codes += 8) {
      const auto x = load<uint64_t>(codes);
      word |= (type == LOSA_F16 ? nonzero_halves(x) : nonzero_bytes(x)) << i;
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

}  // namespace

size_t find_kept(losa_value_type type, const uint8_t *codes, size_t columns, uint64_t *words) {
  size_t kept = 0;
  for (size_t at = 0; at < columns; at += 64) {
    const size_t here = columns - at < 64 ? columns - at : 64;
    const uint64_t word = word_of(type, codes + at * value_bytes(type), here);
    *words++ = word;
    kept += static_cast<size_t>(__builtin_popcountll(word));
  }
  return kept;
}

void store_kept(losa_value_type type, const uint8_t *codes, const uint64_t *words, size_t count, uint8_t *out,
                int shift) {
  switch (type) {
    case LOSA_F32:
      return compact<uint32_t>(codes, words, count, out);
    case LOSA_F16:
      return compact<uint16_t>(codes, words, count, out);
    case LOSA_I8:
      return compact<uint8_t>(codes, words, count, out);
    case LOSA_I4:
      for (size_t w = 0; w < count; ++w, codes += 64) {
        for (uint64_t word = words[w]; word != 0; word &= word - 1, ++out) {
          *out = static_cast<uint8_t>(*out | codes[__builtin_ctzll(word)] << shift);
        }
      }
  }
}

void load_kept(losa_value_type type, const uint8_t *in, const uint64_t *words, size_t count, int shift,
               uint8_t *codes) {
  switch (type) {
    case LOSA_F32:
      return scatter<uint32_t>(in, words, count, codes);
    case LOSA_F16:
      return scatter<uint16_t>(in, words, count, codes);
    case LOSA_I8:
      return scatter<uint8_t>(in, words, count, codes);
    case LOSA_I4:
      for (size_t w = 0; w < count; ++w, codes += 64) {
        for (uint64_t word = words[w]; word != 0; word &= word - 1, ++in) {
          codes[__builtin_ctzll(word)] = (*in >> shift) & 15;
        }
      }
  }
}

size_t dense_row_bytes(losa_value_type type, size_t columns) {
  return type == LOSA_I4 ? (columns + 1) / 2 : columns * value_bytes(type);
}

void store_dense(losa_value_type type, const uint8_t *codes, size_t columns, uint8_t *out) {
  if (type != LOSA_I4) {
    std::memcpy(out, codes, dense_row_bytes(type, columns));
    return;
  }
  for (size_t at = 0; at < columns; at += kDenseBlock) {
    const size_t n = columns - at < kDenseBlock ? columns - at : kDenseBlock, half = (n + 1) / 2;
    for (size_t j = 0; j < half; ++j) {
      const int high = half + j < n ? codes[at + half + j] << 4 : 0;
      *out++ = static_cast<uint8_t>(codes[at + j] | high);
    }
  }
}

void load_dense(losa_value_type type, const uint8_t *in, size_t columns, uint8_t *codes) {
  if (type != LOSA_I4) {
    std::memcpy(codes, in, dense_row_bytes(type, columns));
    return;
  }
  for (size_t at = 0; at < columns; at += kDenseBlock) {
    const size_t n = columns - at < kDenseBlock ? columns - at : kDenseBlock;
    split_dense_tail(in + at / 2, n, codes + at);
  }
}

void store_linear_table(uint8_t *table) {
  for (int code = 0; code < 16; ++code) {
    table[code] = static_cast<uint8_t>(code < 8 ? code : code - 16);
  }
}

}  // namespace losa::format
