// Route b: a device of the kind ACCEL with a buffer type of its own for weights.
//
// There are two devices. The first is registered: llama.cpp asks it for the buffer type of weights. The
// second is the one that our backend objects name, and its buffer type is the CPU's: the scheduler then keeps
// the results of our nodes where the CPU backend reads them, without copies.
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "compute.h"
#include "routes.h"
#include "team.h"

namespace losa::ggml {
namespace {

Registry registry = {};
Device weights_device = {}, results_device = {};

struct State {
  int threads = 4;
  std::unique_ptr<Threads> team;
  std::vector<uint8_t> work;
};

State *state_of(Backend *backend) { return static_cast<State *>(backend->context); }

void set_threads(Backend *backend, int threads) { state_of(backend)->threads = threads; }

// Weights of a piece of work: some tens of microseconds for one token.
constexpr size_t kPiece = size_t{1} << 19;
constexpr size_t kTokens = 8;  // prepared as one piece

size_t pieces_of(size_t all, size_t piece) { return (all + piece - 1) / piece; }

void multiply(State &state, const Weight &weight, const Tensor &node) {
  Threads &team = *state.team;
  Product product(ggml, weight, node, team.count(), Product::Activations::kShared);
  if (state.work.size() < product.work_bytes()) {
    state.work.resize(product.work_bytes());
  }
  product.use(state.work.data());
  const size_t tokens = product.tokens(), rows = product.rows();
  team.run(pieces_of(tokens, kTokens), [&](size_t piece, size_t thread) {
    const size_t end = (piece + 1) * kTokens;
    product.prepare(piece * kTokens, end < tokens ? end : tokens, thread);
  });
  const size_t about = kPiece / (weight.columns() + size_t{1}) + 1;
  const size_t range = pieces_of(about, kPanelRows) * kPanelRows;
  team.run(pieces_of(rows, range), [&](size_t piece, size_t thread) {
    const size_t end = (piece + 1) * range;
    product.compute(piece * range, end < rows ? end : rows, thread);
  });
}

int compute(Backend *backend, Graph *graph) {
  State &state = *state_of(backend);
  try {
    const int threads = state.threads < 1 ? 1 : state.threads;
    if (!state.team || state.team->count() != threads) {
      state.team = std::make_unique<Threads>(threads);
    }
    report_load();
    for (int i = 0; i < ggml.graph_nodes(graph); ++i) {
      const Tensor *node = ggml.graph_node(graph, i);
      if (const Weight *weight = weight_of(node)) {  // else a view: nothing to compute
        multiply(state, *weight, *node);
      }
    }
    return kSuccess;
  } catch (const std::exception &) {
    return kOutOfMemory;
  }
}

const char *backend_name(Backend *) { return "LOSA"; }

void free_backend(Backend *backend) {
  delete state_of(backend);
  delete backend;
}

Backend *init(Device *, const char *) {
  static const uint8_t kId[16] = {'l', 'o', 's', 'a', '-', 's', 'p', 'a',
                                  'r', 's', 'e', '-', 'g', 'g', 'm', 'l'};
  auto *backend = new (std::nothrow) Backend{};
  auto *state = new (std::nothrow) State{};
  if (backend == nullptr || state == nullptr) {
    delete backend;
    delete state;
    return nullptr;
  }
  backend->guid = kId;
  backend->calls.name = backend_name;
  backend->calls.free = free_backend;
  backend->calls.compute = compute;
  backend->device = &results_device;
  backend->context = state;
  return backend;
}

const char *device_name(Device *) { return "LOSA"; }
const char *device_description(Device *) { return "sparse weights on the CPU"; }
void device_memory(Device *, size_t *free, size_t *total) { *free = *total = 0; }
int device_type(Device *) { return kAccelerator; }

void device_properties(Device *device, DeviceProperties *properties) {
  properties->name = device_name(device);
  properties->description = device_description(device);
  properties->free_bytes = properties->total_bytes = 0;
  properties->type = kAccelerator;
  properties->id = nullptr;
}

BufferType *buffers_of_weights(Device *) { return weight_buffers(&weights_device, nullptr); }
BufferType *buffers_of_results(Device *) { return ggml.cpu_buffer_type(); }

// A tensor that is not computed (operation 0 in every version) is a weight in our buffers.
bool supports_op(Device *, const Tensor *op) { return op->op == 0 || can_compute(op); }
bool supports_buffer(Device *, BufferType *type) { return is_ours(type) || ggml.is_host(type); }

const char *registry_name(Registry *) { return "LOSA"; }
size_t one_device(Registry *) { return 1; }
size_t no_device(Registry *) { return 0; }
Device *device_at(Registry *, size_t) { return &weights_device; }
Device *nothing_at(Registry *, size_t) { return nullptr; }

void *function(Registry *, const char *name) {
  return std::strcmp(name, "ggml_backend_set_n_threads") == 0 ? reinterpret_cast<void *>(&set_threads)
                                                              : nullptr;
}
void *no_function(Registry *, const char *) { return nullptr; }

}  // namespace

Registry *accelerator() {
  registry.version = kRegistryVersion;
  registry.calls = {registry_name, one_device, device_at, function};
  DeviceCalls calls = {};
  calls.name = device_name;
  calls.description = device_description;
  calls.memory = device_memory;
  calls.type = device_type;
  calls.properties = device_properties;
  calls.init = init;
  calls.supports_op = supports_op;
  calls.supports_buffer = supports_buffer;
  calls.buffer_type = buffers_of_weights;
  weights_device = {calls, &registry, nullptr};
  calls.buffer_type = buffers_of_results;
  results_device = {calls, &registry, nullptr};
  return &registry;
}

Registry *empty_registry() {
  static Registry empty = {kRegistryVersion, {registry_name, no_device, nothing_at, no_function}, nullptr};
  return &empty;
}

}  // namespace losa::ggml
