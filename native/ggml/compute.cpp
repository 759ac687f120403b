#include "compute.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace losa::ggml {
namespace {

constexpr size_t kHeader = 64;     // a counter of row ranges that are taken
constexpr size_t kStockRows = 16;  // rows of a stock weight that stay in the cache for all tokens
constexpr size_t kRanges = 4;      // per thread: so that one that is held up gives the rest to the others

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

size_t token_count(const Tensor &x) { return static_cast<size_t>(x.ne[1] * x.ne[2] * x.ne[3]); }

// Row `token` of the activations, batches counted through; gathered if its elements are not contiguous.
const float *row_of(const Tensor &x, size_t token, float *gather) {
  const auto n1 = static_cast<size_t>(x.ne[1]), n2 = static_cast<size_t>(x.ne[2]);
  const auto *row = static_cast<const uint8_t *>(x.data) + token % n1 * x.nb[1] + token / n1 % n2 * x.nb[2] +
                    token / n1 / n2 * x.nb[3];
  if (x.nb[0] == sizeof(float)) {
    return reinterpret_cast<const float *>(row);
  }
  for (int64_t i = 0; i < x.ne[0]; ++i) {
    std::memcpy(gather + i, row + static_cast<size_t>(i) * x.nb[0], sizeof(float));
  }
  return gather;
}

Product::Activations activations_for(const Tensor &op) {
  return token_count(*op.src[1]) > 1 ? Product::Activations::kShared : Product::Activations::kOwn;
}

}  // namespace

Product::Product(const Symbols &ggml, const Weight &weight, const Tensor &op, int threads,
                 Activations activations)
    : ggml_(ggml),
      weight_(weight),
      op_(op),
      x_(*op.src[1]),
      shared_(activations == Activations::kShared),
      tokens_(token_count(x_)),
      threads_(static_cast<size_t>(threads < 1 ? 1 : threads)),
      gather_(aligned(weight.columns() * sizeof(float))),
      y_(static_cast<float *>(op.data)),
      ldy_(op.nb[1] / sizeof(float)) {
  if (packed()) {
    activations_ = aligned(losa_activation_bytes(&weight.tensor(), tokens_));
    scratch_ = aligned(losa_scratch_bytes(&weight.tensor(), tokens_));
  } else {
    const int type = ggml.cpu_type_traits(weight.type())->dot_type;
    activations_ = aligned(row_bytes(type, weight.columns()) * tokens_);
    scratch_ = 0;
  }
}

size_t Product::work_bytes() const {
  return kHeader + activations_ * (shared_ ? 1 : threads_) + (scratch_ + gather_) * threads_ + 64;
}

void Product::use(void *work) {
  work_ = reinterpret_cast<uint8_t *>(aligned(reinterpret_cast<uintptr_t>(work)));
}

std::atomic<size_t> &Product::counter() const { return *reinterpret_cast<std::atomic<size_t> *>(work_); }

bool Product::packed() const {
  return weight_.form() == Weight::Form::kPacked || weight_.form() == Weight::Form::kBlob;
}

uint8_t *Product::activations_of(size_t thread) const {
  return work_ + kHeader + (shared_ ? 0 : thread * activations_);
}

uint8_t *Product::scratch_of(size_t thread) const {
  return work_ + kHeader + activations_ * (shared_ ? 1 : threads_) + thread * (scratch_ + gather_);
}

void Product::prepare(size_t begin, size_t end, size_t thread) const {
  uint8_t *activations = activations_of(thread);
  auto *gather = reinterpret_cast<float *>(scratch_of(thread) + scratch_);
  if (packed()) {
    for (size_t t = begin; t < end; ++t) {
      losa_prepare(&weight_.tensor(), row_of(x_, t, gather), 0, t, t + 1, tokens_, activations);
    }
    return;
  }
  const int type = ggml_.cpu_type_traits(weight_.type())->dot_type;
  const CpuTypeTraits *traits = ggml_.cpu_type_traits(type);
  const size_t bytes = row_bytes(type, weight_.columns());
  for (size_t t = begin; t < end; ++t) {
    traits->from_float(row_of(x_, t, gather), activations + t * bytes, weight_.columns());
  }
}

void Product::compute(size_t begin, size_t end, size_t thread) const {
  const uint8_t *activations = activations_of(thread);
  if (packed()) {
    losa_matmul(&weight_.tensor(), activations, tokens_, begin, end, y_, ldy_, scratch_of(thread));
  } else if (weight_.form() == Weight::Form::kStock) {
    stock_rows(activations, begin, end);
  } else {  // damaged: no number that could be taken for a result
    for (size_t t = 0; t < tokens_; ++t) {
      for (size_t r = begin; r < end; ++r) {
        y_[t * ldy_ + r] = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
}

void Product::stock_rows(const uint8_t *activations, size_t begin, size_t end) const {
  const CpuTypeTraits *traits = ggml_.cpu_type_traits(weight_.type());
  const size_t x_bytes = row_bytes(traits->dot_type, weight_.columns()),
               w_bytes = row_bytes(weight_.type(), weight_.columns());
  const int n = static_cast<int>(weight_.columns());
  for (size_t tile = begin; tile < end; tile += kStockRows) {
    const size_t last = tile + kStockRows < end ? tile + kStockRows : end;
    for (size_t t = 0; t < tokens_; ++t) {
      for (size_t r = tile; r < last; ++r) {
        traits->dot(n, y_ + t * ldy_ + r, 0, weight_.stock() + r * w_bytes, 0, activations + t * x_bytes, 0,
                    1);
      }
    }
  }
}

size_t work_bytes(const Symbols &ggml, const Weight &weight, const Tensor &op, int threads) {
  return Product(ggml, weight, op, threads, activations_for(op)).work_bytes();
}

void multiply(const Symbols &ggml, const Weight &weight, const Tensor &op, const Team &team) {
  Product product(ggml, weight, op, team.threads, activations_for(op));
  if (product.work_bytes() > team.work_bytes) {
    std::fprintf(stderr, "losa: ggml gave too little working memory\n");
    std::abort();
  }
  product.use(team.work);
  if (team.thread == 0) {
    report_load();
  }
  const auto thread = static_cast<size_t>(team.thread), threads = static_cast<size_t>(team.threads);
  const size_t tokens = product.tokens(), n = product.rows();
  if (!product.shares_activations()) {
    product.prepare(0, tokens, thread);
    const size_t steps = (n + LOSA_ROW_STEP - 1) / LOSA_ROW_STEP;
    const size_t begin = steps * thread / threads * LOSA_ROW_STEP;
    const size_t end = steps * (thread + 1) / threads * LOSA_ROW_STEP;
    if (begin < n) {
      product.compute(begin, end < n ? end : n, thread);
    }
    return;
  }
  product.prepare(tokens * thread / threads, tokens * (thread + 1) / threads, thread);
  std::atomic<size_t> &taken = product.counter();
  if (thread == 0) {
    taken.store(0, std::memory_order_relaxed);
  }
  team.wait_for_all(team.context);
  const size_t share = n / (threads == 1 ? 1 : threads * kRanges) + 1;
  const size_t range = (share + kPanelRows - 1) / kPanelRows * kPanelRows;
  for (size_t begin; (begin = taken.fetch_add(range, std::memory_order_relaxed)) < n;) {
    product.compute(begin, begin + range < n ? begin + range : n, thread);
  }
}

}  // namespace losa::ggml
