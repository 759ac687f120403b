// Declarations of the parts of ggml that the plug-in meets: no installed header has all of them, and the
// plug-in links to no ggml. True of the versions in kTestedVersions (symbols.cpp), which also checks the
// structures against the library that is loaded. Slots that are not called are declared as Unused.
#ifndef LOSA_GGML_ABI_H
#define LOSA_GGML_ABI_H

#include <cstddef>
#include <cstdint>
#include <vector>

namespace losa::ggml {

using Unused = void (*)();

enum Type : int { kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ8_0 = 8, kQ1_0 = 41 };
enum Status : int { kOutOfMemory = -2, kFailed = -1, kSuccess = 0 };
enum DeviceType : int { kCpu = 0, kAccelerator = 3 };
enum Usage : int { kUsageAny = 0, kUsageWeights = 1 };

struct Buffer;
struct BufferType;
struct Device;
struct Registry;
struct Backend;

struct Tensor {
  int type;
  Buffer *buffer;
  int64_t ne[4];  // elements per dimension, the innermost first
  size_t nb[4];   // strides in bytes
  int op;
  int32_t parameters[16];
  int32_t flags;
  Tensor *src[10];
  Tensor *view_src;
  size_t view_offset;
  void *data;
  char name[64];
  void *extra;
  char padding[8];
};

struct BufferTypeCalls {
  const char *(*name)(BufferType *);
  Buffer *(*allocate)(BufferType *, size_t bytes);
  size_t (*alignment)(BufferType *);
  size_t (*most_bytes)(BufferType *);
  size_t (*tensor_bytes)(BufferType *, const Tensor *);
  bool (*is_host)(BufferType *);
};

struct BufferType {
  BufferTypeCalls calls;
  Device *device;
  void *context;
};

struct BufferCalls {
  void (*free)(Buffer *);
  void *(*base)(Buffer *);
  int (*init_tensor)(Buffer *, Tensor *);
  void (*fill_tensor)(Buffer *, Tensor *, uint8_t value, size_t offset, size_t bytes);
  void (*set_tensor)(Buffer *, Tensor *, const void *data, size_t offset, size_t bytes);
  void (*get_tensor)(Buffer *, const Tensor *, void *data, size_t offset, size_t bytes);
  Unused set_tensor_2d, get_tensor_2d;
  bool (*copy_tensor)(Buffer *, const Tensor *from, Tensor *to);
  void (*clear)(Buffer *, uint8_t value);
  Unused reset;
};

struct Buffer {
  BufferCalls calls;
  BufferType *type;
  void *context;
  size_t bytes;
  int usage;
};

// Read through exported functions only.
struct Graph;

struct BackendCalls {
  const char *(*name)(Backend *);
  void (*free)(Backend *);
  Unused asynchronous[5];
  Unused synchronize;
  Unused plans[4];
  int (*compute)(Backend *, Graph *);
  Unused event_record, event_wait, optimize;
};

struct Backend {
  const uint8_t *guid;
  BackendCalls calls;
  Device *device;
  void *context;
};

struct DeviceProperties {
  const char *name, *description;
  size_t free_bytes, total_bytes;
  int type;
  const char *id;  // capabilities follow; the caller has set them to none
};

struct DeviceCalls {
  const char *(*name)(Device *);
  const char *(*description)(Device *);
  void (*memory)(Device *, size_t *free, size_t *total);
  int (*type)(Device *);
  void (*properties)(Device *, DeviceProperties *);
  Backend *(*init)(Device *, const char *parameters);
  BufferType *(*buffer_type)(Device *);
  BufferType *(*host_buffer_type)(Device *);
  Unused buffer_from_host;
  bool (*supports_op)(Device *, const Tensor *);
  bool (*supports_buffer)(Device *, BufferType *);
  Unused offload, event_new, event_free, event_synchronize;
};

struct Device {
  DeviceCalls calls;
  Registry *registry;
  void *context;
};

struct RegistryCalls {
  const char *(*name)(Registry *);
  size_t (*device_count)(Registry *);
  Device *(*device)(Registry *, size_t index);
  void *(*function)(Registry *, const char *name);
};

struct Registry {
  int version;
  RegistryCalls calls;
  void *context;
};

constexpr int kRegistryVersion = 2;

struct ThreadPool;

// What one thread of the CPU backend is given to compute a node.
struct ComputeParams {
  int thread, threads;
  size_t work_bytes;
  void *work;
  ThreadPool *pool;
  bool reference;
};

// The two interfaces of the CPU backend's extra buffer types. Only the order of their virtual functions
// matters: the CPU backend calls them through our tables, and needs no type information.
class TensorTraits {
 public:
  virtual ~TensorTraits() = default;
  virtual bool work_size(int threads, const Tensor *op, size_t &bytes) = 0;
  virtual bool compute_forward(ComputeParams *params, Tensor *op) = 0;
};

class ExtraBufferType {
 public:
  virtual ~ExtraBufferType() = default;
  virtual bool supports_op(Device *device, const Tensor *op) = 0;
  virtual TensorTraits *get_tensor_traits(const Tensor *op) = 0;
};

using ExtraBufferTypes = std::vector<BufferType *> &(*)();

struct CpuTypeTraits {
  void (*from_float)(const float *x, void *y, int64_t n);
  void (*dot)(int n, float *sum, size_t sum_step, const void *x, size_t x_step, const void *y, size_t y_step,
              int rows);
  int dot_type;
  int64_t rows;
};

}  // namespace losa::ggml

#endif
