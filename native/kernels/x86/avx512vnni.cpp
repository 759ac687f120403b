// AVX-512 with VBMI2 and VNNI.
#include "kernels/x86/avx2_tiles.h"
#include "kernels/x86/avx512_levels.h"
#include "kernels/x86/avx512_panel.h"

namespace losa {
namespace {

constexpr size_t kWorthPanels = 32;  // tokens; fewer multiply what is kept of a tile

template <Multiply Few>
void few_or_panels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y, size_t ldy,
                   void *scratch) {
  (a.tokens < kWorthPanels ? Few : matmul_levels)(t, a, begin, end, y, ldy, scratch);
}

// Two or three tokens are multiplied while the rows of a pair are placed, whose mask is read once for all.
void pairs_or_panels(const losa_tensor &t, const Activations &a, size_t begin, size_t end, float *y,
                     size_t ldy, void *scratch) {
  const size_t few = in_pairs(t.parts) ? a.tokens : 0;
  (few == 2   ? few_times_rows<2>
   : few == 3 ? few_times_rows<3>
              : matmul_levels)(t, a, begin, end, y, ldy, scratch);
}

constexpr Target table() {
  Target target{"avx512vnni", &kAvx512};
  target.matvec_levels = few_times_rows<1>;
  target.matmul_levels = pairs_or_panels;
  target.multiply_tiles = few_or_panels<multiply_tiles>;
  target.multiply_windows = few_or_panels<multiply_windows>;
  return target;
}

}  // namespace

constexpr Target kAvx512Vnni = table();

}  // namespace losa
