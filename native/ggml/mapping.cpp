#include "mapping.h"

#include <sys/mman.h>

#include <cstring>
#include <mutex>
#include <unordered_map>

#include "losa/kernels.h"
#include "memory/huge_pages.h"

namespace losa::ggml {
namespace {

constexpr size_t kReserved = 96;  // of the header: 32 bytes that are zero in a file
constexpr uint8_t kMark[8] = {'m', 'a', 'p', 'p', 'e', 'd', 0, 1};

struct Reference {
  uint8_t mark[8];
  uint64_t id, offset, bytes;
};
static_assert(kReserved + sizeof(Reference) == LOSA_HEADER_BYTES, "the reference fills the reserved bytes");

std::mutex guard;
std::unordered_map<uint64_t, std::weak_ptr<Mapping>> mappings;
uint64_t last_id = 0;

}  // namespace

Mapping::Mapping(const uint8_t *data, size_t bytes) : data_(data), bytes_(bytes), id_(0) {}

std::shared_ptr<Mapping> Mapping::of(int file, size_t bytes) {
  void *data = bytes == 0 ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0);
  if (data == MAP_FAILED) {
    return nullptr;
  }
  madvise(data, bytes, MADV_WILLNEED);
  std::shared_ptr<Mapping> mapping(new Mapping(static_cast<const uint8_t *>(data), bytes));
  const std::lock_guard<std::mutex> lock(guard);
  mapping->id_ = ++last_id;
  mappings[mapping->id_] = mapping;
  return mapping;
}

bool Mapping::any() {
  const std::lock_guard<std::mutex> lock(guard);
  return !mappings.empty();
}

Mapping::~Mapping() {
  munmap(const_cast<uint8_t *>(data_), bytes_);
  const std::lock_guard<std::mutex> lock(guard);
  mappings.erase(id_);
}

bool starts_as_blob(const uint8_t *data, size_t bytes) {
  static const uint8_t kHead[8] = {'L', 'O', 'S', 'A', LOSA_FORMAT_VERSION, 0, LOSA_HEADER_BYTES, 0};
  return bytes >= LOSA_HEADER_BYTES && std::memcmp(data, kHead, sizeof kHead) == 0;
}

void refer(const Mapping &mapping, size_t offset, size_t bytes, uint8_t *header) {
  Reference reference = {{}, mapping.id(), offset, bytes};
  std::memcpy(reference.mark, kMark, sizeof kMark);
  std::memcpy(header, mapping.data() + offset, kReserved);
  std::memcpy(header + kReserved, &reference, sizeof reference);
}

OwnedBlob referred(const uint8_t *header) {
  Reference reference;
  std::memcpy(&reference, header + kReserved, sizeof reference);
  if (std::memcmp(reference.mark, kMark, sizeof kMark) != 0) {
    return {};
  }
  std::shared_ptr<Mapping> mapping;
  {
    // Only here: the end of a mapping locks, too, and this may hold the last reference to one.
    const std::lock_guard<std::mutex> lock(guard);
    const auto found = mappings.find(reference.id);
    mapping = found == mappings.end() ? nullptr : found->second.lock();
  }
  if (!mapping || reference.offset > mapping->bytes() ||
      reference.bytes > mapping->bytes() - reference.offset) {
    return {};
  }
  const uint8_t *data = mapping->data() + reference.offset;
  const auto bytes = static_cast<size_t>(reference.bytes);
  if (auto moved = huge_pages::move_mapped(data, bytes)) {
    data = moved.get();
    return {std::move(moved), data, bytes};
  }
  return {std::move(mapping), data, bytes};
}

}  // namespace losa::ggml
