// exp(x) = 2^n * exp(r), where n is x / ln(2) rounded and |r| <= ln(2) / 2: eight terms of the series suffice
// for a float.
#ifndef LOSA_SERIES_H
#define LOSA_SERIES_H

#include <cstddef>
#include <cstdint>

namespace losa::series {

constexpr float kMost = 87.0F;  // of |x|: 2^n is no infinity and has all its bits
constexpr float kLog2E = 1.44269504F;
constexpr float kLn2High = 0.693359375F, kLn2Low = -2.12194440e-4F;  // their sum; n * kLn2High is exact
constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: x + kRound has no fraction, and n in its lowest bits
constexpr uint32_t kOne = uint32_t{127} << 23;  // the bits of 1, to which n << 23 is added
constexpr size_t kTermCount = 8;
constexpr float kTerms[kTermCount] = {1.0F / 5040, 1.0F / 720, 1.0F / 120, 1.0F / 24,
                                      1.0F / 6,    0.5F,       1.0F,       1.0F};

}  // namespace losa::series

#endif
