// What the library exports: two functions that ggml calls, and ours for Python
// (losa_deploy/bindings/ggml.py).
#ifndef LOSA_GGML_PLUGIN_H
#define LOSA_GGML_PLUGIN_H

#include <stdint.h>

#define LOSA_EXPORT __attribute__((visibility("default")))

extern "C" {

struct losa_ggml_counts {
  uint64_t tensors, packed, dense, dense_bytes, packed_bytes, pack_nanoseconds;
};
struct losa_ggml_piece {
  uint64_t at, offset, bytes;
};

// ggml: entry points of a loadable backend.
LOSA_EXPORT void *ggml_backend_init(void);
LOSA_EXPORT int ggml_backend_score(void);

// Look ggml up in the library with this handle of dlopen. Before losa_ggml_start.
LOSA_EXPORT void losa_ggml_library(void *handle);
// Choose and install the route; 0 if it is ready (or off), else losa_ggml_status says why not.
LOSA_EXPORT int losa_ggml_start(void);
LOSA_EXPORT const char *losa_ggml_status(void);
LOSA_EXPORT const char *losa_ggml_route(void);  // "a", "b" or "off"
// What was wrong with the first damaged weight since the last call; empty if nothing was. Valid until the
// next call.
LOSA_EXPORT const char *losa_ggml_damage(void);
// 0: weights loaded from now on stay with stock llama.cpp.
LOSA_EXPORT void losa_ggml_accept(int on);
LOSA_EXPORT void losa_ggml_statistics(losa_ggml_counts *out);  // since the library was loaded

// A FILE * of total_bytes: the header, then pieces of the file at path at their positions, zeros between
// them. Of a piece that is a blob only the header is shown: it refers to the blob in the mapped file. Null
// and errno if the file cannot be opened or mapped, or a piece lies outside of it or overlaps another.
LOSA_EXPORT void *losa_ggml_virtual_open(const char *path, const uint8_t *header, uint64_t header_bytes,
                                         const losa_ggml_piece *pieces, uint64_t count, uint64_t total_bytes);
LOSA_EXPORT void losa_ggml_virtual_close(void *file);
}

#endif
