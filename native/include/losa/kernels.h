// Kernels on packed sparse weights: y = x * W^T with W as stored by format 1 (docs/formats.md).
//
// They know no framework, allocate nothing, start no threads and print nothing. The caller owns all
// memory and splits the rows of W among its own threads. Every function that can fail returns a
// losa_status; losa_status_text says what it means.
//
//   losa_parts parts = ...;                       // pointers into a mapped file, never copied
//   losa_parts_check(&parts);                     // before anything is done with a claimed shape
//   uint64_t starts[losa_starts_count(&parts)];
//   losa_tensor_open(&parts, starts, &tensor);    // checks every byte count; then reads stay inside
//   losa_prepare(&tensor, x, ldx, 0, tokens, tokens, activations);
//   losa_matmul(&tensor, activations, tokens, 0, rows, y, ldy, scratch);
#ifndef LOSA_KERNELS_H
#define LOSA_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LOSA_KERNELS_VERSION 1
#define LOSA_FORMAT_VERSION 1

enum { LOSA_HEADER_BYTES = 128, LOSA_ALIGNMENT = 64, LOSA_STREAM_SLACK = 64 };

// Callers that split rows among threads cut at multiples of this, so that row pairs and tiles stay together.
enum { LOSA_ROW_STEP = 16 };

// LOSA_TILED and LOSA_SLIDING: rows of a tile; its columns are a multiple of it too.
enum { LOSA_TILE = 16 };

enum losa_status {
  LOSA_OK = 0,
  LOSA_NULL_POINTER = 1,
  LOSA_BAD_HEADER = 2,     // no losa tensor, or of another format version
  LOSA_BAD_PARAMETER = 3,  // a layout, type, shape or pattern outside of the format
  LOSA_BAD_SIZE = 4,       // a component has not the bytes that shape and mask demand
  LOSA_BAD_POSITIONS = 5,  // a mask bit or code outside of the row, or not N of every M
  LOSA_BAD_RANGE = 6,      // a component lies outside of the blob, overlaps, or is not aligned
  LOSA_BAD_TARGET = 7,     // LOSA_KERNELS names a target that this build or CPU does not have
};

enum losa_layout { LOSA_DENSE = 0, LOSA_BITMASK = 1, LOSA_NM = 2, LOSA_TILED = 3, LOSA_SLIDING = 4 };
enum losa_value_type { LOSA_F32 = 0, LOSA_F16 = 1, LOSA_I8 = 2, LOSA_I4 = 3, LOSA_I3 = 4 };
enum losa_scale_type { LOSA_SCALE_NONE = 0, LOSA_SCALE_F32 = 1, LOSA_SCALE_F16 = 2 };

typedef struct {
  const void *data;
  uint64_t bytes;
} losa_bytes;

// One packed tensor as stored. Component pointers need no alignment; x86 and ARM read them unaligned.
typedef struct {
  uint32_t rows;     // output features
  uint32_t columns;  // input features
  uint8_t layout, value_type, scale_type;
  // LOSA_NM; n and m also LOSA_TILED; n of LOSA_BITMASK: 2 where pairs of rows share a mask; else 0.
  uint8_t n, m, position_bits;
  uint16_t group_size;  // LOSA_I4 and LOSA_I3: 32, 64 or 128 positions, else 0
  losa_bytes positions, values, scale, table;
} losa_parts;

// A checked tensor. Refers to the caller's parts and starts, which have to outlive it.
typedef struct {
  losa_parts parts;
  // LOSA_BITMASK: first value of each row (I4: first byte of each row pair; I3: of each row, or of each pair
  // that shares a mask, then the end).
  const uint64_t *starts;
  uint64_t kept;  // values stored, padding excluded
} losa_tensor;

const char *losa_status_text(int status);

// Check all that is known without a look at positions: parameters, and the bytes of every component against
// shape and pattern (of the values of LOSA_BITMASK only bounds). Only afterwards take memory in proportion to
// rows and columns: a claimed shape is then backed by bytes.
int losa_parts_check(const losa_parts *parts);

// Number of uint64 that losa_tensor_open fills; 0 if the layout needs none, or if losa_parts_check fails, as
// losa_tensor_open then does too.
size_t losa_starts_count(const losa_parts *parts);

// Check parts and fill starts. Afterwards no kernel reads outside of the components.
int losa_tensor_open(const losa_parts *parts, uint64_t *starts, losa_tensor *tensor);

// Parts of a tensor stored as one blob: header and components (docs/formats.md, "Blob").
int losa_blob_parts(const void *blob, uint64_t bytes, losa_parts *parts);

// Bytes of the prepared form of `tokens` rows of activations, and of one thread's scratch memory.
size_t losa_activation_bytes(const losa_tensor *tensor, size_t tokens);
size_t losa_scratch_bytes(const losa_tensor *tensor, size_t tokens);

// True if activations prepared for one tensor can be used for the other.
int losa_same_activations(const losa_tensor *a, const losa_tensor *b);

// Prepare the tokens [begin, end) of x [tokens, columns] with row stride ldx, in floats. Integer weights:
// int8 per token and group of positions with an f32 scale; float weights: a padded copy. Different
// ranges may be prepared by different threads.
int losa_prepare(const losa_tensor *tensor, const float *x, size_t ldx, size_t begin, size_t end,
                 size_t tokens, void *activations);

// y[t * ldy + r] = dot(x[t], W[r]) for all tokens and for the rows [begin, end). `begin` has to be a
// multiple of LOSA_ROW_STEP; `end` too unless it is the number of rows.
int losa_matmul(const losa_tensor *tensor, const void *activations, size_t tokens, size_t begin, size_t end,
                float *y, size_t ldy, void *scratch);

// The gate of an MLP: y[i] = SiLU(y[i]) * up[i], where SiLU(g) = g / (1 + exp(-g)). y and up must not
// overlap. The relative error is below 5e-7; below g = -87, where SiLU is next to zero, it is |g| * 2e-38 at
// most.
int losa_swiglu(float *y, const float *up, size_t count);

// Name of the target that runs: scalar, avx2, avxvnni, avx512f, avx512vnni or neon. Chosen once, from what
// the CPU and the operating system support and from the environment variable LOSA_KERNELS. An unknown or
// unsupported name there makes every call that computes return LOSA_BAD_TARGET.
const char *losa_target_name(void);

// Why: one line of text.
const char *losa_target_reason(void);

// Choose a target by name for the whole process (NULL: choose again by itself). For tests and benchmarks.
int losa_target_set(const char *name);

// Name of the i-th target this CPU can run, fastest last; NULL past the end.
const char *losa_target_available(size_t index);

// Set bits in a packed mask.
int losa_mask_count(const uint8_t *mask, size_t bytes, uint64_t *count);

#ifdef __cplusplus
}
#endif

#endif
