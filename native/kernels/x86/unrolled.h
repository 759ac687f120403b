// Loops of a fixed length, written out, and functions that are always inlined.
#ifndef LOSA_UNROLLED_H
#define LOSA_UNROLLED_H

#include <cstddef>
#include <type_traits>
#include <utility>

// Not where intrinsics are emulated: those are long functions, of which a copy in every loop takes minutes to
// compile.
#if defined(LOSA_EMULATED)
#define LOSA_ALWAYS_INLINE
#else
#define LOSA_ALWAYS_INLINE __attribute__((always_inline))
#endif

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
