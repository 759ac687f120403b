// Coverage-guided fuzzing of the loader and of every kernel behind it (libFuzzer, so clang):
//
//   cmake -S . -B build/fuzz -DCMAKE_CXX_COMPILER=clang++ -DLOSA_BUILD_FUZZER=ON
//   cmake --build build/fuzz --target fuzz_tensor && build/fuzz/fuzz_tensor CORPUS
//
// An input is one byte that chooses target and tokens, then a blob. Whatever the blob says, the loader
// refuses it or the kernels stay inside of it; the sanitizers watch.
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "losa/kernels.h"

namespace {

constexpr size_t kTokens[] = {1, 2, 5, 17};
constexpr uint64_t kMostOutputs = 1u << 16;  // a tall tensor of few bytes would only be slow

// The program has no exceptions to catch: an allocation that fails is a finding.
void multiply(const losa_tensor &tensor, size_t tokens) {
  const losa_parts &p = tensor.parts;
  if (uint64_t{p.rows} * tokens > kMostOutputs) {
    return;
  }
  std::vector<float> x(tokens * p.columns);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(i % 7) - 3.0f;
  }
  std::unique_ptr<float[]> activations(new float[losa_activation_bytes(&tensor, tokens) / 4 + 1]);
  std::unique_ptr<float[]> scratch(new float[losa_scratch_bytes(&tensor, tokens) / 4 + 1]);
  std::unique_ptr<float[]> y(new float[tokens * p.rows]);
  if (losa_prepare(&tensor, x.data(), p.columns, 0, tokens, tokens, activations.get()) == LOSA_OK) {
    losa_matmul(&tensor, activations.get(), tokens, 0, p.rows, y.get(), p.rows, scratch.get());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size == 0) {
    return 0;
  }
  const size_t choice = data[0], bytes = size - 1;
  size_t targets = 0;
  while (losa_target_available(targets) != nullptr) {
    ++targets;
  }
  losa_target_set(losa_target_available(choice / 4 % targets));
  // Exactly as large as the blob, so that a read beyond it is seen.
  std::unique_ptr<uint8_t[]> blob(new uint8_t[bytes]);
  std::memcpy(blob.get(), data + 1, bytes);
  losa_parts parts;
  if (losa_blob_parts(blob.get(), bytes, &parts) != LOSA_OK) {
    return 0;
  }
  std::vector<uint64_t> starts(losa_starts_count(&parts));
  losa_tensor tensor;
  if (losa_tensor_open(&parts, starts.data(), &tensor) == LOSA_OK) {
    multiply(tensor, kTokens[choice % 4]);
  }
  return 0;
}
