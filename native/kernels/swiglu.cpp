// The gate of an MLP in plain C++, without branches or calls: compilers make vectors of it where the base of
// the CPU has them.
#include <cstring>

#include "kernels/series.h"
#include "kernels/target.h"

namespace losa {
namespace {

float clamp(float x) { return x < -series::kMost ? -series::kMost : x > series::kMost ? series::kMost : x; }

float exponential(float x) {
  const float shifted = clamp(x) * series::kLog2E + series::kRound, n = shifted - series::kRound;
  const float r = (clamp(x) - n * series::kLn2High) - n * series::kLn2Low;
  float sum = series::kTerms[0];
  for (size_t i = 1; i < series::kTermCount; ++i) {
    sum = sum * r + series::kTerms[i];
  }
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + series::kOne;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

}  // namespace

void plain_swiglu(float *y, const float *up, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    y[i] = y[i] / (1 + exponential(-y[i])) * up[i];
  }
}

}  // namespace losa
