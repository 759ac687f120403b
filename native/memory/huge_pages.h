// Memory in huge pages for weights.
#ifndef LOSA_HUGE_PAGES_H
#define LOSA_HUGE_PAGES_H

#include <cstddef>
#include <cstdint>
#include <memory>

// Weights that are mapped from their file lie in pages of 4 KiB, and to find each of them costs kernels that
// read from memory up to a fifth of their speed. Here they get pages of 2 MiB, at a multiple of 64.
//
// Everything returns null where bytes are to stay where they are: where they are few, where the system has no
// huge pages, where less than a quarter of the memory would be left available (the pages of a file can be
// taken back from a program, and these cannot), and with LOSA_HUGE_PAGES=0.
namespace losa::huge_pages {

// Memory of zeros.
std::shared_ptr<uint8_t> take(size_t bytes);

// Copies bytes that the caller knows to be mapped from a file, and gives the pages of the file back, so that
// there is no second copy in memory. The file stays mapped, and who reads it there gets its bytes.
std::shared_ptr<const uint8_t> move_mapped(const void *data, size_t bytes);

// The same for bytes of unknown origin. Null also if they are no mapped file: then they would be in memory
// twice.
std::shared_ptr<const uint8_t> move_if_mapped(const void *data, size_t bytes);

}  // namespace losa::huge_pages

#endif
