// Loops of a fixed length, written out.
#ifndef LOSA_UNROLLED_H
#define LOSA_UNROLLED_H

#include <cstddef>
#include <type_traits>
#include <utility>

#include "kernels/x86/always_inline.h"

namespace losa {
namespace {

template <typename Use, size_t... Index>
inline LOSA_ALWAYS_INLINE void unroll(std::index_sequence<Index...>, Use use) {
  (use(std::integral_constant<size_t, Index>()), ...);
}

// use(0), use(1), ...: written out, because the compiler keeps an array that a loop walks in memory.
template <size_t Count, typename Use>
inline LOSA_ALWAYS_INLINE void unrolled(Use use) {
  unroll(std::make_index_sequence<Count>(), use);
}

}  // namespace
}  // namespace losa

#endif
