// Runs kernel cases from a file: for builds that Python cannot load (another CPU under an emulator,
// sanitizers).
//
//   run_cases list
//   run_cases TARGET CASES RESULTS
//
// A case is: blob bytes, x bytes, tokens, row step (u64 each), the blob, x [tokens, columns] f32.
// A result is: status, y bytes (u64 each), y [tokens, rows] f32.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "losa/kernels.h"

namespace {

struct Case {
  uint64_t blob_bytes, x_bytes, tokens, step;
};

// Exactly as large as the data, so that a sanitizer sees every read beyond it.
std::unique_ptr<uint8_t[]> read_exactly(std::FILE *file, uint64_t bytes) {
  std::unique_ptr<uint8_t[]> data(new uint8_t[bytes]);
  return std::fread(data.get(), 1, bytes, file) == bytes ? std::move(data) : nullptr;
}

int multiply(const losa_parts &parts, const Case &c, const float *x, std::vector<float> *y) {
  std::vector<uint64_t> starts(losa_starts_count(&parts));
  losa_tensor tensor;
  int status = losa_tensor_open(&parts, starts.data(), &tensor);
  if (status != LOSA_OK) {
    return status;
  }
  if (c.x_bytes != c.tokens * parts.columns * sizeof(float)) {
    return LOSA_BAD_SIZE;
  }
  std::unique_ptr<float[]> activations(new float[losa_activation_bytes(&tensor, c.tokens) / 4 + 1]);
  std::unique_ptr<float[]> scratch(new float[losa_scratch_bytes(&tensor, c.tokens) / 4 + 1]);
  y->assign(c.tokens * parts.rows, 0.0f);
  status = losa_prepare(&tensor, x, parts.columns, 0, c.tokens, c.tokens, activations.get());
  for (uint64_t begin = 0; begin < parts.rows && status == LOSA_OK; begin += c.step) {
    const uint64_t end = begin + c.step < parts.rows ? begin + c.step : parts.rows;
    status =
        losa_matmul(&tensor, activations.get(), c.tokens, begin, end, y->data(), parts.rows, scratch.get());
  }
  return status;
}

bool run(std::FILE *in, std::FILE *out, const Case &c) {
  const auto blob = read_exactly(in, c.blob_bytes), x = read_exactly(in, c.x_bytes);
  if (!blob || !x) {
    return false;
  }
  losa_parts parts;
  std::vector<float> y;
  int status = losa_blob_parts(blob.get(), c.blob_bytes, &parts);
  if (status == LOSA_OK) {
    status = multiply(parts, c, reinterpret_cast<const float *>(x.get()), &y);
  }
  const uint64_t head[2] = {static_cast<uint64_t>(status), y.size() * sizeof(float)};
  // Flushed, so that the results say how far a process came that a sanitizer ended.
  return std::fwrite(head, sizeof head, 1, out) == 1 &&
         (y.empty() || std::fwrite(y.data(), 4, y.size(), out) == y.size()) && std::fflush(out) == 0;
}

}  // namespace

int main(int argc, char **argv) {
  if (argc == 2 && std::strcmp(argv[1], "list") == 0) {
    for (size_t i = 0; losa_target_available(i) != nullptr; ++i) {
      std::puts(losa_target_available(i));
    }
    return 0;
  }
  if (argc != 4 || losa_target_set(argv[1]) != LOSA_OK) {
    std::fprintf(stderr, "usage: run_cases list | run_cases TARGET CASES RESULTS (a target of the list)\n");
    return 2;
  }
  std::FILE *in = std::fopen(argv[2], "rb"), *out = std::fopen(argv[3], "wb");
  if (in == nullptr || out == nullptr) {
    std::fprintf(stderr, "run_cases: cannot open %s or %s\n", argv[2], argv[3]);
    return 2;
  }
  Case c;
  bool ok = true;
  while (ok && std::fread(&c, sizeof c, 1, in) == 1) {
    ok = run(in, out, c);
  }
  std::fclose(in);
  return std::fclose(out) == 0 && ok ? 0 : 1;
}
