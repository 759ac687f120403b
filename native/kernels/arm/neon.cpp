// NEON with the dot product extension (ARMv8.2): signed by signed bytes, so no offset is needed. There is no
// expand instruction: a mask byte selects one of 256 byte shuffles, as on AVX2.
#include <arm_neon.h>

#include "kernels/arm/neon_tiles.h"
#include "kernels/planes.h"
#include "kernels/shuffle_table.h"
#include "kernels/target.h"

namespace losa {
namespace {

struct Block {
  int8x16_t part[4];  // 64 positions
};

inline uint8x8_t place(unsigned mask, const uint8_t *p) {
  return vtbl1_u8(vld1_u8(p), vcreate_u8(kShuffle.control[mask & 255]));
}

// Bytes of the stream at `p` to the positions of `word`; `used` bytes were taken.
inline Block scatter(uint64_t word, const uint8_t *p, unsigned *used) {
  const uint64_t counts = vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(word))), 0);
  const uint64_t sums = counts * 0x0101010101010101u, before = sums << 8;
  *used = static_cast<unsigned>(sums >> 56);
  Block out;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned low = 16 * i, high = 16 * i + 8;
    out.part[i] = vreinterpretq_s8_u8(
        vcombine_u8(place(static_cast<unsigned>(word >> low), p + (before >> low & 255)),
                    place(static_cast<unsigned>(word >> high), p + (before >> high & 255))));
  }
  return out;
}

// The same count in every byte of the mask: the addresses do not wait for it.
inline Block scatter_fixed(uint64_t word, const uint8_t *p, unsigned count) {
  Block out;
  for (unsigned i = 0; i < 4; ++i) {
    const auto low = static_cast<unsigned>(word >> (16 * i));
    out.part[i] = vreinterpretq_s8_u8(
        vcombine_u8(place(low, p + 2 * i * count), place(low >> 8, p + (2 * i + 1) * count)));
  }
  return out;
}

inline unsigned count_per_byte(const losa_parts &p) {
  return p.layout == LOSA_NM && 8 % p.m == 0 ? 8u / p.m * p.n : 0;
}

inline int8x16_t table_of(const losa_parts &p) { return vld1q_s8(static_cast<const int8_t *>(p.table.data)); }

inline int8x16_t nibbles(int8x16_t bytes, bool high, int8x16_t levels) {
  const uint8x16_t raw = vreinterpretq_u8_s8(bytes);
  return vqtbl1q_s8(levels, high ? vshrq_n_u8(raw, 4) : vandq_u8(raw, vdupq_n_u8(15)));
}

// The codes number 16 i to 16 i + 15 of 128 of a dense i3 row: 32 bytes of lower bits, 16 of the highest.
inline uint8x16_t codes_of_planes(const uint8_t *bytes, size_t i) {
  return join_planes(vld1q_u8(bytes + i % 2 * 16), i / 2, vld1q_u8(bytes + 32), i);
}

inline void unpack_block(const uint8_t *planes, uint8_t *codes) {
  for (size_t i = 0; i < kPadding / 16; ++i) {
    vst1q_u8(codes + 16 * i, codes_of_planes(planes, i));
  }
}

// One row of any layout as levels, 64 positions at a time.
class Row {
 public:
  Row(const losa_tensor &t, size_t row)
      : parts_(t.parts),
        dense_(t.parts.layout == LOSA_DENSE),
        grouped_(is_grouped(t.parts)),
        planes_(!dense_ && t.parts.value_type == LOSA_I3 && !in_pairs(t.parts)),
        pair_(t.parts.value_type == LOSA_I3 && in_pairs(t.parts)),
        high_(row % 2 != 0 && !planes_),
        count_(count_per_byte(t.parts)),
        positions_(dense_ ? Positions() : Positions(t.parts, row)),
        at_(static_cast<const uint8_t *>(t.parts.values.data) +
            (dense_ ? row * dense_row_bytes(t.parts) : row_start(t, row))),
        kept_(at_, planes_ ? stream_row_bytes(t, row) : 0),
        kept_of_pair_(at_, pair_ ? stream_row_bytes(t, row) : 0),
        levels_(grouped_ ? table_of(t.parts) : vdupq_n_s8(0)) {}

  size_t blocks() const { return (parts_.columns + kBlock - 1) / kBlock; }

  Block next(size_t block) {
    if (dense_) {
      return grouped_ ? dense_codes(block * kBlock) : dense_levels(block * kBlock);
    }
    const uint64_t word = positions_.word(block);
    unsigned used = 8 * count_;
    const uint8_t *from = planes_ ? kept_.next() : pair_ ? kept_of_pair_.next() : at_;
    Block found = count_ ? scatter_fixed(word, from, count_) : scatter(word, from, &used);
    at_ += used;
    kept_.take(used);
    kept_of_pair_.take(used);
    if (grouped_) {
      for (auto &part : found.part) {
        part = nibbles(part, high_, levels_);
      }
    }
    return found;
  }

 private:
  static Block load(const uint8_t *p) {
    const auto *levels = reinterpret_cast<const int8_t *>(p);
    return {{vld1q_s8(levels), vld1q_s8(levels + 16), vld1q_s8(levels + 32), vld1q_s8(levels + 48)}};
  }

  Block dense_levels(size_t start) const {
    if (start + kBlock <= parts_.columns) {
      return load(at_ + start);
    }
    uint8_t copy[kBlock] = {};
    std::memcpy(copy, at_ + start, parts_.columns - start);
    return load(copy);
  }

  Block dense_codes(size_t start) const {
    const bool planes = parts_.value_type == LOSA_I3;
    const size_t first = start / kPadding * kPadding, left = parts_.columns - first;
    const uint8_t *bytes = at_ + (planes ? first / 8 * 3 : first / 2);
    Block found;
    if (left < kPadding) {
      uint8_t codes[kPadding] = {};
      (planes ? split_planes : split_dense_tail)(bytes, left, codes);
      found = load(codes + (start - first));
      for (auto &part : found.part) {
        part = nibbles(part, false, levels_);
      }
    } else if (planes) {
      for (size_t i = 0; i < 4; ++i) {
        found.part[i] = vqtbl1q_s8(levels_, codes_of_planes(bytes, (start - first) / 16 + i));
      }
    } else {
      found = load(bytes);
      for (auto &part : found.part) {
        part = nibbles(part, start != first, levels_);
      }
    }
    return found;
  }

  const losa_parts &parts_;
  bool dense_, grouped_, planes_, pair_, high_;
  unsigned count_;
  Positions positions_;
  const uint8_t *at_;
  KeptCodes<unpack_block, 4> kept_;  // of i3, which has no use for at_
  KeptPairs<4> kept_of_pair_;        // of i3 whose rows share a mask in pairs
  int8x16_t levels_;
};

inline float row_scale(const losa_parts &p, size_t row, size_t g) {
  if (p.value_type == LOSA_I8) {
    return load_scale(p, row);
  }
  return g < weight_groups(p) ? load_scale(p, row * weight_groups(p) + g) : 0.0f;
}

inline int32x4_t dot(int32x4_t acc, int8x16_t w, const int8_t *x) { return vdotq_s32(acc, w, vld1q_s8(x)); }

// One row times one token.
float dot_row(const losa_tensor &t, size_t r, const Activations &a) {
  const losa_parts &p = t.parts;
  const size_t group = activation_group(p);
  Row row(t, r);
  float32x4_t total = vdupq_n_f32(0.0f);
  int32x4_t acc = vdupq_n_s32(0);
  const auto finish = [&](size_t g) {
    total = vfmaq_n_f32(total, vcvtq_f32_s32(acc), a.scale[g] * row_scale(p, r, g));
    acc = vdupq_n_s32(0);
  };
  for (size_t block = 0, blocks = row.blocks(); block < blocks; ++block) {
    const Block w = row.next(block);
    const int8_t *x = a.q + block * kBlock;
    for (size_t i = 0; i < 4; ++i) {
      acc = dot(acc, w.part[i], x + 16 * i);
      const size_t end = block * kBlock + 16 * (i + 1);
      if (end % group == 0 || (block + 1 == blocks && i == 3)) {
        finish((end - 1) / group);
      }
    }
  }
  return vaddvq_f32(total);
}

void expand_levels(const losa_tensor &t, size_t r, int8_t *out) {
  Row row(t, r);
  const size_t blocks = row.blocks();
  for (size_t block = 0; block < blocks; ++block) {
    const Block w = row.next(block);
    for (size_t i = 0; i < 4; ++i) {
      vst1q_s8(out + block * kBlock + 16 * i, w.part[i]);
    }
  }
  std::memset(out + blocks * kBlock, 0, padded_columns(t.parts) - blocks * kBlock);
}

// Two expanded rows times four tokens.
void levels_panel(const losa_tensor &t, const int8_t *panel, size_t first, size_t rows, const Activations &a,
                  float *y, size_t ldy) {
  const size_t group = activation_group(t.parts);
  for (size_t token = 0; token < a.tokens; token += 4) {
    for (size_t r = 0; r < rows; r += 2) {
      // Past the ends the last row or token is repeated and its result not stored.
      size_t row[2] = {r, r + 1 < rows ? r + 1 : r}, at[4];
      for (size_t k = 0; k < 4; ++k) {
        at[k] = token + k < a.tokens ? token + k : a.tokens - 1;
      }
      float32x4_t total[2][4];
      for (size_t i = 0; i < 8; ++i) {
        total[i / 4][i % 4] = vdupq_n_f32(0.0f);
      }
      for (size_t g = 0; g < a.groups; ++g) {
        int32x4_t acc[2][4];
        for (size_t i = 0; i < 8; ++i) {
          acc[i / 4][i % 4] = vdupq_n_s32(0);
        }
        for (size_t i = g * group; i < (g + 1) * group; i += 16) {
          const int8x16_t w0 = vld1q_s8(panel + row[0] * a.padded + i),
                          w1 = vld1q_s8(panel + row[1] * a.padded + i);
          for (size_t k = 0; k < 4; ++k) {
            const int8x16_t x = vld1q_s8(a.q + at[k] * a.padded + i);
            acc[0][k] = vdotq_s32(acc[0][k], w0, x);
            acc[1][k] = vdotq_s32(acc[1][k], w1, x);
          }
        }
        for (size_t i = 0; i < 2; ++i) {
          const float scale = row_scale(t.parts, first + row[i], g);
          for (size_t k = 0; k < 4; ++k) {
            const float factor = scale * a.scale[at[k] * a.groups + g];
            total[i][k] = vfmaq_n_f32(total[i][k], vcvtq_f32_s32(acc[i][k]), factor);
          }
        }
      }
      for (size_t k = 0; k < 4 && token + k < a.tokens; ++k) {
        for (size_t i = 0; i < 2 && r + i < rows; ++i) {
          y[(token + k) * ldy + first + r + i] = vaddvq_f32(total[i][k]);
        }
      }
    }
  }
}

// The kept values of a row as f32, eight positions at a time, zero elsewhere.
void expand_values(const losa_tensor &t, size_t row, float *out) {
  const losa_parts &p = t.parts;
  const size_t size = value_bytes(p.value_type);
  const auto *values = static_cast<const uint8_t *>(p.values.data);
  const auto value = [&](const uint8_t *at) {
    if (size == 4) {
      float f;
      std::memcpy(&f, at, 4);
      return f;
    }
    uint16_t half;
    std::memcpy(&half, at, 2);
    return half_to_float(half);
  };
  std::memset(out, 0, padded_columns(p) * sizeof(float));
  if (p.layout == LOSA_DENSE) {
    for (size_t i = 0; i < p.columns; ++i) {
      out[i] = value(values + size * (row * p.columns + i));
    }
    return;
  }
  const Positions positions(p, row);
  const uint8_t *at = values + size * row_start(t, row);
  for (size_t block = 0; block < positions.blocks; ++block) {
    for (uint64_t word = positions.word(block); word != 0; word &= word - 1, at += size) {
      out[block * kBlock + static_cast<size_t>(__builtin_ctzll(word))] = value(at);
    }
  }
}

void values_panel(const losa_tensor &, const float *panel, size_t first, size_t rows, const Activations &a,
                  float *y, size_t ldy) {
  for (size_t token = 0; token < a.tokens; ++token) {
    const float *x = a.x + token * a.padded;
    for (size_t r = 0; r < rows; ++r) {
      const float *w = panel + r * a.padded;
      float32x4_t acc[2] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
      for (size_t i = 0; i < a.padded; i += 8) {
        acc[0] = vfmaq_f32(acc[0], vld1q_f32(w + i), vld1q_f32(x + i));
        acc[1] = vfmaq_f32(acc[1], vld1q_f32(w + i + 4), vld1q_f32(x + i + 4));
      }
      y[token * ldy + first + r] = vaddvq_f32(vaddq_f32(acc[0], acc[1]));
    }
  }
}

void matvec_levels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t,
                   void *) {
  for (size_t row = begin; row < end; ++row) {
    y[row] = dot_row(t, row, a);
  }
}

void quantize_group(const float *x, size_t length, int8_t *q, float *scale, int32_t *bias) {
  float32x4_t peak = vdupq_n_f32(0.0f);
  for (size_t i = 0; i < length; i += 4) {
    peak = vmaxq_f32(peak, vabsq_f32(vld1q_f32(x + i)));
  }
  const float top = vmaxvq_f32(peak);
  *scale = top / 127.0f;
  const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
  int32x4_t total = vdupq_n_s32(0);
  for (size_t i = 0; i < length; i += 8) {
    const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse));
    const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), inverse));
    total = vaddq_s32(total, vaddq_s32(low, high));
    vst1_s8(q + i, vqmovn_s16(vcombine_s16(vqmovn_s32(low), vqmovn_s32(high))));
  }
  *bias = -128 * vaddvq_s32(total);
}

constexpr Multiply *multiply_values = multiply_panels<float, expand_values, values_panel>;

constexpr Target table() {
  Target target{"neon", &kScalar};
  target.quantize = quantize_groups<quantize_group>;
  target.matvec_levels = matvec_levels;
  target.matmul_levels = multiply_panels<int8_t, expand_levels, levels_panel>;
  target.matvec_values = multiply_values;
  target.matmul_values = multiply_values;
  target.multiply_tiles = multiply_tiles;
  target.multiply_windows = multiply_windows;
  return target;
}

}  // namespace

constexpr Target kNeon = table();

}  // namespace losa
