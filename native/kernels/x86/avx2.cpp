// AVX2, FMA and F16C.
#include "kernels/x86/avx2_levels.h"
#include "kernels/x86/avx2_panel.h"
#include "kernels/x86/avx2_swiglu.h"
#include "kernels/x86/avx2_tiles.h"
#include "kernels/x86/avx2_values.h"

namespace losa {
namespace {

constexpr Target table() {
  Target target{"avx2", &kScalar};
  target.quantize = quantize_groups<quantize_group>;
  target.matvec_levels = few_times_rows;
  target.matmul_levels = rows_or_panels;
  target.matvec_values = matvec_values;
  target.matmul_values = multiply_panels<float, expand_values, values_panel>;
  target.multiply_tiles = multiply_tiles;
  target.multiply_windows = multiply_windows;
  target.swiglu = swiglu;
  return target;
}

}  // namespace

constexpr Target kAvx2 = table();

}  // namespace losa
