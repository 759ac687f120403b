// MUL_MAT with a weight of ours, computed by several threads together.
#ifndef LOSA_GGML_COMPUTE_H
#define LOSA_GGML_COMPUTE_H

#include <atomic>

#include "format/sizes.h"
#include "symbols.h"
#include "weight.h"

namespace losa::ggml {

// A node in pieces: ranges of its tokens are prepared, then ranges of its rows are computed, each by any
// thread.
class Product {
 public:
  // Own: every thread prepares all activations for itself, which for one token costs less than waiting.
  enum class Activations { kShared, kOwn };

  Product(const Symbols &ggml, const Weight &weight, const Tensor &op, int threads, Activations activations);

  // Bytes of memory that the threads share.
  size_t work_bytes() const;
  void use(void *work);

  size_t tokens() const { return tokens_; }
  size_t rows() const { return weight_.rows(); }
  bool shares_activations() const { return shared_; }
  std::atomic<size_t> &counter() const;  // in the shared memory, for ranges that are taken

  void prepare(size_t begin, size_t end, size_t thread) const;
  // `begin` is a multiple of LOSA_ROW_STEP, `end` too unless it is the last row.
  void compute(size_t begin, size_t end, size_t thread) const;

 private:
  bool packed() const;
  uint8_t *activations_of(size_t thread) const;
  uint8_t *scratch_of(size_t thread) const;
  void stock_rows(const uint8_t *activations, size_t begin, size_t end) const;

  const Symbols &ggml_;
  const Weight &weight_;
  const Tensor &op_, &x_;
  bool shared_;
  size_t tokens_, threads_;
  size_t activations_, scratch_, gather_;  // bytes
  float *y_;
  size_t ldy_;
  uint8_t *work_ = nullptr;
};

// One thread among those of the CPU backend, which all come to a node.
struct Team {
  int thread, threads;
  void *work;  // shared
  size_t work_bytes;
  void (*wait_for_all)(void *);
  void *context;
};

// Bytes of shared memory that so many threads of such a team need.
size_t work_bytes(const Symbols &ggml, const Weight &weight, const Tensor &op, int threads);

// This thread's part of the node. Every thread of the team calls it.
void multiply(const Symbols &ggml, const Weight &weight, const Tensor &op, const Team &team);

}  // namespace losa::ggml

#endif
