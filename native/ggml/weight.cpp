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
#include "format/pack_tiles.h"
#include "rows.h"

namespace losa::ggml {
namespace {

constexpr size_t kWorthAThread = 1 << 18;  // weights
constexpr double kTilesMayCost = 1.5;      // bytes of tiles per byte of the smallest sparse form

std::mutex guard;
Counts total = {};
std::string damage;
std::atomic<bool> unreported{false};  // weights were taken since the last report

size_t aligned(size_t bytes) { return (bytes + LOSA_ALIGNMENT - 1) / LOSA_ALIGNMENT * LOSA_ALIGNMENT; }

// Run work(first, last) on ranges of pairs of rows, in as many threads as are worth it.
template <typename Work>
void split(uint32_t rows, uint32_t columns, Work work) {
  const size_t pairs = (size_t{rows} + 1) / 2, cores = std::thread::hardware_concurrency();
  const size_t most = size_t{rows} * columns / kWorthAThread + 1;
  const size_t threads = cores < 1 ? 1 : cores < most ? cores : most;
  const auto part = [&](size_t i) {
    const size_t first = 2 * (pairs * i / threads), last = 2 * (pairs * (i + 1) / threads);
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

// What the first pass over a weight finds.
struct Found {
  std::vector<uint64_t> words;   // mask
  std::vector<uint32_t> counts;  // kept per row
  std::vector<uint16_t> scales;
  std::atomic<bool> sound{true};  // our types hold every row
};

// N of every M in each row: the smallest M of the usual ones, 0 if there is none. Such a mask has the same
// bytes as a bitmask, and kernels that need not count are faster.
uint8_t group_of(const std::vector<uint64_t> &words, size_t per_row, size_t columns) {
  for (const uint8_t m : {uint8_t{4}, uint8_t{8}}) {
    const uint64_t group = (uint64_t{1} << m) - 1;
    bool all = columns % m == 0;
    for (size_t i = 0; all && i < words.size(); ++i) {
      const size_t left = columns - i % per_row * 64, width = left < 64 ? left : 64;
      for (size_t at = 0; at < width; at += m) {
        all = all && __builtin_popcountll(words[i] >> at & group) == m / 2;
      }
    }
    if (all) {
      return m;
    }
  }
  return 0;
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
  if (bytes <= bytes_) {
    release(bytes);
    return place_;
  }
  own_ = std::make_unique<uint8_t[]>(bytes);
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
  } else if (blob_.mapping) {
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
  int status =
      losa_blob_parts(blob_.mapping ? blob_.data : data, blob_.mapping ? blob_.bytes : bytes_, &parts);
  if (status == LOSA_OK && (parts.rows != rows_ || parts.columns != columns_)) {
    status = LOSA_BAD_PARAMETER;
  }
  if (status != LOSA_OK) {
    parts = {};  // opening it fails with the reason below
  }
  if (blob_.mapping) {
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

// The codes that keep N of every 4 or 16, as tiles. Scales of a tile lie together.
void Weight::pack_tiles(const uint8_t *data, const TileShape &shape, const std::vector<uint64_t> &words,
                        const std::vector<uint16_t> &scales) {
  const size_t row = row_bytes(type_, columns_), groups = scales_per_row(type_, columns_);
  const size_t at_values = aligned(shape.positions()), at_scale = at_values + aligned(shape.values());
  const size_t scale_bytes = 2 * rows_ * groups, at_table = at_scale + aligned(scale_bytes);
  const size_t bytes = at_table + (shape.i4 ? 16 : 0);
  uint8_t *memory = this->memory(bytes);
  // A half of a tile counts as a row here: pairs of rows are not parted, and a tile must not be either.
  split(rows_ / 8, columns_ * 8, [&](size_t first, size_t last) {
    std::vector<uint8_t> room(columns_);
    std::vector<uint16_t> unused(groups);
    const uint8_t *codes = nullptr;
    for (size_t r = first * 8; r < last * 8; ++r) {
      if (r % kTile == 0) {
        clear_tile(shape, r / kTile, memory, memory + at_values);
      }
      read_codes(type_, data + r * row, columns_, room.data(), &codes, unused.data());
      store_tile_row(shape, r, codes, &words[r * ((columns_ + size_t{63}) / 64)], memory, memory + at_values);
      for (size_t g = 0; g < groups; ++g) {
        const size_t at = shape.i4 ? (r / kTile * groups + g) * kTile + r % kTile : r;
        std::memcpy(memory + at_scale + 2 * at, &scales[r * groups + g], 2);
      }
    }
  });
  losa_parts parts = {};
  parts.rows = rows_;
  parts.columns = columns_;
  parts.layout = LOSA_TILED;
  parts.value_type = static_cast<uint8_t>(value_type(type_));
  parts.scale_type = LOSA_SCALE_F16;
  parts.n = static_cast<uint8_t>(shape.n);
  parts.m = static_cast<uint8_t>(shape.m);
  parts.values = {memory + at_values, shape.values()};
  parts.scale = {memory + at_scale, scale_bytes};
  if (shape.i4) {
    parts.group_size = kBlock;
    store_linear_table(memory + at_table);
    parts.table = {memory + at_table, 16};
  }
  if (shape.positions() != 0) {
    parts.positions = {memory, shape.positions()};
  }
  open(parts, own_ ? 0 : bytes, Form::kPacked);
}

// Tiles if the mask keeps about N of every 4 or 16, else bitmask (2:4 and 4:8 as N:M) if that is the smaller,
// else dense; false if our types cannot hold the values.
bool Weight::pack(const uint8_t *data) {
  const size_t row = row_bytes(type_, columns_), per_row = (columns_ + size_t{63}) / 64;
  const size_t scales = scales_per_row(type_, columns_), width = code_bytes(type_);
  const bool pairs = type_ == kQ4_0;
  Found found;
  found.words.resize(rows_ * per_row);
  found.counts.resize(rows_);
  found.scales.resize(rows_ * scales + 1);
  split(rows_, columns_, [&](size_t first, size_t last) {
    std::vector<uint8_t> room(columns_);
    const uint8_t *codes = nullptr;
    for (size_t r = first; r < last && found.sound.load(std::memory_order_relaxed); ++r) {
      if (!read_codes(type_, data + r * row, columns_, room.data(), &codes, &found.scales[r * scales])) {
        found.sound = false;
      }
      found.counts[r] = static_cast<uint32_t>(find_kept(type_, codes, columns_, &found.words[r * per_row]));
    }
  });
  if (!found.sound) {
    return false;
  }

  std::vector<uint64_t> starts(pairs ? (rows_ + size_t{1}) / 2 : rows_);
  uint64_t values = 0;
  for (size_t r = 0, s = 0; r < rows_; r += pairs ? 2 : 1, ++s) {
    const uint32_t partner = pairs && r + 1 < rows_ ? found.counts[r + 1] : 0;
    starts[s] = values;
    values += found.counts[r] > partner ? found.counts[r] : partner;
  }
  const size_t dense_values = pairs ? (columns_ / size_t{2}) * rows_ : width * columns_ * rows_;
  const size_t sparse_values = aligned(values * width) + LOSA_STREAM_SLACK;
  const size_t positions = rows_ * per_row * 8, scale_bytes = 2 * rows_ * scales;
  const bool sparse = positions + sparse_values + starts.size() * 8 < dense_values;

  const TileShape tiles = scales ? find_tiles(found.words, per_row, rows_, columns_, pairs) : TileShape{};
  const bool quads = tiles.n != 0 && tiles.quads();
  const uint8_t m = sparse && !quads ? group_of(found.words, per_row, columns_) : uint8_t{0};
  if (tiles.n != 0 && tiles.bytes() < dense_values && m == 0 &&
      static_cast<double>(tiles.bytes()) < kTilesMayCost * static_cast<double>(positions + sparse_values)) {
    pack_tiles(data, tiles, found.words, found.scales);
    return true;
  }

  losa_parts parts = {};
  parts.rows = rows_;
  parts.columns = columns_;
  parts.layout = sparse ? LOSA_BITMASK : LOSA_DENSE;
  if (m != 0) {
    parts.layout = LOSA_NM;
    parts.m = m;
    parts.n = m / 2;
  }
  parts.value_type = static_cast<uint8_t>(value_type(type_));
  parts.scale_type = scales ? LOSA_SCALE_F16 : LOSA_SCALE_NONE;
  parts.group_size = pairs ? kBlock : 0;
  const size_t value_bytes = sparse ? sparse_values : dense_values;
  const size_t at_values = sparse ? aligned(positions) : 0, at_scale = at_values + aligned(value_bytes);
  const size_t at_table = at_scale + aligned(scale_bytes), bytes = at_table + (pairs ? 16 : 0);
  uint8_t *memory = this->memory(bytes);
  if (sparse) {
    std::memcpy(memory, found.words.data(), positions);
    parts.positions = {memory, positions};
    std::memset(memory + at_values, 0, sparse_values);
  }
  parts.values = {memory + at_values, value_bytes};
  if (scales) {
    std::memcpy(memory + at_scale, found.scales.data(), scale_bytes);
    parts.scale = {memory + at_scale, scale_bytes};
  }
  if (pairs) {
    store_linear_table(memory + at_table);
    parts.table = {memory + at_table, 16};
  }
  split(rows_, columns_, [&](size_t first, size_t last) {
    std::vector<uint8_t> room(columns_);
    std::vector<uint16_t> unused(scales + 1);
    const uint8_t *codes = nullptr;
    uint8_t *out = memory + at_values;
    for (size_t r = first; r < last; ++r) {
      read_codes(type_, data + r * row, columns_, room.data(), &codes, unused.data());
      if (sparse) {
        store_kept(type_, codes, &found.words[r * per_row], per_row, out + starts[pairs ? r / 2 : r] * width,
                   r % 2 ? 4 : 0);
      } else if (pairs) {
        store_dense_i4(codes, columns_, out + r * (columns_ / 2));
      } else {
        std::memcpy(out + r * columns_ * width, codes, columns_ * width);
      }
    }
  });
  open(parts, own_ ? 0 : bytes, Form::kPacked);
  return true;
}

// Stock bytes of a row that was packed here.
void Weight::read_row(uint32_t row, uint8_t *stock, std::vector<uint8_t> &codes) const {
  const losa_parts &p = tensor_.parts;
  const bool pairs = type_ == kQ4_0;
  const size_t width = code_bytes(type_), per_row = (columns_ + size_t{63}) / 64;
  const auto *values = static_cast<const uint8_t *>(p.values.data);
  codes.assign(columns_ * width, 0);
  const size_t scales = scales_per_row(type_, columns_);
  const auto *scale = static_cast<const uint16_t *>(p.scale.data) + row * scales;
  std::vector<uint16_t> of_tile(pairs && p.layout == LOSA_TILED ? scales : 0);
  if (p.layout == LOSA_TILED) {
    const TileShape shape = {rows_, columns_, p.n, p.m, pairs};
    load_tile_row(shape, row, static_cast<const uint8_t *>(p.positions.data), values, codes.data());
    for (size_t g = 0; g < of_tile.size(); ++g) {
      of_tile[g] =
          static_cast<const uint16_t *>(p.scale.data)[(row / kTile * scales + g) * kTile + row % kTile];
    }
    scale = of_tile.empty() ? scale : of_tile.data();
  } else if (p.layout != LOSA_DENSE) {
    const size_t line = pairs ? row / 2 : row;
    const uint64_t start = p.layout == LOSA_NM ? line * (columns_ / p.m * p.n) : starts_[line];
    std::vector<uint64_t> words(per_row);
    std::memcpy(words.data(), static_cast<const uint8_t *>(p.positions.data) + row * per_row * 8,
                per_row * 8);
    load_kept(type_, values + start * width, words.data(), per_row, row % 2 ? 4 : 0, codes.data());
  } else if (pairs) {
    load_dense_i4(values + row * (columns_ / size_t{2}), columns_, codes.data());
  } else {
    std::memcpy(codes.data(), values + size_t{row} * columns_ * width, columns_ * width);
  }
  write_codes(type_, codes.data(), columns_, scale, stock);
}

void Weight::get(void *data, size_t offset, size_t bytes) const {
  auto *out = static_cast<uint8_t *>(data);
  if (blob_.mapping) {
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
