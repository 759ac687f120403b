// Sizes that the stored format, the kernels and the ggml backend share.
#ifndef LOSA_SIZES_H
#define LOSA_SIZES_H

#include <cstddef>

#include "losa/kernels.h"

namespace losa {

constexpr size_t kTile = LOSA_TILE;  // rows of a tile; LOSA_TILED: also positions of a group of the long kind
constexpr size_t kQuad = 4;          // LOSA_TILED: positions of a group of the short kind
constexpr size_t kPanelRows = 32;    // rows that kernels expand at a time: threads best cut at multiples

}  // namespace losa

#endif
