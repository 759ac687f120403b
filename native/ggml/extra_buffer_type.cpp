// Route a. The CPU backend asks its extra buffer types first, and computes our nodes in its own threads.
#include "compute.h"
#include "routes.h"

namespace losa::ggml {
namespace {

class Traits : public TensorTraits {
 public:
  bool work_size(int threads, const Tensor *op, size_t &bytes) override {
    const Weight *weight = weight_of(op);
    if (weight == nullptr) {
      return false;
    }
    bytes = work_bytes(ggml, *weight, *op, threads);
    return true;
  }

  bool compute_forward(ComputeParams *params, Tensor *op) override {
    const Weight *weight = weight_of(op);
    if (weight == nullptr) {
      return false;
    }
    const auto wait = [](void *pool) { ggml.barrier(static_cast<ThreadPool *>(pool)); };
    multiply(ggml, *weight, *op,
             {params->thread, params->threads, params->work, params->work_bytes, wait, params->pool});
    return true;
  }
};

class SparseType : public ExtraBufferType {
 public:
  bool supports_op(Device *, const Tensor *op) override { return can_compute(op); }
  TensorTraits *get_tensor_traits(const Tensor *op) override {
    return weight_of(op) != nullptr ? &traits_ : nullptr;
  }

 private:
  Traits traits_;
};

// The CPU device copies the list when the first model asks for it, and never looks at ours again.
bool is_asked(const BufferType *ours) {
  if (ggml.extra_types_of == nullptr) {
    return true;
  }
  for (BufferType **type = ggml.extra_types_of(ggml.cpu); type != nullptr && *type != nullptr; ++type) {
    if (*type == ours) {
      return true;
    }
  }
  return false;
}

}  // namespace

std::string install_extra_buffer_type() {
  if (ggml.extra_buffer_types == nullptr || ggml.barrier == nullptr) {
    return "does not export what route a needs";
  }
  static SparseType type;
  auto &types = ggml.extra_buffer_types();
  BufferType *ours = weight_buffers(ggml.cpu, static_cast<ExtraBufferType *>(&type));
  // In front: the one that repacks stock weights would take them first.
  types.insert(types.begin(), ours);
  if (!is_asked(ours)) {
    types.erase(types.begin());
    return "has loaded a model before, which route a has to precede";
  }
  return "";
}

}  // namespace losa::ggml
