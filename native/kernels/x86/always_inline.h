// Functions that are inlined into every caller, also where the compiler thinks that there are too many.
#ifndef LOSA_ALWAYS_INLINE_H
#define LOSA_ALWAYS_INLINE_H

// Not where intrinsics are emulated, which are long functions then, and not in builds without inlining: a
// copy in every loop takes minutes to compile.
#if defined(LOSA_EMULATED) || defined(__NO_INLINE__)
#define LOSA_ALWAYS_INLINE
#else
#define LOSA_ALWAYS_INLINE __attribute__((always_inline))
#endif

#endif
