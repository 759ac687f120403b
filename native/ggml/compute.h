// MUL_MAT with a weight of ours, computed by several threads together.
#ifndef LOSA_GGML_COMPUTE_H
#define LOSA_GGML_COMPUTE_H

#include "symbols.h"
#include "weight.h"

namespace losa::ggml {

// One thread among those that compute a node together.
struct Team {
  int thread, threads;
  void *work;  // shared
  size_t work_bytes;
  void (*wait_for_all)(void *);
  void *context;
};

// Bytes of shared memory that so many threads need for a node.
size_t work_bytes(const Symbols &ggml, const Weight &weight, const Tensor &op, int threads);

// This thread's part of the node. Every thread of the team calls it.
void multiply(const Symbols &ggml, const Weight &weight, const Tensor &op, const Team &team);

}  // namespace losa::ggml

#endif
