// One node of domain ai.losa: one to three weights that share the input X.
#ifndef LOSA_ORT_KERNEL_H
#define LOSA_ORT_KERNEL_H

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "abi.h"
#include "losa/kernels.h"

namespace losa::ort {

constexpr size_t kMostWeights = 3;
constexpr size_t kMostComponents = 4;

// By value type: how it is called in the name of an operator, and the elements of its values.
struct StoredType {
  const char *name;
  ElementType values;
};
constexpr std::array<StoredType, LOSA_I3 + 1> kStoredTypes = {
    {{"F32", kFloat}, {"F16", kFloat16}, {"I8", kInt8}, {"I4", kUint8}, {"I3", kUint8}}};

// An operator: what its name says about the weights of its nodes.
struct Operator : OrtCustomOp {
  losa_layout layout;
  bool position_codes;  // LOSA_NM: codes instead of mask bits; LOSA_TILED: groups of 4 instead of 16
  bool shared_masks;    // LOSA_BITMASK: pairs of rows share a mask
  losa_value_type value_type;
  size_t weights;
  bool gated;  // of two weights one output: SiLU of the first product, times the second
  std::array<const char *, kMostComponents> components;  // names in the order of the inputs, then null
  std::string name;

  size_t component_count() const;
  size_t output_count() const { return gated ? 1 : weights; }
  // Of input `index`, where 0 is X and the components of all weights follow.
  ElementType input_type(size_t index) const;
};

class Kernel {
 public:
  // Read attributes and constant inputs; throws std::exception with a text that names the node.
  Kernel(const Operator &op, const OrtApi *api, const OrtKernelInfo *info);

  // Any number of threads may run one kernel at the same time. Throws like the constructor.
  void run(OrtKernelContext *context) const;

 private:
  struct Weight {
    losa_tensor tensor = {};
    std::unique_ptr<uint64_t[]> starts;
    std::vector<std::shared_ptr<const uint8_t>> moved;  // components that ONNX Runtime has elsewhere
    uint64_t bytes = 0;                                 // what a thread reads to use it once
  };
  class Run;

  void open(const OrtKernelInfo *info, size_t index);
  [[noreturn]] void refuse(const std::string &problem) const;
  void check(OrtStatus *status) const;

  const OrtApi *api_;
  const Operator &op_;
  std::string node_;
  std::array<Weight, kMostWeights> weights_;
};

}  // namespace losa::ort

#endif
