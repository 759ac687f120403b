// Which layout a weight gets (docs/formats.md): the same rule as losa_deploy/layouts/choose.py.
#ifndef LOSA_FORMAT_CHOOSE_H
#define LOSA_FORMAT_CHOOSE_H

#include <cstddef>
#include <cstdint>

#include "format/mask.h"
#include "format/pack_tiles.h"
#include "losa/kernels.h"

namespace losa::format {

// What differs between a weight for a file and one that is packed when it is loaded.
struct Terms {
  // Bytes of tiles per byte of the smallest other sparse layout, for a mask without a pattern.
  double tiles_may_cost;
  // Held for each row (of i4 each pair of rows) of a stream of values.
  uint64_t start_bytes;
  // The mask is data. Otherwise it was found from zeros: a kept weight that is zero is missing in it, so that
  // tiles may have slots without one, and of the other patterns only 2:4 and 4:8 are looked for.
  bool exact;
};

constexpr Terms kInFile = {1.0, 0, true};
constexpr Terms kAtLoad = {1.5, 8, false};

// What the rule knows of a mask.
struct Statistics {
  size_t rows, columns;
  uint64_t stream;  // length of the stream of kept values, without its padding
  Pattern pattern;  // for the layout nm
  TileShape tiles;  // n is 0 if there are none
  bool can_share;   // whether pairs of rows can share a mask, and
  uint64_t shared;  // how long the stream is then
};

struct Choice {
  losa_layout layout;
  Pattern pattern;  // of nm and tiled; kSharedMasks of a bitmask whose rows share masks in pairs; else 0
};
constexpr Pattern kSharedMasks = {2, 0};

Statistics statistics_of(const Mask &mask, losa_value_type type, const Terms &terms);

// Sparse only if that takes fewer bytes than dense.
Choice choose(const Statistics &found, losa_value_type type, const Terms &terms);

}  // namespace losa::format

#endif
