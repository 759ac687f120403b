/* The C interface of the kernels: no framework, no allocation, no threads, error codes only. */
#ifndef LOSA_KERNELS_H
#define LOSA_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LOSA_KERNELS_VERSION 0

enum losa_status {
  LOSA_OK = 0,
  LOSA_NULL_POINTER = 1,
};

/* Number of kept positions in a mask of `bytes` bytes (one bit a position, lowest bit first). */
int losa_mask_count(const uint8_t *mask, size_t bytes, uint64_t *count);

#ifdef __cplusplus
}
#endif
#endif
