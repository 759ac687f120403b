// AVX2 with AVX-VNNI: the integer kernels of AVX2, compiled again with its products of bytes (avx2_dot.h).
#include "kernels/x86/avx2_levels.h"
#include "kernels/x86/avx2_panel.h"
#include "kernels/x86/avx2_tiles.h"

namespace losa {
namespace {

constexpr Target table() {
  Target target{"avxvnni", &kAvx2};
  target.matvec_levels = few_times_rows;
  target.matmul_levels = rows_or_panels;
  target.multiply_tiles = multiply_tiles;
  target.multiply_windows = multiply_windows;
  return target;
}

}  // namespace

constexpr Target kAvxVnni = table();

}  // namespace losa
