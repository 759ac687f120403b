// AVX-512 (F, BW, DQ, VL) for CPUs without VBMI2 and VNNI. Without the instructions that expand bytes and
// multiply them, registers of 64 bytes were slower for levels than those of 32: AVX2 multiplies them here
// too. Tiles are the code of AVX2 with twice as many registers.
#include "kernels/x86/avx2_tiles.h"
#include "kernels/x86/avx512_values.h"

namespace losa {
namespace {

constexpr Target table() {
  Target target{"avx512f", &kAvx2};
  target.quantize = quantize_groups<quantize_group>;
  target.matvec_values = matvec_values;
  target.matmul_values = multiply_panels<float, expand_values, values_panel>;
  target.multiply_tiles = multiply_tiles;
  target.multiply_windows = multiply_windows;
  return target;
}

}  // namespace

constexpr Target kAvx512 = table();

}  // namespace losa
