#include "compute.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace losa::ggml {
namespace {

constexpr size_t kHeader = 64;  // a counter of row ranges that are taken
constexpr size_t kPanel = 32;   // rows that the kernels expand at a time
constexpr size_t kTile = 16;    // rows of a stock weight that stay in the cache for all tokens
constexpr size_t kRanges = 4;   // per thread: so that one that is held up gives the rest to the others

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

size_t token_count(const Tensor &x) { return static_cast<size_t>(x.ne[1] * x.ne[2] * x.ne[3]); }

bool is_packed(const Weight &w) {
  return w.form() == Weight::Form::kPacked || w.form() == Weight::Form::kBlob;
}

struct Sizes {
  size_t activations, scratch, gather;
  bool shared;  // activations are prepared once for all threads: not worth a barrier for one token
};

Sizes sizes_of(const Symbols &ggml, const Weight &w, const Tensor &op) {
  const size_t tokens = token_count(*op.src[1]);
  Sizes s = {};
  if (is_packed(w)) {
    s.activations = aligned(losa_activation_bytes(&w.tensor(), tokens));
    s.scratch = aligned(losa_scratch_bytes(&w.tensor(), tokens));
  } else {
    const int type = ggml.cpu_type_traits(w.type())->dot_type;
    s.activations = aligned(row_bytes(type, w.columns()) * tokens);
  }
  s.gather = aligned(w.columns() * sizeof(float));
  s.shared = tokens > 1;
  return s;
}

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

void prepare(const Symbols &ggml, const Weight &w, const Tensor &x, size_t begin, size_t end, size_t tokens,
             uint8_t *activations, float *gather) {
  if (is_packed(w)) {
    for (size_t t = begin; t < end; ++t) {
      losa_prepare(&w.tensor(), row_of(x, t, gather), 0, t, t + 1, tokens, activations);
    }
    return;
  }
  const CpuTypeTraits *traits = ggml.cpu_type_traits(ggml.cpu_type_traits(w.type())->dot_type);
  const size_t bytes = row_bytes(ggml.cpu_type_traits(w.type())->dot_type, w.columns());
  for (size_t t = begin; t < end; ++t) {
    traits->from_float(row_of(x, t, gather), activations + t * bytes, w.columns());
  }
}

void stock_rows(const Symbols &ggml, const Weight &w, const uint8_t *activations, size_t tokens, size_t begin,
                size_t end, float *y, size_t ldy) {
  const CpuTypeTraits *traits = ggml.cpu_type_traits(w.type());
  const size_t x_bytes = row_bytes(traits->dot_type, w.columns()), w_bytes = row_bytes(w.type(), w.columns());
  const int n = static_cast<int>(w.columns());
  for (size_t tile = begin; tile < end; tile += kTile) {
    const size_t last = tile + kTile < end ? tile + kTile : end;
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t r = tile; r < last; ++r) {
        traits->dot(n, y + t * ldy + r, 0, w.stock() + r * w_bytes, 0, activations + t * x_bytes, 0, 1);
      }
    }
  }
}

void rows(const Symbols &ggml, const Weight &w, const uint8_t *activations, size_t tokens, size_t begin,
          size_t end, float *y, size_t ldy, uint8_t *scratch) {
  if (is_packed(w)) {
    losa_matmul(&w.tensor(), activations, tokens, begin, end, y, ldy, scratch);
  } else if (w.form() == Weight::Form::kStock) {
    stock_rows(ggml, w, activations, tokens, begin, end, y, ldy);
  } else {  // damaged: no number that could be taken for a result
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t r = begin; r < end; ++r) {
        y[t * ldy + r] = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
}

}  // namespace

size_t work_bytes(const Symbols &ggml, const Weight &weight, const Tensor &op, int threads) {
  const Sizes s = sizes_of(ggml, weight, op);
  const auto team = static_cast<size_t>(threads);
  return kHeader + s.activations * (s.shared ? 1 : team) + (s.scratch + s.gather) * team + 64;
}

void multiply(const Symbols &ggml, const Weight &weight, const Tensor &op, const Team &team) {
  const Tensor &x = *op.src[1];
  const size_t tokens = token_count(x), n = weight.rows();
  const auto thread = static_cast<size_t>(team.thread), threads = static_cast<size_t>(team.threads);
  if (work_bytes(ggml, weight, op, team.threads) > team.work_bytes) {
    std::fprintf(stderr, "losa: ggml gave too little working memory\n");
    std::abort();
  }
  if (team.thread == 0) {
    report_load();
  }
  const Sizes s = sizes_of(ggml, weight, op);
  auto *work = reinterpret_cast<uint8_t *>(aligned(reinterpret_cast<uintptr_t>(team.work)));
  auto *taken = reinterpret_cast<std::atomic<size_t> *>(work);
  uint8_t *activations = work + kHeader;
  uint8_t *own = activations + s.activations * (s.shared ? 1 : threads) + thread * (s.scratch + s.gather);
  auto *gather = reinterpret_cast<float *>(own + s.scratch);
  auto *y = static_cast<float *>(op.data);
  const size_t ldy = op.nb[1] / sizeof(float);

  if (!s.shared) {
    activations += thread * s.activations;
    prepare(ggml, weight, x, 0, tokens, tokens, activations, gather);
    const size_t steps = (n + LOSA_ROW_STEP - 1) / LOSA_ROW_STEP;
    const size_t begin = steps * thread / threads * LOSA_ROW_STEP;
    const size_t end = steps * (thread + 1) / threads * LOSA_ROW_STEP;
    if (begin < n) {
      rows(ggml, weight, activations, tokens, begin, end < n ? end : n, y, ldy, own);
    }
    return;
  }
  prepare(ggml, weight, x, tokens * thread / threads, tokens * (thread + 1) / threads, tokens, activations,
          gather);
  if (thread == 0) {
    taken->store(0, std::memory_order_relaxed);
  }
  team.wait_for_all(team.context);
  const size_t share = n / (threads == 1 ? 1 : threads * kRanges) + 1;
  const size_t range = (share + kPanel - 1) / kPanel * kPanel;
  for (size_t begin; (begin = taken->fetch_add(range, std::memory_order_relaxed)) < n;) {
    rows(ggml, weight, activations, tokens, begin, begin + range < n ? begin + range : n, y, ldy, own);
  }
}

}  // namespace losa::ggml
