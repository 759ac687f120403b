#include "weight.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>

#include "abi.h"
#include "format/choose.h"
#include "format/codes.h"
#include "format/pack.h"
#include "memory/huge_pages.h"
#include "rows.h"

namespace losa::ggml {
namespace {

constexpr size_t kWorthAThread = 1 << 18;  // weights

std::mutex guard;
Counts total = {};
std::string damage;
std::atomic<bool> unreported{false};  // weights were taken since the last report

// Run work(first, last) on ranges of `step` rows, in as many threads as are worth it.
template <typename Work>
void split(uint32_t rows, uint32_t columns, size_t step, Work work) {
  const size_t steps = (rows + step - 1) / step, cores = std::thread::hardware_concurrency();
  const size_t most = size_t{rows} * columns / kWorthAThread + 1;
  const size_t threads = cores < 1 ? 1 : cores < most ? cores : most;
  const auto part = [&](size_t i) {
    const size_t first = step * (steps * i / threads), last = step * (steps * (i + 1) / threads);
    work(first, last < rows ? last : size_t{rows});
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < threads; ++i) {
    try {
      others.emplace_back(part, i);
    } catch (const std::exception &) {
      part(i);  // no more threads to be had
    }
  }
  part(0);
  for (auto &thread : others) {
    thread.join();
  }
}

// Bytes of a weight in the type of ggml that has such values: what a view declares is smaller.
uint64_t dense_bytes(const losa_parts &p) {
  const int type = p.value_type == LOSA_F32   ? kF32
                   : p.value_type == LOSA_F16 ? kF16
                   : p.value_type == LOSA_I8  ? kQ8_0
                                              : kQ4_0;
  const size_t row = row_bytes(type, p.columns);
  return uint64_t{p.rows} * (row != 0 ? row : row_bytes(kF16, p.columns));
}

}  // namespace

size_t row_bytes(int type, uint64_t columns) {
  switch (type) {
    case kF32:
      return columns * 4;
    case kF16:
      return columns * 2;
    case kQ8_0:
      return columns % kBlock ? 0 : columns / kBlock * 34;
    case kQ4_0:
      return columns % kBlock ? 0 : columns / kBlock * 18;
    case kQ1_0:  // the smallest, which views of packed files declare; never packed
      return columns % 128 ? 0 : columns / 128 * 18;
    default:
      return 0;
  }
}

Counts counts() {
  const std::lock_guard<std::mutex> lock(guard);
  return total;
}

void report_load() {
  static const bool verbose = std::getenv("LOSA_GGML_VERBOSE") != nullptr;
  if (!verbose || !unreported.load(std::memory_order_relaxed) || !unreported.exchange(false)) {
    return;
  }
  const Counts c = counts();
  constexpr double mega = 1e6;
  std::fprintf(stderr, "losa: %llu weights, %llu of them sparse: %.1f MB as %.1f MB, packed in %.2f s\n",
               static_cast<unsigned long long>(c.tensors), static_cast<unsigned long long>(c.packed),
               static_cast<double>(c.dense_bytes) / mega, static_cast<double>(c.packed_bytes) / mega,
               static_cast<double>(c.pack_nanoseconds) / 1e9);
}

std::string take_damage() {
  const std::lock_guard<std::mutex> lock(guard);
  std::string text;
  text.swap(damage);
  return text;
}

Weight::Weight(const Tensor &tensor, uint8_t *place)
    : type_(tensor.type),
      rows_(static_cast<uint32_t>(tensor.ne[1])),
      columns_(static_cast<uint32_t>(tensor.ne[0])),
      bytes_(row_bytes(tensor.type, static_cast<uint64_t>(tensor.ne[0])) * static_cast<size_t>(tensor.ne[1])),
      place_(place),
      name_(tensor.name) {}

// Pages of the place that are not used any more go back to the system, and read as zero.
void Weight::release(size_t used) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(place_) + used + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(place_) + bytes_) / page * page;
  if (first < last) {
    madvise(reinterpret_cast<void *>(first), last - first, MADV_DONTNEED);
  }
}

uint8_t *Weight::memory(size_t bytes) {
  own_.reset();
  blob_ = {};
  own_ = huge_pages::take(bytes);
  if (own_ == nullptr && bytes <= bytes_) {
    release(bytes);
    return place_;
  }
  if (own_ == nullptr) {
    own_ = std::shared_ptr<uint8_t>(new uint8_t[bytes](), std::default_delete<uint8_t[]>());
  }
  return own_.get();
}

void Weight::keep_stock(const uint8_t *data) {
  own_.reset();
  blob_ = {};
  form_ = Form::kStock;
  std::memmove(place_, data, bytes_);
}

void Weight::to_stock() {
  if (form_ == Form::kPacked) {
    auto copy = std::make_unique<uint8_t[]>(bytes_);
    get(copy.get(), 0, bytes_);
    keep_stock(copy.get());
  } else if (blob_.owner) {
    std::memcpy(place_, blob_.data, blob_.bytes < bytes_ ? blob_.bytes : bytes_);
    blob_ = {};
  }
  form_ = Form::kStock;  // a copied blob's bytes are at the place as they came
}

void Weight::set(const void *data, size_t offset, size_t bytes) {
  const auto *from = static_cast<const uint8_t *>(data);
  if (offset == 0 && bytes == bytes_) {
    received_ = bytes_;
    take(from);
    return;
  }
  to_stock();
  std::memcpy(place_ + offset, from, bytes);
  received_ = offset == 0 ? bytes : offset == received_ ? offset + bytes : 0;
  if (received_ == bytes_) {
    const std::vector<uint8_t> copy(place_, place_ + bytes_);
    take(copy.data());
  }
}

void Weight::fill(uint8_t value, size_t offset, size_t bytes) {
  to_stock();
  received_ = 0;
  std::memset(place_ + offset, value, bytes);
}

void Weight::take(const uint8_t *data) {
  const auto begin = std::chrono::steady_clock::now();
  bool done = take_blob(data);
  try {
    done = done || (type_ != kQ1_0 && pack(data));
  } catch (const std::exception &) {
    done = false;  // no memory or no threads: the stock form needs neither
  }
  if (!done) {
    keep_stock(data);
  }
  const bool sparse = form_ == Form::kBlob || (form_ == Form::kPacked && tensor_.parts.layout != LOSA_DENSE);
  uint64_t held = bytes_, dense = bytes_;
  if (done && form_ != Form::kDamaged) {
    const losa_parts &p = tensor_.parts;
    held = p.positions.bytes + p.values.bytes + p.scale.bytes + p.table.bytes + starts_.size() * 8;
    dense = form_ == Form::kBlob ? dense_bytes(p) : dense;
  }
  const auto spent = std::chrono::steady_clock::now() - begin;
  unreported = true;
  const std::lock_guard<std::mutex> lock(guard);
  total.tensors += 1;
  (sparse ? total.packed : total.dense) += 1;
  total.dense_bytes += dense;
  total.packed_bytes += held;
  total.pack_nanoseconds +=
      static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count());
}

void Weight::open(const losa_parts &parts, size_t bytes, Form form) {
  starts_.resize(losa_starts_count(&parts));
  const int status = losa_tensor_open(&parts, starts_.data(), &tensor_);
  form_ = status == LOSA_OK ? form : Form::kDamaged;
  if (status != LOSA_OK) {
    starts_.clear();
    const std::lock_guard<std::mutex> lock(guard);
    if (damage.empty()) {
      damage = name_ + " is damaged: " + losa_status_text(status);
    }
  }
  release(bytes);
}

// A blob is told by its first eight bytes and its shape, which no weight of ours has by chance: from there
// on, anything wrong is damage, not a dense weight.
bool Weight::take_blob(const uint8_t *data) {
  if (!starts_as_blob(data, bytes_)) {
    return false;
  }
  own_.reset();
  blob_ = referred(data);
  losa_parts parts = {};
  int status = losa_blob_parts(blob_.owner ? blob_.data : data, blob_.owner ? blob_.bytes : bytes_, &parts);
  if (status == LOSA_OK && (parts.rows != rows_ || parts.columns != columns_)) {
    status = LOSA_BAD_PARAMETER;
  }
  if (status != LOSA_OK) {
    parts = {};  // opening it fails with the reason below
  }
  if (blob_.owner) {
    open(parts, 0, Form::kBlob);
    return true;
  }
  losa_bytes *components[] = {&parts.positions, &parts.values, &parts.scale, &parts.table};
  size_t used = LOSA_HEADER_BYTES;
  for (const losa_bytes *part : components) {
    if (part->bytes != 0) {
      used = static_cast<size_t>(static_cast<const uint8_t *>(part->data) - data) + part->bytes;
    }
  }
  std::memcpy(place_, data, used);
  for (losa_bytes *part : components) {
    if (part->bytes != 0) {
      part->data = place_ + (static_cast<const uint8_t *>(part->data) - data);
    }
  }
  open(parts, used, Form::kBlob);
  return true;
}

// False if our types cannot hold the values.
bool Weight::pack(const uint8_t *data) {
  const size_t row = row_bytes(type_, columns_), scales = scales_per_row(type_, columns_);
  const losa_value_type type = value_type(type_);
  format::Mask mask(rows_, columns_);
  std::vector<uint16_t> scale(rows_ * scales + 1);
  std::atomic<bool> sound{true};
  split(rows_, columns_, 1, [&](size_t first, size_t last) {
    std::vector<uint8_t> room(columns_);
    const uint8_t *codes = nullptr;
    for (size_t r = first; r < last && sound.load(std::memory_order_relaxed); ++r) {
      if (!read_codes(type_, data + r * row, columns_, room.data(), &codes, &scale[r * scales])) {
        sound = false;
      }
      mask.counts[r] = static_cast<uint32_t>(format::find_kept(type, codes, columns_, mask.row(r)));
    }
  });
  if (!sound) {
    return false;
  }
  const format::Statistics found = format::statistics_of(mask, type, format::kAtLoad);
  const format::Choice choice = format::choose(found, type, format::kAtLoad);
  format::Packer packer(mask, choice, {type, type == LOSA_I4 ? uint16_t{kBlock} : uint16_t{0}, scale.data()});
  const losa_parts parts = packer.place(memory(packer.bytes()));
  split(rows_, columns_, packer.row_step(), [&](size_t first, size_t last) {
    std::vector<uint16_t> unused(scales + 1);
    packer.store(first, last, [&](size_t r, uint8_t *room) {
      const uint8_t *codes = nullptr;
      read_codes(type_, data + r * row, columns_, room, &codes, unused.data());
      return codes;
    });
  });
  open(parts, own_ ? 0 : packer.bytes(), Form::kPacked);
  return true;
}

// Stock bytes of a row that was packed here; `codes` has room for a row of any type.
void Weight::read_row(uint32_t row, uint8_t *stock, std::vector<uint8_t> &codes) const {
  std::vector<uint16_t> scales(scales_per_row(type_, columns_));
  codes.resize(size_t{columns_} * sizeof(float));
  format::load_row(tensor_, row, codes.data());
  format::load_scales(tensor_.parts, row, scales.data());
  write_codes(type_, codes.data(), columns_, scales.data(), stock);
}

void Weight::get(void *data, size_t offset, size_t bytes) const {
  auto *out = static_cast<uint8_t *>(data);
  if (blob_.owner) {
    const size_t there = offset < blob_.bytes ? blob_.bytes - offset : 0,
                 part = there < bytes ? there : bytes;
    std::memcpy(out, blob_.data + offset, part);
    std::memset(out + part, 0, bytes - part);
    return;
  }
  if (form_ != Form::kPacked) {
    std::memcpy(out, place_ + offset, bytes);
    return;
  }
  const size_t row = row_bytes(type_, columns_);
  std::vector<uint8_t> stock(row), codes;
  while (bytes > 0) {
    const size_t within = offset % row, here = bytes < row - within ? bytes : row - within;
    read_row(static_cast<uint32_t>(offset / row), stock.data(), codes);
    std::memcpy(out, stock.data() + within, here);
    out += here;
    offset += here;
    bytes -= here;
  }
}

}  // namespace losa::ggml
