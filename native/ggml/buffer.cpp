#include <sys/mman.h>

#include <atomic>
#include <cctype>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "routes.h"

namespace losa::ggml {

Symbols ggml = {};

namespace {

constexpr size_t kAlignment = 64;

std::atomic<bool> accept{true};

struct Memory {
  uint8_t *base;
  size_t bytes;
  std::vector<std::unique_ptr<Weight>> weights;
};

Memory *memory_of(Buffer *buffer) { return static_cast<Memory *>(buffer->context); }
Weight *weight_in(const Tensor *tensor) { return static_cast<Weight *>(tensor->extra); }

void free_buffer(Buffer *buffer) {
  munmap(memory_of(buffer)->base, memory_of(buffer)->bytes);
  delete memory_of(buffer);
}

void *base(Buffer *buffer) { return memory_of(buffer)->base; }

int init_tensor(Buffer *buffer, Tensor *tensor) {
  if (tensor->view_src != nullptr) {
    tensor->extra = tensor->view_src->extra;
    return kSuccess;
  }
  try {
    auto &weights = memory_of(buffer)->weights;
    weights.push_back(std::make_unique<Weight>(*tensor, static_cast<uint8_t *>(tensor->data)));
    tensor->extra = weights.back().get();
    return kSuccess;
  } catch (const std::exception &) {
    return kOutOfMemory;
  }
}

void fill_tensor(Buffer *, Tensor *tensor, uint8_t value, size_t offset, size_t bytes) {
  weight_in(tensor)->fill(value, offset, bytes);
}

void set_tensor(Buffer *, Tensor *tensor, const void *data, size_t offset, size_t bytes) {
  weight_in(tensor)->set(data, offset, bytes);
}

void get_tensor(Buffer *, const Tensor *tensor, void *data, size_t offset, size_t bytes) {
  weight_in(tensor)->get(data, offset, bytes);
}

void clear(Buffer *buffer, uint8_t value) {
  for (auto &weight : memory_of(buffer)->weights) {
    weight->fill(value, 0, row_bytes(weight->type(), weight->columns()) * weight->rows());
  }
}

Buffer *allocate(BufferType *type, size_t bytes) {
  // Reserved only: a page costs memory when it is written, and packed weights write few.
  const size_t reserved = bytes + kAlignment;
  void *base_address =
      mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base_address == MAP_FAILED) {
    return nullptr;
  }
  auto *memory = new (std::nothrow) Memory{static_cast<uint8_t *>(base_address), reserved, {}};
  if (memory == nullptr) {
    munmap(base_address, reserved);
    return nullptr;
  }
  BufferCalls calls = {};
  calls.free = free_buffer;
  calls.base = base;
  calls.init_tensor = init_tensor;
  calls.fill_tensor = fill_tensor;
  calls.set_tensor = set_tensor;
  calls.get_tensor = get_tensor;
  calls.clear = clear;
  return ggml.buffer_init(type, calls, memory, bytes);
}

const char *name(BufferType *) { return "LOSA"; }
size_t alignment(BufferType *) { return kAlignment; }

BufferType weights_type = {};

// `blk.N.` and then one of the linears of a block.
bool is_block_linear(const char *tensor) {
  static const char *const kLinears[] = {"attn_q",   "attn_k", "attn_v",  "attn_output",
                                         "ffn_gate", "ffn_up", "ffn_down"};
  if (std::strncmp(tensor, "blk.", 4) != 0) {
    return false;
  }
  const char *at = tensor + 4;
  while (std::isdigit(static_cast<unsigned char>(*at))) {
    ++at;
  }
  if (at == tensor + 4 || *at++ != '.') {
    return false;
  }
  for (const char *linear : kLinears) {
    const size_t length = std::strlen(linear);
    if (std::strncmp(at, linear, length) == 0 && std::strcmp(at + length, ".weight") == 0) {
      return true;
    }
  }
  return false;
}

bool is_weight(const Tensor &w) {
  constexpr int64_t most = 1 << 30;
  const size_t row = w.ne[0] > 0 && w.ne[0] <= most ? row_bytes(w.type, static_cast<uint64_t>(w.ne[0])) : 0;
  return row != 0 && w.nb[1] == row && w.ne[1] > 0 && w.ne[1] <= most && w.ne[2] == 1 && w.ne[3] == 1 &&
         w.view_src == nullptr;
}

}  // namespace

void set_accept(bool on) { accept = on; }

BufferType *weight_buffers(Device *device, void *context) {
  weights_type.calls = {name, allocate, alignment, nullptr, nullptr, nullptr};
  weights_type.device = device;
  weights_type.context = context;
  return &weights_type;
}

bool is_ours(const BufferType *type) { return type == &weights_type; }

const Weight *weight_of(const Tensor *op) {
  const Tensor *w = op->src[0];
  const bool ours =
      op->op == ggml.mul_mat && w != nullptr && w->buffer != nullptr && is_ours(w->buffer->type);
  return ours && w->view_src == nullptr ? weight_in(w) : nullptr;
}

bool can_compute(const Tensor *op) {
  if (op->op != ggml.mul_mat || op->type != kF32 || op->src[0] == nullptr || op->src[1] == nullptr) {
    return false;
  }
  const Tensor &w = *op->src[0], &x = *op->src[1];
  if (w.buffer == nullptr || !is_ours(w.buffer->type) || !is_weight(w) || x.type != kF32 ||
      (x.buffer != nullptr && !ggml.is_host(x.buffer->type))) {
    return false;
  }
  // Q1_0 is what views declare. A file that is really quantized so stays with stock.
  const bool wanted = w.type != kQ1_0 || Mapping::any();
  return w.extra != nullptr || (accept && wanted && is_block_linear(w.name));
}

}  // namespace losa::ggml
