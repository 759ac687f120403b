// Packed files that are mapped, so that weights use their bytes in place.
//
// llama.cpp hands weights over as bytes that it has read. From a virtual file it reads, for a blob, only the
// header, whose reserved bytes refer to the blob in the mapping.
#ifndef LOSA_GGML_MAPPING_H
#define LOSA_GGML_MAPPING_H

#include <cstddef>
#include <cstdint>
#include <memory>

namespace losa::ggml {

class Mapping {
 public:
  // The whole file, which may be closed afterwards; null if the system does not map it.
  static std::shared_ptr<Mapping> of(int file, size_t bytes);
  // True while a file is mapped: only then can a weight turn out to refer to a blob.
  static bool any();
  ~Mapping();
  Mapping(const Mapping &) = delete;
  Mapping &operator=(const Mapping &) = delete;

  const uint8_t *data() const { return data_; }
  size_t bytes() const { return bytes_; }
  uint64_t id() const { return id_; }

 private:
  Mapping(const uint8_t *data, size_t bytes);

  const uint8_t *data_;
  size_t bytes_;
  uint64_t id_;
};

// A blob outside of the memory that ggml gave us, which it keeps: a mapping, or what was copied from it.
struct OwnedBlob {
  std::shared_ptr<const void> owner;
  const uint8_t *data = nullptr;
  size_t bytes = 0;
};

bool starts_as_blob(const uint8_t *data, size_t bytes);

// The header of the blob at `offset` with a reference to it; header has LOSA_HEADER_BYTES.
void refer(const Mapping &mapping, size_t offset, size_t bytes, uint8_t *header);
// What a header refers to, in huge pages if it can be moved there; without an owner if that is nothing that
// is mapped now.
OwnedBlob referred(const uint8_t *header);

}  // namespace losa::ggml

#endif
