// The part of ONNX Runtime's C interface that this library uses, declared by hand: no package ships
// its header. Two things make that safe. The function table only ever grows at its end, so the place of
// a function never changes; and ops.cpp checks the version and some functions before anything else.
#ifndef LOSA_ORT_ABI_H
#define LOSA_ORT_ABI_H

#include <cstddef>
#include <cstdint>

namespace losa::ort {

// What the table below must have: KernelContext_ParallelFor came with ONNX Runtime 1.17.
constexpr uint32_t kApiVersion = 17;

// Objects of ONNX Runtime, only ever handled by address.
struct OrtStatus;  // a null pointer means success
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;

enum OrtErrorCode : int { kFail = 1, kInvalidArgument = 2 };

// Element types of tensors, numbered as in ONNX. As the type of an input, kUndefined takes any.
enum ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kFloat16 = 10 };

// The function table. Entries are called through the constants of type `Slot` below.
struct OrtApi {
  void (*slots[275])();
};

struct OrtApiBase {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)();
};

// One entry of the table: its index and its signature.
template <size_t index, class Signature>
struct Slot;

template <size_t index, class Result, class... Arguments>
struct Slot<index, Result(Arguments...)> {
  static_assert(index < sizeof(OrtApi::slots) / sizeof(void (*)()));
  Result operator()(const OrtApi *api, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(api->slots[index])(arguments...);
  }
};

// Status objects.
constexpr Slot<0, OrtStatus *(int code, const char *message)> CreateStatus;
constexpr Slot<1, int(const OrtStatus *)> GetErrorCode;
constexpr Slot<2, const char *(const OrtStatus *)> GetErrorMessage;
constexpr Slot<93, void(OrtStatus *)> ReleaseStatus;

// Registration.
struct OrtCustomOp;
constexpr Slot<26, OrtStatus *(const char *name, OrtCustomOpDomain **)> CreateCustomOpDomain;
constexpr Slot<27, OrtStatus *(OrtCustomOpDomain *, const OrtCustomOp *)> CustomOpDomain_Add;
constexpr Slot<28, OrtStatus *(OrtSessionOptions *, OrtCustomOpDomain *)> AddCustomOpDomain;

// Tensors. GetTensorMutableData is also the way to read.
constexpr Slot<51, OrtStatus *(OrtValue *, void **data)> GetTensorMutableData;
constexpr Slot<60, OrtStatus *(const OrtTensorTypeAndShapeInfo *, int *type)> GetTensorElementType;
constexpr Slot<61, OrtStatus *(const OrtTensorTypeAndShapeInfo *, size_t *)> GetDimensionsCount;
constexpr Slot<62, OrtStatus *(const OrtTensorTypeAndShapeInfo *, int64_t *, size_t count)> GetDimensions;
constexpr Slot<65, OrtStatus *(const OrtValue *, OrtTensorTypeAndShapeInfo **)> GetTensorTypeAndShape;
constexpr Slot<99, void(OrtTensorTypeAndShapeInfo *)> ReleaseTensorTypeAndShapeInfo;

// A node when its kernel is created. The value of a constant input belongs to the session.
constexpr Slot<86, OrtStatus *(const OrtKernelInfo *, const char *name, int64_t *)>
    KernelInfoGetAttribute_int64;
constexpr Slot<244, OrtStatus *(const OrtKernelInfo *, char *name, size_t *bytes)> KernelInfo_GetNodeName;
constexpr Slot<249, OrtStatus *(const OrtKernelInfo *, size_t index, int *is_constant, const OrtValue **)>
    KernelInfoGetConstantInput_tensor;

// A node when it runs.
constexpr Slot<90, OrtStatus *(const OrtKernelContext *, size_t index, const OrtValue **)>
    KernelContext_GetInput;
constexpr Slot<91,
               OrtStatus *(OrtKernelContext *, size_t index, const int64_t *dims, size_t count, OrtValue **)>
    KernelContext_GetOutput;
constexpr Slot<274, OrtStatus *(const OrtKernelContext *, void (*run)(void *user, size_t index), size_t total,
                                size_t batches, void *user)>
    KernelContext_ParallelFor;

// One line that starts with "ORT Build Info": only called to see that the table is as long as expected.
constexpr Slot<254, const char *()> GetBuildInfoString;

// What a library says about one operator. `version` tells ONNX Runtime which members are there: with
// 17 it reads none behind GetEndVersion. The order is that of its header.
struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *);
  ElementType (*GetInputType)(const OrtCustomOp *, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp *);
  ElementType (*GetOutputType)(const OrtCustomOp *, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *);
  void (*KernelCompute)(void *kernel, OrtKernelContext *);
  void (*KernelDestroy)(void *kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp *, size_t index);   // 0: required
  int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t index);  // 0: required
  int (*GetInputMemoryType)(const OrtCustomOp *, size_t index);       // 0: the provider's default
  int (*GetVariadicInputMinArity)(const OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **kernel);
  OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *);
  OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, OrtShapeInferContext *);
  int (*GetStartVersion)(const OrtCustomOp *);
  int (*GetEndVersion)(const OrtCustomOp *);
  size_t (*GetMayInplace)(int **inputs, int **outputs);
  void (*ReleaseMayInplace)(int *inputs, int *outputs);
  size_t (*GetAliasMap)(int **inputs, int **outputs);
  void (*ReleaseAliasMap)(int *inputs, int *outputs);
};

}  // namespace losa::ort

#endif
