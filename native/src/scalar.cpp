#include "losa/kernels.h"

extern "C" int losa_mask_count(const uint8_t *mask, size_t bytes, uint64_t *count) {
  if ((mask == nullptr && bytes != 0) || count == nullptr) {
    return LOSA_NULL_POINTER;
  }
  uint64_t total = 0;
  for (size_t i = 0; i < bytes; ++i) {
    for (unsigned bits = mask[i]; bits != 0; bits &= bits - 1) {
      ++total;
    }
  }
  *count = total;
  return LOSA_OK;
}
