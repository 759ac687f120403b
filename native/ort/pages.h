// Memory in huge pages for weights.
#ifndef LOSA_ORT_PAGES_H
#define LOSA_ORT_PAGES_H

#include <cstddef>
#include <cstdint>
#include <memory>

namespace losa::ort {

// ONNX Runtime maps weights from their file in pages of 4 KiB, and to find each of them costs kernels that
// read from memory up to a fifth of their speed. This copies what is mapped from a file to pages of 2 MiB,
// at a multiple of 64, and gives the pages of the file back, so that there is no second copy in memory. The
// file stays mapped, and who reads it there gets its bytes.
//
// Null where the bytes stay where they are: where they are few, or no mapped file (then they would be there
// twice), where the system has no huge pages, where less than a quarter of the memory would be left available
// (the pages of a file can be taken back from a program, and these cannot), and with LOSA_HUGE_PAGES=0.
std::shared_ptr<const uint8_t> move_to_huge_pages(const void *data, size_t bytes);

}  // namespace losa::ort

#endif
