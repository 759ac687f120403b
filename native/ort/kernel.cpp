#include "kernel.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>

#include "buffer.h"
#include "format/sizes.h"
#include "memory/huge_pages.h"

namespace losa::ort {
namespace {

// Waking the pool costs some microseconds, in which a core reads about this much of a weight.
constexpr uint64_t kInlineBytes = 64 * 1024;
constexpr uint64_t kChunkBytes = 32 * 1024;
// More chunks than threads, so that a thread that was held up does not hold up the others.
constexpr size_t kChunksPerThread = 4;
constexpr size_t kTokensPerPrepare = 8;
constexpr size_t kGatedFloats = 32 * 1024;  // of each of two products, which stay in the cache until gated

size_t ceil_div(size_t value, size_t by) { return (value + by - 1) / by; }

thread_local Buffer activation_buffer;
thread_local Buffer scratch_buffer;
thread_local Buffer gated_buffer;

size_t most_chunks() {
  static const size_t count = std::max<size_t>(1, std::thread::hardware_concurrency()) * kChunksPerThread;
  return count;
}

// Type and dimensions of a tensor, without allocating.
class Shape {
 public:
  Shape(const OrtApi *api, const OrtValue *value) : api_(api) {
    failed_ = GetTensorTypeAndShape(api, value, &info_);
    if (failed_ == nullptr) {
      failed_ = GetTensorElementType(api, info_, &type_);
    }
    if (failed_ == nullptr) {
      failed_ = GetDimensionsCount(api, info_, &rank_);
    }
    if (failed_ == nullptr && rank_ > dims_.size()) {
      failed_ = CreateStatus(api, kInvalidArgument, "a tensor has more than 8 dimensions");
    }
    if (failed_ == nullptr) {
      failed_ = GetDimensions(api, info_, dims_.data(), rank_);
    }
  }
  Shape(const Shape &) = delete;
  Shape &operator=(const Shape &) = delete;
  ~Shape() {
    if (info_ != nullptr) {
      ReleaseTensorTypeAndShapeInfo(api_, info_);
    }
  }

  OrtStatus *status() const { return failed_; }
  int type() const { return type_; }
  size_t rank() const { return rank_; }
  int64_t *dims() { return dims_.data(); }
  uint64_t elements() const {
    uint64_t count = 1;
    for (size_t i = 0; i < rank_; ++i) {
      count *= static_cast<uint64_t>(dims_[i]);
    }
    return count;
  }

 private:
  const OrtApi *api_;
  OrtTensorTypeAndShapeInfo *info_ = nullptr;
  OrtStatus *failed_ = nullptr;
  int type_ = kUndefined;
  size_t rank_ = 0;
  std::array<int64_t, 8> dims_ = {};
};

uint64_t element_bytes(int type) {
  return type == kFloat ? 4 : type == kFloat16 ? 2 : type == kUint8 || type == kInt8 ? 1 : 0;
}

std::string node_name(const OrtApi *api, const OrtKernelInfo *info) {
  size_t bytes = 0;  // with the zero at the end
  OrtStatus *status = KernelInfo_GetNodeName(api, info, nullptr, &bytes);
  std::string name(bytes, '\0');
  if (status == nullptr && bytes != 0) {
    status = KernelInfo_GetNodeName(api, info, &name[0], &bytes);
  }
  if (status != nullptr) {
    ReleaseStatus(api, status);
    return {};
  }
  name.resize(bytes == 0 ? 0 : bytes - 1);
  return name;
}

bool attribute(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t *value) {
  OrtStatus *status = KernelInfoGetAttribute_int64(api, info, name, value);
  if (status != nullptr) {
    ReleaseStatus(api, status);
    return false;
  }
  return true;
}

}  // namespace

size_t Operator::component_count() const {
  size_t count = 0;
  while (count < components.size() && components[count] != nullptr) {
    ++count;
  }
  return count;
}

ElementType Operator::input_type(size_t index) const {
  if (index == 0) {
    return kFloat;
  }
  const std::string component = components[(index - 1) % component_count()];
  if (component == "positions") {
    return kUint8;
  }
  if (component == "table") {
    return kInt8;
  }
  if (component == "scale") {
    return value_type == LOSA_I8 ? kUndefined : kFloat16;  // row scales are f32 or f16
  }
  return kStoredTypes[value_type].values;
}

Kernel::Kernel(const Operator &op, const OrtApi *api, const OrtKernelInfo *info)
    : api_(api), op_(op), node_(node_name(api, info)) {
  int64_t format = 0;
  if (!attribute(api, info, "format", &format) || format != LOSA_FORMAT_VERSION) {
    refuse("the weight is stored in format " + std::to_string(format) + ", this library reads format " +
           std::to_string(LOSA_FORMAT_VERSION) + "; export the model again with this version of losa-deploy");
  }
  for (size_t i = 0; i < op.weights; ++i) {
    open(info, i);
    if (i > 0 && !losa_same_activations(&weights_[0].tensor, &weights_[i].tensor)) {
      refuse("weight " + std::to_string(i) + " cannot share the input of weight 0");
    }
  }
  const uint32_t rows = weights_[0].tensor.parts.rows, others = weights_[1].tensor.parts.rows;
  if (op.gated && rows != others) {
    refuse("the gate has " + std::to_string(rows) + " rows, but what it gates has " + std::to_string(others));
  }
}

void Kernel::open(const OrtKernelInfo *info, size_t index) {
  const auto integer = [&](const char *name, int64_t least, int64_t most) {
    int64_t value = 0;
    if (!attribute(api_, info, name, &value)) {
      refuse(std::string("the attribute ") + name + " is missing");
    }
    if (value < least || value > most) {
      refuse(std::string("the attribute ") + name + " is " + std::to_string(value) + ", expected " +
             std::to_string(least) + " to " + std::to_string(most));
    }
    return value;
  };
  losa_parts parts = {};
  parts.layout = static_cast<uint8_t>(op_.layout);
  parts.value_type = static_cast<uint8_t>(op_.value_type);
  parts.columns = static_cast<uint32_t>(integer("in_features", 1, INT32_MAX));
  if (op_.layout == LOSA_NM || op_.layout == LOSA_TILED) {
    parts.n = static_cast<uint8_t>(integer("n", 1, 31));
    parts.m = static_cast<uint8_t>(integer("m", 2, 32));
  }
  if (op_.layout == LOSA_NM) {
    const bool codes = op_.position_codes;
    parts.position_bits = static_cast<uint8_t>(integer("position_bits", codes ? 1 : 0, codes ? 8 : 0));
  }
  if (op_.shared_masks) {
    parts.n = static_cast<uint8_t>(integer("rows_per_mask", 2, 2));
  }
  if (op_.value_type >= LOSA_I4) {
    parts.group_size = static_cast<uint16_t>(integer("group_size", 32, 128));
  }
  const bool tiles = op_.layout == LOSA_TILED || op_.layout == LOSA_SLIDING;
  const size_t count = op_.component_count();
  std::string sizes;
  for (size_t i = 0; i < count; ++i) {
    const std::string name = op_.components[i];
    const size_t input = 1 + index * count + i;
    int constant = 0;
    const OrtValue *value = nullptr;
    check(KernelInfoGetConstantInput_tensor(api_, info, input, &constant, &value));
    if (!constant || value == nullptr) {
      refuse("its input " + std::to_string(input) + " (" + name +
             ") is not an initializer; the packed weight has to be constant");
    }
    Shape shape(api_, value);
    check(shape.status());
    // Positions, or values where there are none, have a line per row or tile; where rows share masks, scales
    // have one.
    if (op_.shared_masks ? name == "scale" : i == 0) {
      const int64_t lines = shape.rank() == 0 ? 0 : std::min<int64_t>(shape.dims()[0], INT32_MAX);
      const int64_t rows = tiles ? lines * LOSA_TILE : lines;
      int64_t promised = rows;
      if (op_.weights == 1 && attribute(api_, info, "out_features", &promised) && promised != rows) {
        refuse("the component " + name + " has " + std::to_string(rows) + " rows, but out_features is " +
               std::to_string(promised));
      }
      parts.rows = static_cast<uint32_t>(std::min<int64_t>(std::max<int64_t>(rows, 0), INT32_MAX));
    }
    void *data = nullptr;
    check(GetTensorMutableData(api_, const_cast<OrtValue *>(value), &data));
    const losa_bytes bytes = {data, shape.elements() * element_bytes(shape.type())};
    sizes += (i == 0 ? "" : ", ") + name + " " + std::to_string(bytes.bytes);
    if (name == "positions") {
      parts.positions = bytes;
    } else if (name == "values") {
      parts.values = bytes;
    } else if (name == "table") {
      parts.table = bytes;
    } else {
      if (shape.type() != kFloat && shape.type() != kFloat16) {
        refuse("the component scale has the element type " + std::to_string(shape.type()) +
               ", expected float (1) or float16 (10)");
      }
      parts.scale = bytes;
      parts.scale_type = shape.type() == kFloat ? LOSA_SCALE_F32 : LOSA_SCALE_F16;
    }
  }
  const auto demand = [&](int status) {
    if (status != LOSA_OK) {
      refuse("weight " + std::to_string(index) + " is damaged: " + losa_status_text(status) + " (shape " +
             std::to_string(parts.rows) + " x " + std::to_string(parts.columns) + ", bytes: " + sizes + ")");
    }
  };
  demand(losa_parts_check(&parts));  // what shapes and attributes claim costs no memory until the bytes agree
  Weight &weight = weights_[index];
  for (losa_bytes *component : {&parts.positions, &parts.values, &parts.scale}) {
    if (auto memory = huge_pages::move_if_mapped(component->data, component->bytes)) {
      component->data = memory.get();
      weight.moved.push_back(std::move(memory));
    }
  }
  weight.starts = std::make_unique<uint64_t[]>(std::max<size_t>(1, losa_starts_count(&parts)));
  demand(losa_tensor_open(&parts, weight.starts.get(), &weight.tensor));
  weight.bytes = parts.positions.bytes + parts.values.bytes + parts.scale.bytes;
}

void Kernel::refuse(const std::string &problem) const {
  throw std::runtime_error("ai.losa " + op_.name + " node '" + node_ + "': " + problem + ".");
}

void Kernel::check(OrtStatus *status) const {
  if (status != nullptr) {
    const std::string text = GetErrorMessage(api_, status);
    ReleaseStatus(api_, status);
    refuse(text);
  }
}

// One call of a kernel: its input, its outputs and how the rows are cut.
class Kernel::Run {
 public:
  Run(const Kernel &kernel, OrtKernelContext *context) : kernel_(kernel), context_(context) {
    const OrtValue *input = nullptr;
    kernel_.check(KernelContext_GetInput(kernel_.api_, context, 0, &input));
    Shape shape(kernel_.api_, input);
    kernel_.check(shape.status());
    columns_ = kernel_.weights_[0].tensor.parts.columns;
    int64_t *last = shape.dims() + (shape.rank() == 0 ? 0 : shape.rank() - 1);
    if (shape.rank() == 0 || *last != static_cast<int64_t>(columns_)) {
      kernel_.refuse("the last dimension of X is " + (shape.rank() == 0 ? "missing" : std::to_string(*last)) +
                     ", expected in_features " + std::to_string(columns_));
    }
    tokens_ = shape.elements() / columns_;
    x_ = static_cast<const float *>(data(input));
    for (size_t i = 0; i < kernel_.op_.output_count(); ++i) {
      *last = static_cast<int64_t>(kernel_.weights_[i].tensor.parts.rows);
      OrtValue *output = nullptr;
      kernel_.check(KernelContext_GetOutput(kernel_.api_, context, i, shape.dims(), shape.rank(), &output));
      y_[i] = static_cast<float *>(data(output));
    }
  }

  void execute() {
    if (tokens_ == 0) {
      return;
    }
    activations_ = activation_buffer.get(losa_activation_bytes(&tensor(0), tokens_));
    if (activations_ == nullptr) {
      throw std::bad_alloc();
    }
    if (gated()) {
      y_[1] = static_cast<float *>(gated_buffer.get(tokens_ * tensor(1).parts.rows * sizeof(float)));
      if (y_[1] == nullptr) {
        throw std::bad_alloc();
      }
    }
    const size_t parts = ceil_div(tokens_, kTokensPerPrepare);
    parallel(tokens_ * columns_ * sizeof(float) < kInlineBytes ? 1 : parts, parts,
             [](void *run, size_t part) { static_cast<Run *>(run)->prepare(part); });
    const size_t chunks = cut();
    parallel(chunks == kernel_.op_.output_count() ? 1 : chunks, chunks,
             [](void *run, size_t chunk) { static_cast<Run *>(run)->compute(chunk); });
    activation_buffer.trim();
    gated_buffer.trim();
    const int status = status_.load(std::memory_order_relaxed);
    if (status == kNoMemory) {
      throw std::bad_alloc();
    }
    if (status != LOSA_OK) {
      kernel_.refuse(losa_status_text(status));
    }
  }

 private:
  static constexpr int kNoMemory = -1;

  const losa_tensor &tensor(size_t weight) const { return kernel_.weights_[weight].tensor; }
  bool gated() const { return kernel_.op_.gated; }

  void *data(const OrtValue *value) const {
    void *data = nullptr;
    kernel_.check(GetTensorMutableData(kernel_.api_, const_cast<OrtValue *>(value), &data));
    return data;
  }

  // Chunks of rows of each output, in proportion to the bytes of its weights, and their total.
  size_t cut() {
    uint64_t work = 0;
    for (size_t i = 0; i < kernel_.op_.weights; ++i) {
      work += kernel_.weights_[i].bytes * tokens_;
    }
    const uint64_t wanted = work < kInlineBytes ? 1 : std::min<uint64_t>(most_chunks(), work / kChunkBytes);
    size_t total = 0;
    for (size_t i = 0; i < kernel_.op_.output_count(); ++i) {
      const uint64_t own = gated() ? work : kernel_.weights_[i].bytes * tokens_;
      const uint64_t share = wanted * own / std::max<uint64_t>(work, 1);
      const size_t steps = ceil_div(tensor(i).parts.rows, LOSA_ROW_STEP);
      chunks_[i] = std::min(std::max<size_t>(1, static_cast<size_t>(share)), steps);
      total += chunks_[i];
    }
    return total;
  }

  // `task` for all indices below `count`: in this thread if `batches` is 1, else in the session's pool.
  void parallel(size_t batches, size_t count, void (*task)(void *, size_t)) {
    if (batches > 1) {
      kernel_.check(KernelContext_ParallelFor(kernel_.api_, context_, task, count, 0, this));
      return;
    }
    for (size_t i = 0; i < count; ++i) {
      task(this, i);
    }
  }

  void prepare(size_t part) {
    const size_t begin = part * kTokensPerPrepare, end = std::min(begin + kTokensPerPrepare, tokens_);
    note(losa_prepare(&tensor(0), x_, columns_, begin, end, tokens_, activations_));
  }

  void compute(size_t chunk) {
    size_t output = 0;
    while (chunk >= chunks_[output]) {
      chunk -= chunks_[output++];
    }
    const size_t rows = tensor(output).parts.rows, steps = ceil_div(rows, LOSA_ROW_STEP);
    const size_t chunks = chunks_[output];
    const size_t begin = steps * chunk / chunks * LOSA_ROW_STEP;
    const size_t end = std::min(steps * (chunk + 1) / chunks * LOSA_ROW_STEP, rows);
    if (!gated()) {
      multiply(output, begin, end);
      return;
    }
    const size_t step = std::max<size_t>(1, kGatedFloats / tokens_ / kPanelRows) * kPanelRows;
    for (size_t first = begin; first < end; first += step) {
      gate(first, std::min(first + step, end));
    }
  }

  // Both products of some rows, then the result in the place of the first.
  void gate(size_t begin, size_t end) {
    multiply(0, begin, end);
    multiply(1, begin, end);
    const size_t rows = tensor(0).parts.rows;
    for (size_t t = 0; t < tokens_; ++t) {
      note(losa_swiglu(y_[0] + t * rows + begin, y_[1] + t * rows + begin, end - begin));
    }
  }

  void multiply(size_t weight, size_t begin, size_t end) {
    const losa_tensor &t = tensor(weight);
    void *scratch = scratch_buffer.get(losa_scratch_bytes(&t, tokens_));
    note(scratch == nullptr
             ? kNoMemory
             : losa_matmul(&t, activations_, tokens_, begin, end, y_[weight], t.parts.rows, scratch));
    scratch_buffer.trim();
  }

  void note(int status) {
    if (status != LOSA_OK) {
      status_.store(status, std::memory_order_relaxed);
    }
  }

  const Kernel &kernel_;
  OrtKernelContext *context_;
  const float *x_ = nullptr;
  size_t tokens_ = 0, columns_ = 0;
  void *activations_ = nullptr;
  std::array<float *, kMostWeights> y_ = {};  // products; of a gate the second is no output
  std::array<size_t, kMostWeights> chunks_ = {};
  std::atomic<int> status_{LOSA_OK};
};

void Kernel::run(OrtKernelContext *context) const { Run(*this, context).execute(); }

}  // namespace losa::ort
