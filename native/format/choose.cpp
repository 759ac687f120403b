#include "format/choose.h"

#include "format/codes.h"
#include "format/layout.h"

namespace losa::format {
namespace {

uint64_t nm_bytes(const Statistics &found, losa_value_type type) {
  losa_parts p = {};
  p.layout = LOSA_NM;
  p.columns = static_cast<uint32_t>(found.columns);
  p.n = static_cast<uint8_t>(found.pattern.n);
  p.m = static_cast<uint8_t>(found.pattern.m);
  p.position_bits = static_cast<uint8_t>(position_bits(found.pattern));
  const uint64_t streams = type == LOSA_I4 ? (found.rows + 1) / 2 : found.rows;
  return found.rows * position_row_bytes(p) + stream_bytes(streams * slots_per_row(p) * value_bytes(type));
}

// True of masks for which tiles are worth so many bytes, beside the smallest other sparse layout.
bool may_cost(uint64_t tiles, uint64_t smallest, Pattern pattern, const Terms &terms) {
  if (pattern.m == kTile || tiles <= smallest) {
    return true;  // the mask was made for tiles, or they are the faster of two
  }
  const bool counted = pattern.n == 0 || 8 % pattern.m != 0;  // else nm is fast too
  return counted && static_cast<double>(tiles) < terms.tiles_may_cost * static_cast<double>(smallest);
}

}  // namespace

Statistics statistics_of(const Mask &mask, losa_value_type type, const Terms &terms) {
  Statistics found = {mask.rows, mask.columns, stream_starts(mask, type == LOSA_I4).back(), {0, 0}, {}, false,
                      0};
  found.pattern = terms.exact ? find_pattern(mask) : find_half(mask);
  if (type == LOSA_I8 || type == LOSA_I4) {
    found.tiles = find_tiles(mask, type == LOSA_I4, terms.exact);
    const Mask shared = share(mask);
    found.can_share = mask.rows > 1 && (!terms.exact || shared.words == mask.words);
    found.shared = stream_starts(shared, type == LOSA_I4).back();
  }
  return found;
}

Choice choose(const Statistics &found, losa_value_type type, const Terms &terms) {
  const uint64_t dense = found.rows * dense_row_bytes(type, found.columns);
  const size_t words = (found.columns + kBlock - 1) / kBlock;
  Choice best = {LOSA_BITMASK, {0, 0}};
  uint64_t smallest = found.rows * words * 8 + stream_bytes(found.stream * value_bytes(type));
  if (found.pattern.n != 0) {
    const uint64_t bytes = nm_bytes(found, type);
    // On a tie if every byte of the mask keeps the same count, so that no kernel counts.
    if (bytes < smallest || (bytes == smallest && 8 % found.pattern.m == 0)) {
      best = {LOSA_NM, found.pattern};
      smallest = bytes;
    }
  }
  const TileShape &tiles = found.tiles;
  if (tiles.n != 0 && tiles.bytes() < dense && may_cost(tiles.bytes(), smallest, found.pattern, terms)) {
    return tiles.sliding
               ? Choice{LOSA_SLIDING, {0, 0}}
               : Choice{LOSA_TILED, {static_cast<unsigned>(tiles.n), static_cast<unsigned>(tiles.m)}};
  }
  if (best.layout == LOSA_BITMASK && found.can_share) {
    const uint64_t bytes = (found.rows + 1) / 2 * words * 8 + stream_bytes(found.shared * value_bytes(type));
    if (bytes < smallest) {
      best.pattern = kSharedMasks;
      smallest = bytes;
    }
  }
  const uint64_t streams = type == LOSA_I4 ? (found.rows + 1) / 2 : found.rows;
  return smallest + streams * terms.start_bytes < dense ? best : Choice{LOSA_DENSE, {0, 0}};
}

}  // namespace losa::format
