// Two rows of levels at a time in AVX-512 with VBMI2 and VNNI: each by itself, or a pair that shares a mask.
#ifndef LOSA_AVX512_TWO_ROWS_H
#define LOSA_AVX512_TWO_ROWS_H

#include <type_traits>

#include "kernels/tag.h"
#include "kernels/x86/avx512_rows.h"

namespace losa {
namespace {

struct Two {
  __m512i even, odd;
};

// Factors of two rows, each by itself. With the same row twice, the odd ones mean nothing, here and below.
template <typename A, typename B = A>
class TwoRows {
 public:
  static constexpr Levels kLevels = A::kLevels;
  static constexpr bool kMasked = A::kMasked, kShared = false;
  static constexpr unsigned kLines = A::kLines;
  static constexpr float kOddScaled = B::kScaled;

  static size_t start(const Matrix512 &m, size_t row) { return A::start(m, row); }
  static size_t whole_runs(const Matrix512 &m) { return A::whole_runs(m); }

  TwoRows(const Matrix512 &m, size_t even, size_t odd) : even_(m, even), odd_(m, odd) {}

  template <bool Second, bool Whole>
  Two next(size_t block) {
    return {even_.template next<Second, Whole>(block), odd_.template next<Second, Whole>(block)};
  }

  template <bool Second, bool Whole>
  Two next_scaled(size_t block) {
    return {even_.template next_scaled<Second, Whole>(block),
            odd_.template next_scaled<Second, Whole>(block)};
  }

 private:
  A even_;
  B odd_;
};

// What a pair keeps, of which place() finds the factors of the next `count` = 1 bits of a mask. I8: each row
// has bytes of its own, at the same distance all along.
class KeptLevels {
 public:
  static constexpr Levels kLevels = Levels::kI8;
  static constexpr float kOddScaled = 1.0f;

  KeptLevels(const Matrix512 &m, size_t even, size_t odd)
      : at_(m.values + m.start(even, false)), odd_(m.start(odd, false) - m.start(even, false)) {}

  template <bool Scaled>
  Two place(uint64_t mask, unsigned count) {
    const uint8_t *at = at_;
    at_ += count;
    return {as_factor(expanded_from(at, mask)), as_factor(expanded_from(at + odd_, mask))};
  }

 private:
  const uint8_t *at_;
  size_t odd_;
};

// I4: nibbles of the same bytes.
template <Levels How>
class KeptNibbles {
 public:
  static constexpr Levels kLevels = How;
  static constexpr float kOddScaled = How == Levels::kRaised ? kInPlace : 1.0f;

  KeptNibbles(const Matrix512 &m, size_t even, size_t) : m_(m), at_(m.values + m.start(even, true)) {}

  template <bool Scaled>
  Two place(uint64_t mask, unsigned count) {
    const __m512i bytes = expanded_from(at_, mask);
    at_ += count;
    return {factors_of<How>(bytes, false, m_.levels), Scaled && How == Levels::kRaised
                                                          ? raised_in_place(bytes)
                                                          : factors_of<How>(bytes, true, m_.levels)};
  }

 private:
  const Matrix512 &m_;
  const uint8_t *at_;
};

inline void unpack_pair(const uint8_t *planes, uint8_t *bytes) {
  _mm512_storeu_si512(bytes, codes_of_planes<false, true>(planes));
}

// I3: nibbles of bytes, to which the planes of both rows are unpacked. Bit 3 of a nibble is zero, and so is
// bit 7 of a byte, also after a shift of words: a shuffle looks at nothing else of the high nibble.
template <Levels How>
class KeptPlanes {
 public:
  static constexpr Levels kLevels = How;
  static constexpr float kOddScaled = 1.0f;

  KeptPlanes(const Matrix512 &m, size_t even, size_t)
      : m_(m), kept_(m.values + m.start(even, true), m.bytes_of(even, true)) {}

  template <bool Scaled>
  Two place(uint64_t mask, unsigned count) {
    const __m512i codes = expanded_from(kept_.next(), mask);
    kept_.take(count);
    return {_mm512_shuffle_epi8(m_.levels, codes),
            _mm512_shuffle_epi8(m_.levels, _mm512_srli_epi16(codes, 4))};
  }

 private:
  const Matrix512 &m_;
  KeptPairs<unpack_pair, 8> kept_;
};

// Factors of two rows that share a mask, which is read and counted once.
template <typename Kept>
class PairOfRows {
 public:
  static constexpr Levels kLevels = Kept::kLevels;
  static constexpr bool kMasked = true, kShared = true;
  static constexpr unsigned kLines = are_grouped(kLevels) ? 1 : 4;
  static constexpr float kOddScaled = Kept::kOddScaled;

  static size_t start(const Matrix512 &m, size_t row) { return m.start(row, are_grouped(kLevels)); }
  static size_t whole_runs(const Matrix512 &m) { return m.blocks / 2; }

  PairOfRows(const Matrix512 &m, size_t even, size_t odd)
      : mask_(m.position_row(even)), kept_(m, even, odd) {}

  template <bool Second, bool Whole>
  Two next(size_t block) {
    return placed<false>(block);
  }

  template <bool Second, bool Whole>
  Two next_scaled(size_t block) {
    return placed<true>(block);
  }

 private:
  template <bool Scaled>
  Two placed(size_t block) {
    const uint64_t word = load_word(mask_ + 8 * block);
    return kept_.template place<Scaled>(word, static_cast<unsigned>(__builtin_popcountll(word)));
  }

  const uint8_t *mask_;
  Kept kept_;
};

template <Levels How, typename Use>
void with_rows_of_planes(const losa_parts &p, Use use) {
  if (p.layout == LOSA_DENSE) {
    use(Tag<TwoRows<DenseRowOfPlanes<How>>>());
  } else if (p.layout == LOSA_NM && p.position_bits != 0) {
    use(Tag<TwoRows<SparseRowOfPlanes<How, true>>>());
  } else if (in_pairs(p)) {
    use(Tag<PairOfRows<KeptPlanes<How>>>());
  } else {
    use(Tag<TwoRows<SparseRowOfPlanes<How, false>>>());
  }
}

template <Levels How, Places Where>
using TwoSparseRows = TwoRows<SparseRow<How, false, Where>, SparseRow<How, are_grouped(How), Where>>;

// Calls use(tag) with a tag of the class that reads the rows of an integer tensor.
template <Levels How, typename Use>
void with_rows_of(const losa_parts &p, Use use) {
  using Kept = std::conditional_t<are_grouped(How), KeptNibbles<How>, KeptLevels>;
  if constexpr (are_grouped(How)) {
    if (p.value_type == LOSA_I3) {
      return with_rows_of_planes<How>(p, use);
    }
  }
  if (p.layout == LOSA_DENSE) {
    use(Tag<TwoRows<DenseRow<How>>>());
  } else if (p.layout == LOSA_NM && p.position_bits != 0) {
    use(Tag<TwoSparseRows<How, Places::kCodes>>());
  } else if (fixed_count(p)) {
    2 * p.n <= p.m ? use(Tag<TwoSparseRows<How, Places::kFew>>())
                   : use(Tag<TwoSparseRows<How, Places::kFixed>>());
  } else if (in_pairs(p)) {
    use(Tag<PairOfRows<Kept>>());
  } else {
    use(Tag<TwoSparseRows<How, Places::kCounted>>());
  }
}

template <typename Use>
void with_rows(const losa_parts &p, Use use) {
  switch (levels_of(p)) {
    case Levels::kI8:
      return with_rows_of<Levels::kI8>(p, use);
    case Levels::kTable:
      return with_rows_of<Levels::kTable>(p, use);
    case Levels::kRaised:
      return with_rows_of<Levels::kRaised>(p, use);
  }
}

}  // namespace
}  // namespace losa

#endif
