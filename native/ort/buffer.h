// Working memory of the kernels' threads.
#ifndef LOSA_ORT_BUFFER_H
#define LOSA_ORT_BUFFER_H

#include <cstddef>
#include <new>

#include "losa/kernels.h"

namespace losa::ort {

// Memory that only grows, one per thread and purpose: kernels of a session run one after another, so
// they can share it, and a step of the decoder allocates nothing.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { release(); }

  // Null if there is no memory.
  void *get(size_t bytes) {
    if (bytes > size_) {
      release();
      const size_t rounded = (bytes + LOSA_ALIGNMENT - 1) / LOSA_ALIGNMENT * LOSA_ALIGNMENT;
      data_ = ::operator new(rounded, std::align_val_t{LOSA_ALIGNMENT}, std::nothrow);
      size_ = data_ == nullptr ? 0 : rounded;
    } else if (data_ == nullptr) {
      return get(1);
    }
    return data_;
  }

  // A large buffer is given back after the run: a long prompt should not cost memory for ever.
  void trim() {
    if (size_ > kKeptBytes) {
      release();
    }
  }

 private:
  static constexpr size_t kKeptBytes = 8 * 1024 * 1024;

  void release() {
    ::operator delete(data_, std::align_val_t{LOSA_ALIGNMENT});
    data_ = nullptr;
    size_ = 0;
  }

  void *data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace losa::ort

#endif
