#include "timing.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "losa/kernels.h"

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Clock = std::chrono::steady_clock;

constexpr size_t kHugePage = size_t{1} << 21;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void check(int status) {
  if (status != LOSA_OK) throw std::runtime_error(losa_status_text(status));
}

// Memory whose pages exist and are huge where the system has such, as for weights that NumPy allocates.
class Buffer {
 public:
  explicit Buffer(size_t bytes)
      : bytes_(std::max<size_t>(bytes, 1)),
        data_(static_cast<uint8_t *>(::operator new(bytes_, std::align_val_t{kHugePage}))) {
#if defined(MADV_HUGEPAGE)
    madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
    std::memset(data_, 1, bytes_);
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t{kHugePage}); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;

  uint8_t *data() const { return data_; }
  float *floats() const { return reinterpret_cast<float *>(data_); }

 private:
  size_t bytes_;
  uint8_t *data_;
};

// All threads meet here. They spin, because a pass takes milliseconds and a wake-up tens of microseconds.
class Barrier {
 public:
  explicit Barrier(size_t threads) : threads_(threads) {}

  void wait() {
    const size_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_acq_rel);
      return;
    }
    while (generation_.load(std::memory_order_acquire) == generation) std::this_thread::yield();
  }

 private:
  const size_t threads_;
  std::atomic<size_t> arrived_{0};
  std::atomic<size_t> generation_{0};
};

// Calls work(thread) in `threads` threads at once; the calling thread is the first, so that one thread
// starts no other. work must not throw. If a thread cannot be started, none of them works.
template <typename Work>
void run_threads(size_t threads, const Work &work) {
  enum : int { kWait, kGo, kLeave };
  std::atomic<int> signal{kWait};
  std::vector<std::thread> others;
  const auto leave = [&](int value) { signal.store(value, std::memory_order_release); };
  try {
    others.reserve(threads);
    for (size_t thread = 1; thread < threads; ++thread) {
      others.emplace_back([&signal, &work, thread] {
        int now = kWait;
        while ((now = signal.load(std::memory_order_acquire)) == kWait) std::this_thread::yield();
        if (now == kGo) work(thread);
      });
    }
  } catch (...) {
    leave(kLeave);
    for (std::thread &other : others) other.join();
    throw;
  }
  leave(kGo);
  work(0);
  for (std::thread &other : others) other.join();
}

// Part `index` of `count` equal parts of `total`, cut at multiples of `step`.
struct Range {
  size_t begin, end;
};

Range part_of(size_t total, size_t step, size_t index, size_t count) {
  const size_t steps = (total + step - 1) / step;
  const auto cut = [&](size_t i) { return std::min(total, steps * i / count * step); };
  return {cut(index), cut(index + 1)};
}

// Sum of the 64-bit words, so that every one of them has to be read. Sixteen independent sums: the
// compiler keeps them in vector registers, and no addition waits for the one before. Asked for ahead, as
// kernels do, because what a CPU fetches by itself can be half of what its memory delivers.
uint64_t sum_words(const uint64_t *words, size_t count) {
  constexpr size_t kSums = 16, kAhead = 3072;
  uint64_t sums[kSums] = {};
  for (size_t i = 0; i + kSums <= count; i += kSums) {
    const size_t ahead = i + kAhead / sizeof(uint64_t);
    if (ahead + kSums <= count) {
      __builtin_prefetch(words + ahead);
      __builtin_prefetch(words + ahead + kSums / 2);
    }
    for (size_t j = 0; j < kSums; ++j) sums[j] += words[i + j];
  }
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

double read_bandwidth(size_t bytes, size_t threads, double seconds) {
  constexpr size_t kStep = size_t{1} << 16;
  if (bytes < kStep || threads < 1) throw std::invalid_argument("read_bandwidth needs 64 KiB and a thread");
  const Buffer buffer(bytes / kStep * kStep);
  const size_t used = bytes / kStep * kStep;
  std::vector<uint64_t> sums(threads * 8);  // a cache line for each thread
  std::atomic<bool> more{true};
  double best = 0.0;
  Barrier barrier(threads);
  run_threads(threads, [&](size_t thread) {
    const Range range = part_of(used, kStep, thread, threads);
    const auto *words = reinterpret_cast<const uint64_t *>(buffer.data() + range.begin);
    const Clock::time_point begin = Clock::now();
    while (more.load(std::memory_order_acquire)) {
      barrier.wait();
      const Clock::time_point start = Clock::now();
      sums[8 * thread] += sum_words(words, (range.end - range.begin) / sizeof(uint64_t));
      barrier.wait();
      if (thread == 0) {
        best = std::max(best, static_cast<double>(used) / seconds_since(start));
        if (seconds_since(begin) >= seconds) more.store(false, std::memory_order_release);
      }
      barrier.wait();
    }
  });
  // The sums are looked at, so that no compiler may leave them out.
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  if (total == 0) throw std::runtime_error("the buffer reads as zero");
  return best;
}

template <typename T>
T number(const nb::dict &description, const char *key) {
  return nb::cast<T>(description[key]);
}

// Packed tensors of one kind, shape and content at different places in memory: together larger than the
// caches, so that every pass reads them from memory.
class MatmulTimer {
 public:
  explicit MatmulTimer(const nb::list &descriptions) {
    if (nb::len(descriptions) == 0) throw std::invalid_argument("MatmulTimer needs a tensor");
    std::vector<losa_parts> parts;
    for (nb::handle description : descriptions) parts.push_back(read(nb::cast<nb::dict>(description)));
    const nb::gil_scoped_release release;
    starts_.resize(losa_starts_count(&parts[0]));
    losa_tensor first;
    check(losa_tensor_open(&parts[0], starts_.data(), &first));
    for (const losa_parts &copy : parts) {
      if (!same(parts[0], copy)) throw std::invalid_argument("the tensors of a MatmulTimer have to be equal");
      // Equal bytes were found good once; checking every copy would take longer than the timing.
      tensors_.push_back(first);
      tensors_.back().parts = copy;
    }
  }

  // Seconds of each pass: prepare once, then multiply by every tensor. Threads meet only at the ends.
  std::vector<double> time(size_t tokens, size_t threads, size_t passes, size_t rows) const {
    const size_t all = tensors_[0].parts.rows;
    if (tokens < 1 || threads < 1 || rows > all || (rows != all && rows % LOSA_ROW_STEP != 0)) {
      throw std::invalid_argument("time() needs a token, a thread, and rows in steps of LOSA_ROW_STEP");
    }
    const nb::gil_scoped_release release;
    Memory memory(tensors_[0], tokens, threads);
    std::vector<double> seconds(passes);
    std::atomic<int> failure{LOSA_OK};
    Barrier barrier(threads);
    run_threads(threads, [&](size_t thread) {
      const Range mine = part_of(rows ? rows : all, LOSA_ROW_STEP, thread, threads);
      for (double &taken : seconds) {
        barrier.wait();
        const Clock::time_point start = Clock::now();
        int status = prepare(memory, part_of(tokens, 1, thread, threads), tokens);
        barrier.wait();
        if (status == LOSA_OK) status = multiply(memory, mine, tokens, thread);
        if (status != LOSA_OK) failure.store(status);
        barrier.wait();
        if (thread == 0) taken = seconds_since(start);
      }
    });
    check(failure.load());
    return seconds;
  }

 private:
  struct Memory {
    Memory(const losa_tensor &tensor, size_t tokens, size_t threads)
        : x(tokens * tensor.parts.columns * sizeof(float)),
          y(tokens * tensor.parts.rows * sizeof(float)),
          activations(losa_activation_bytes(&tensor, tokens)) {
      for (size_t i = 0; i < tokens * tensor.parts.columns; ++i) {
        x.floats()[i] = static_cast<float>(static_cast<int>((i * 2654435761u >> 8) & 1023) - 512) / 256.0f;
      }
      for (size_t thread = 0; thread < threads; ++thread) {
        scratch.push_back(std::make_unique<Buffer>(losa_scratch_bytes(&tensor, tokens)));
      }
    }

    Buffer x, y, activations;
    std::vector<std::unique_ptr<Buffer>> scratch;
  };

  int prepare(Memory &memory, Range tokens, size_t count) const {
    if (tokens.begin == tokens.end) return LOSA_OK;
    return losa_prepare(&tensors_[0], memory.x.floats(), tensors_[0].parts.columns, tokens.begin, tokens.end,
                        count, memory.activations.data());
  }

  int multiply(Memory &memory, Range rows, size_t tokens, size_t thread) const {
    if (rows.begin == rows.end) return LOSA_OK;
    for (const losa_tensor &tensor : tensors_) {
      const int status = losa_matmul(&tensor, memory.activations.data(), tokens, rows.begin, rows.end,
                                     memory.y.floats(), tensor.parts.rows, memory.scratch[thread]->data());
      if (status != LOSA_OK) return status;
    }
    return LOSA_OK;
  }

  losa_parts read(const nb::dict &description) {
    losa_parts parts = {};
    parts.rows = number<uint32_t>(description, "rows");
    parts.columns = number<uint32_t>(description, "columns");
    parts.layout = number<uint8_t>(description, "layout");
    parts.value_type = number<uint8_t>(description, "value_type");
    parts.scale_type = number<uint8_t>(description, "scale_type");
    parts.n = number<uint8_t>(description, "n");
    parts.m = number<uint8_t>(description, "m");
    parts.position_bits = number<uint8_t>(description, "position_bits");
    parts.group_size = number<uint16_t>(description, "group_size");
    parts.positions = component(description, "positions");
    parts.values = component(description, "values");
    parts.scale = component(description, "scale");
    parts.table = component(description, "table");
    return parts;
  }

  losa_bytes component(const nb::dict &description, const char *key) {
    if (!description.contains(key)) return {nullptr, 0};
    keep_.push_back(nb::cast<Bytes>(description[key]));
    return {keep_.back().data(), keep_.back().size()};
  }

  static bool same(const losa_bytes &a, const losa_bytes &b) {
    return a.bytes == b.bytes && (a.bytes == 0 || std::memcmp(a.data, b.data, a.bytes) == 0);
  }

  static bool same(const losa_parts &a, const losa_parts &b) {
    return a.rows == b.rows && a.columns == b.columns && a.layout == b.layout &&
           a.value_type == b.value_type && a.scale_type == b.scale_type && a.n == b.n && a.m == b.m &&
           a.position_bits == b.position_bits && a.group_size == b.group_size &&
           same(a.positions, b.positions) && same(a.values, b.values) && same(a.scale, b.scale) &&
           same(a.table, b.table);
  }

  std::vector<Bytes> keep_;
  std::vector<uint64_t> starts_;
  std::vector<losa_tensor> tensors_;
};

}  // namespace

void register_timing(nb::module_ &module) {
  module.def("read_bandwidth", &read_bandwidth, nb::arg("bytes"), nb::arg("threads"), nb::arg("seconds"),
             nb::call_guard<nb::gil_scoped_release>(),
             "Bytes per second at which `threads` threads read a buffer of `bytes` bytes once from end to "
             "end: the best pass of those that fit in `seconds` (at least one).");
  nb::class_<MatmulTimer>(module, "MatmulTimer", "Times the kernels on copies of one packed tensor.")
      .def(nb::init<const nb::list &>(), nb::arg("tensors"))
      .def("time", &MatmulTimer::time, nb::arg("tokens"), nb::arg("threads"), nb::arg("passes"),
           nb::arg("rows") = 0,
           "Seconds of each pass over all tensors: activations [tokens, columns] are prepared once, then "
           "multiplied by the first `rows` rows (0: all) of every tensor.");
}
