// The AVX-512 intrinsics that the kernels use, in plain C++ after Intel's description of each: so that the
// logic of the AVX-512 targets is tested on CPUs that lack them. Speed does not matter here. CMake puts this
// file before their sources where LOSA_EMULATE is on; they name it nowhere.
#ifndef LOSA_EMULATED_AVX512_H
#define LOSA_EMULATED_AVX512_H

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace losa_emulated {

template <typename T, typename V>
struct Lanes {
  static constexpr int count = sizeof(V) / sizeof(T);
  T at[count];
  explicit Lanes(V v) { std::memcpy(at, &v, sizeof v); }
  Lanes() : at{} {}
  operator V() const {
    V v;
    std::memcpy(&v, at, sizeof v);
    return v;
  }
};
using I8 = Lanes<int8_t, __m512i>;
using U8 = Lanes<uint8_t, __m512i>;
using U16 = Lanes<uint16_t, __m512i>;
using I32 = Lanes<int32_t, __m512i>;
using F32 = Lanes<float, __m512>;

template <typename L, typename F>
L each(F f) {
  L out;
  for (int i = 0; i < L::count; ++i) {
    out.at[i] = static_cast<decltype(out.at[0] + 0)>(f(i));
  }
  return out;
}

inline __m512i loadu_si512(const void *p) {
  __m512i v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_si512(void *p, __m512i v) { std::memcpy(p, &v, sizeof v); }
inline __m512 loadu_ps(const void *p) {
  __m512 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void storeu_ps(void *p, __m512 v) { std::memcpy(p, &v, sizeof v); }
inline __m512i setzero_si512() { return I32(); }
inline __m512 setzero_ps() { return F32(); }
inline __m512i set1_epi8(int v) {
  return each<I8>([&](int) { return static_cast<int8_t>(v); });
}
inline __m512i set1_epi32(int v) {
  return each<I32>([&](int) { return v; });
}
inline __m512 set1_ps(float v) {
  return each<F32>([&](int) { return v; });
}
inline __m512i xor_si512(__m512i a, __m512i b) {
  return each<I32>([&](int i) { return I32(a).at[i] ^ I32(b).at[i]; });
}
inline __m512i and_si512(__m512i a, __m512i b) {
  return each<I32>([&](int i) { return I32(a).at[i] & I32(b).at[i]; });
}
inline __m512i or_si512(__m512i a, __m512i b) {
  return each<I32>([&](int i) { return I32(a).at[i] | I32(b).at[i]; });
}
inline __m512i sub_epi32(__m512i a, __m512i b) {
  return each<I32>([&](int i) { return I32(a).at[i] - I32(b).at[i]; });
}
inline __m512i slli_epi32(__m512i a, unsigned n) {
  return each<I32>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(I32(a).at[i]) << n); });
}
inline __m512i srli_epi32(__m512i a, unsigned n) {
  return each<I32>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(I32(a).at[i]) >> n); });
}
inline __m512i sllv_epi32(__m512i a, __m512i n) {
  return each<I32>([&](int i) {
    const auto count = static_cast<uint32_t>(I32(n).at[i]);
    return count > 31 ? 0 : static_cast<int32_t>(static_cast<uint32_t>(I32(a).at[i]) << count);
  });
}
inline __m512i rorv_epi32(__m512i a, __m512i n) {
  return each<I32>([&](int i) {
    const auto count = static_cast<uint32_t>(I32(n).at[i]) & 31u, value = static_cast<uint32_t>(I32(a).at[i]);
    return static_cast<int32_t>(value >> count | value << (32u - count & 31u));
  });
}
inline __m512i cvtepu16_epi32(__m256i a) {
  uint16_t words[16];
  std::memcpy(words, &a, sizeof words);
  return each<I32>([&](int i) { return words[i]; });
}
inline __m512i permutexvar_epi32(__m512i order, __m512i a) {
  return each<I32>([&](int i) { return I32(a).at[I32(order).at[i] & 15]; });
}
template <typename... Int>
inline __m512i setr_epi32(Int... at) {
  const int32_t all[] = {at...};
  static_assert(sizeof all == 64);
  return loadu_si512(all);
}
inline __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  return each<I32>([&](int i) {
    uint32_t out = 0;
    for (int bit = 0; bit < 32; ++bit) {
      const auto of = [&](__m512i v) { return static_cast<unsigned>(I32(v).at[i]) >> bit & 1u; };
      out |= (static_cast<unsigned>(table) >> (of(a) << 2 | of(b) << 1 | of(c)) & 1u) << bit;
    }
    return static_cast<int32_t>(out);
  });
}
inline __m512i add_epi8(__m512i a, __m512i b) {
  return each<U8>([&](int i) { return static_cast<uint8_t>(U8(a).at[i] + U8(b).at[i]); });
}
inline __m512i add_epi32(__m512i a, __m512i b) {
  return each<I32>([&](int i) { return I32(a).at[i] + I32(b).at[i]; });
}
inline __m512i dpbusd_epi32(__m512i acc, __m512i a, __m512i b) {
  return each<I32>([&](int i) {
    int sum = I32(acc).at[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) {
      sum += U8(a).at[j] * I8(b).at[j];
    }
    return sum;
  });
}
inline __m512i srli_epi16(__m512i a, unsigned n) {
  return each<U16>([&](int i) { return static_cast<uint16_t>(U16(a).at[i] >> n); });
}
inline __m512i shuffle_epi8(__m512i a, __m512i b) {
  return each<U8>([&](int i) {
    const uint8_t index = U8(b).at[i];
    return index & 0x80 ? uint8_t{0} : U8(a).at[(i & ~15) | (index & 15)];
  });
}
inline __m512i maskz_expand_epi8(uint64_t k, __m512i a) {
  int next = 0;
  return each<U8>([&](int i) { return k >> i & 1 ? U8(a).at[next++] : uint8_t{0}; });
}
inline __m512 maskz_expand_ps(__mmask16 k, __m512 a) {
  int next = 0;
  return each<F32>([&](int i) { return k >> i & 1 ? F32(a).at[next++] : 0.0f; });
}
inline __m512i broadcast_i32x4(__m128i a) {
  I32 out;
  for (int i = 0; i < 4; ++i) {
    std::memcpy(out.at + 4 * i, &a, sizeof a);
  }
  return out;
}
inline __m512i broadcast_i64x4(__m256i a) {
  I32 out;
  std::memcpy(out.at, &a, sizeof a);
  std::memcpy(out.at + 8, &a, sizeof a);
  return out;
}
inline __m512 maskz_loadu_ps(__mmask16 k, const float *p) {
  return each<F32>([&](int i) { return k >> i & 1 ? p[i] : 0.0f; });
}
// In every quarter the low or high two of four dwords of both, or one of two qwords.
inline __m512i unpack_epi32(__m512i a, __m512i b, int high) {
  return each<I32>([&](int i) { return I32(i & 1 ? b : a).at[(i & 12) + 2 * high + (i & 3) / 2]; });
}
inline __m512i unpack_epi64(__m512i a, __m512i b, int high) {
  return each<I32>([&](int i) { return I32(i & 2 ? b : a).at[(i & 12) + 2 * high + (i & 1)]; });
}
inline __m512i unpacklo_epi32(__m512i a, __m512i b) { return unpack_epi32(a, b, 0); }
inline __m512i unpackhi_epi32(__m512i a, __m512i b) { return unpack_epi32(a, b, 1); }
inline __m512i unpacklo_epi64(__m512i a, __m512i b) { return unpack_epi64(a, b, 0); }
inline __m512i unpackhi_epi64(__m512i a, __m512i b) { return unpack_epi64(a, b, 1); }
inline __m512i shuffle_i32x4(__m512i a, __m512i b, int order) {
  return each<I32>([&](int i) {
    const int quarter = order >> i / 4 * 2 & 3;
    return I32(i < 8 ? a : b).at[4 * quarter + (i & 3)];
  });
}
inline __m512i castsi256_si512(__m256i a) {
  __m512i out = set1_epi8(0x5a);  // above there may be anything
  std::memcpy(&out, &a, sizeof a);
  return out;
}
inline __m512i maskz_loadu_epi32(__mmask16 k, const int32_t *p) {
  return each<I32>([&](int i) { return k >> i & 1 ? p[i] : 0; });
}
inline __m256i maskz_loadu_epi16(__mmask16 k, const void *p) {
  uint16_t out[16] = {};
  for (int i = 0; i < 16; ++i) {
    if (k >> i & 1) {
      std::memcpy(out + i, static_cast<const uint8_t *>(p) + 2 * i, 2);
    }
  }
  __m256i v;
  std::memcpy(&v, out, sizeof v);
  return v;
}
inline __m512 mask_blend_ps(__mmask16 k, __m512 a, __m512 b) {
  return each<F32>([&](int i) { return k >> i & 1 ? F32(b).at[i] : F32(a).at[i]; });
}
inline __m512 mul_ps(__m512 a, __m512 b) {
  return each<F32>([&](int i) { return F32(a).at[i] * F32(b).at[i]; });
}
inline __m512 add_ps(__m512 a, __m512 b) {
  return each<F32>([&](int i) { return F32(a).at[i] + F32(b).at[i]; });
}
inline __m512 max_ps(__m512 a, __m512 b) {
  return each<F32>([&](int i) { return F32(a).at[i] > F32(b).at[i] ? F32(a).at[i] : F32(b).at[i]; });
}
inline __m512 abs_ps(__m512 a) {
  return each<F32>([&](int i) { return std::fabs(F32(a).at[i]); });
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return each<F32>([&](int i) { return std::fma(F32(a).at[i], F32(b).at[i], F32(c).at[i]); });
}
inline __m512 cvtepi32_ps(__m512i a) {
  return each<F32>([&](int i) { return static_cast<float>(I32(a).at[i]); });
}
inline __m512i cvtps_epi32(__m512 a) {
  return each<I32>([&](int i) { return static_cast<int32_t>(std::lrint(F32(a).at[i])); });
}
inline __m128i cvtsepi32_epi8(__m512i a) {
  int8_t out[16];
  for (int i = 0; i < 16; ++i) {
    const int32_t v = I32(a).at[i];
    out[i] = static_cast<int8_t>(v > 127 ? 127 : v < -128 ? -128 : v);
  }
  __m128i v;
  std::memcpy(&v, out, sizeof v);
  return v;
}
inline __m512 cvtph_ps(__m256i a) {
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(a));
  const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
  F32 out;
  std::memcpy(out.at, &low, sizeof low);
  std::memcpy(out.at + 8, &high, sizeof high);
  return out;
}
inline float reduce_add_ps(__m512 a) {
  float sum = 0.0f;
  for (float v : F32(a).at) {
    sum += v;
  }
  return sum;
}
inline float reduce_max_ps(__m512 a) {
  float top = F32(a).at[0];
  for (float v : F32(a).at) {
    top = v > top ? v : top;
  }
  return top;
}
inline int reduce_add_epi32(__m512i a) {
  int sum = 0;
  for (int v : I32(a).at) {
    sum += v;
  }
  return sum;
}

}  // namespace losa_emulated

#define _mm512_loadu_si512 losa_emulated::loadu_si512
#define _mm512_loadu_ps losa_emulated::loadu_ps
#define _mm512_load_ps losa_emulated::loadu_ps
#define _mm512_storeu_ps losa_emulated::storeu_ps
#define _mm512_setzero_si512 losa_emulated::setzero_si512
#define _mm512_setzero_ps losa_emulated::setzero_ps
#define _mm512_set1_epi8 losa_emulated::set1_epi8
#define _mm512_set1_epi32 losa_emulated::set1_epi32
#define _mm512_set1_ps losa_emulated::set1_ps
#define _mm512_xor_si512 losa_emulated::xor_si512
#define _mm512_and_si512 losa_emulated::and_si512
#define _mm512_storeu_si512 losa_emulated::store_si512
#define _mm512_or_si512 losa_emulated::or_si512
#define _mm512_sub_epi32 losa_emulated::sub_epi32
#define _mm512_slli_epi32 losa_emulated::slli_epi32
#define _mm512_srli_epi32 losa_emulated::srli_epi32
#define _mm512_sllv_epi32 losa_emulated::sllv_epi32
#define _mm512_rorv_epi32 losa_emulated::rorv_epi32
#define _mm512_cvtepu16_epi32 losa_emulated::cvtepu16_epi32
#define _mm512_permutexvar_epi32 losa_emulated::permutexvar_epi32
#define _mm512_setr_epi32 losa_emulated::setr_epi32
#define _mm512_ternarylogic_epi32 losa_emulated::ternarylogic_epi32
#define _mm512_add_epi8 losa_emulated::add_epi8
#define _mm512_add_epi32 losa_emulated::add_epi32
#define _mm512_dpbusd_epi32 losa_emulated::dpbusd_epi32
#define _mm512_srli_epi16 losa_emulated::srli_epi16
#define _mm512_shuffle_epi8 losa_emulated::shuffle_epi8
#define _mm512_maskz_expand_epi8 losa_emulated::maskz_expand_epi8
#define _mm512_maskz_expand_ps losa_emulated::maskz_expand_ps
#define _mm512_broadcast_i32x4 losa_emulated::broadcast_i32x4
#define _mm512_broadcast_i64x4 losa_emulated::broadcast_i64x4
#define _mm512_maskz_loadu_ps losa_emulated::maskz_loadu_ps
#define _mm512_unpacklo_epi32 losa_emulated::unpacklo_epi32
#define _mm512_unpackhi_epi32 losa_emulated::unpackhi_epi32
#define _mm512_unpacklo_epi64 losa_emulated::unpacklo_epi64
#define _mm512_unpackhi_epi64 losa_emulated::unpackhi_epi64
#undef _mm512_shuffle_i32x4  // a macro in clang's header
#define _mm512_shuffle_i32x4 losa_emulated::shuffle_i32x4
#define _mm512_castsi256_si512 losa_emulated::castsi256_si512
#define _mm512_maskz_loadu_epi32 losa_emulated::maskz_loadu_epi32
#define _mm256_maskz_loadu_epi16 losa_emulated::maskz_loadu_epi16
#define _mm512_mask_blend_ps losa_emulated::mask_blend_ps
#define _mm512_mul_ps losa_emulated::mul_ps
#define _mm512_add_ps losa_emulated::add_ps
#define _mm512_max_ps losa_emulated::max_ps
#define _mm512_abs_ps losa_emulated::abs_ps
#define _mm512_fmadd_ps losa_emulated::fmadd_ps
#define _mm512_cvtepi32_ps losa_emulated::cvtepi32_ps
#define _mm512_cvtps_epi32 losa_emulated::cvtps_epi32
#define _mm512_cvtsepi32_epi8 losa_emulated::cvtsepi32_epi8
#define _mm512_cvtph_ps losa_emulated::cvtph_ps
#define _mm512_reduce_add_ps losa_emulated::reduce_add_ps
#define _mm512_reduce_max_ps losa_emulated::reduce_max_ps
#define _mm512_reduce_add_epi32 losa_emulated::reduce_add_epi32

#endif
