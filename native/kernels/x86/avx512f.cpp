// AVX-512 (F, BW, DQ, VL) for CPUs without VBMI2 and VNNI. Without the instructions that expand bytes and
// multiply them, registers of 64 bytes were slower for levels than those of 32: AVX2 multiplies them here
// too.
#include "kernels/x86/avx2_tiles.h"
#include "kernels/x86/avx512_values.h"

namespace losa {
namespace {

void matvec(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, void *scratch) {
  if (t.parts.layout == LOSA_TILED) {
    multiply_tiles(t.parts, a, begin, end, y, 0, scratch);
  } else if (is_integer(t.parts)) {
    kAvx2.matvec(t, a, begin, end, y, scratch);
  } else {
    matvec_values(t, a, begin, end, y);
  }
}

void matmul(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t ldy,
            void *scratch) {
  if (is_integer(t.parts)) {
    kAvx2.matmul(t, a, begin, end, y, ldy, scratch);
  } else {
    matmul_values(t, a, begin, end, y, ldy, scratch);
  }
}

}  // namespace

const Target kAvx512 = {"avx512f", quantize, matvec, matmul};

}  // namespace losa
