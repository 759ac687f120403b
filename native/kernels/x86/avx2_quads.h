// Lines of N:4 and of windows in AVX2: places and levels of four steps, of which a few operations serve two.
#ifndef LOSA_AVX2_QUADS_H
#define LOSA_AVX2_QUADS_H

#include "kernels/x86/avx2_slots.h"

namespace losa {
namespace {

// Places of the slots of step S of a line among the positions of load_step_of: byte shuffles look at the low
// nibble of an index and at bit 7, and the other bits may hold anything. `even` are the places of the steps 0
// and 2 in the nibbles of a byte, `odd` those of 1 and 3.
template <int Form>
struct LinePlaces {
  explicit LinePlaces(__m256i line) {
    const __m256i two = _mm256_set1_epi8(0x33);
    even = _mm256_and_si256(line, two);
    odd = _mm256_and_si256(_mm256_srli_epi16(line, 2), two);
    if (Form != 2) {  // the second slot of a row is in the second of two quads, or in a window two behind
      const __m256i second = _mm256_set1_epi16(Form == kWindows ? 0x2200 : 0x4400);
      even = _mm256_add_epi8(even, second);
      odd = _mm256_add_epi8(odd, second);
    }
  }

  template <int S>
  inline LOSA_ALWAYS_INLINE __m256i of() const {
    return S < 2 ? (S == 0 ? even : odd) : _mm256_srli_epi16(S == 2 ? even : odd, 4);
  }

  __m256i even, odd;
};

// The slots of a line.
template <losa_value_type T, bool Linear>
struct LineSlots {
  LineSlots(const ValueLines<T> &at, __m256i levels) : values(at.values), levels(levels) {
    if (T == LOSA_I3) {
      // Codes in the nibbles of a byte, as `even` and `odd` of LinePlaces; the highest bits by table.
      const __m256i low = load_step(at.values), two = _mm256_set1_epi8(0x33);
      const __m256i top = _mm256_and_si256(at.highest(), _mm256_set1_epi8(15));
      constexpr long long kFirst = 0x0404000004040000, kSecond = 0x4444404044444040;
      const __m256i of_even = _mm256_set1_epi64x(0x4440444004000400);
      const __m256i of_odd = _mm256_set_epi64x(kSecond, kFirst, kSecond, kFirst);
      even = _mm256_or_si256(_mm256_and_si256(low, two), _mm256_shuffle_epi8(of_even, top));
      odd =
          _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 2), two), _mm256_shuffle_epi8(of_odd, top));
    }
  }

  template <int S>
  inline LOSA_ALWAYS_INLINE Slots of(__m256i at) const {
    if (T != LOSA_I3) {
      return load_short<T, Linear, S>(values, levels, at, levels);
    }
    const __m256i two = S % 2 ? odd : even;
    const __m256i level = _mm256_shuffle_epi8(levels, S < 2 ? two : _mm256_srli_epi16(two, 4));
    return {at, _mm256_abs_epi8(level), level};
  }

  const uint8_t *values;
  __m256i levels, even, odd;
};

}  // namespace
}  // namespace losa

#endif
