// What ONNX Runtime loads: the operators of domain ai.losa, and the check that it is one we can serve.
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <new>
#include <string>

#include "abi.h"
#include "kernel.h"

#if defined(_WIN32)
#define LOSA_EXPORT __declspec(dllexport)
#else
#define LOSA_EXPORT __attribute__((visibility("default")))
#endif

namespace losa::ort {
namespace {

const Operator &as_operator(const OrtCustomOp *op) { return *static_cast<const Operator *>(op); }

// Runs `body`; an exception, which must not cross the C interface, becomes a status.
template <class Body>
OrtStatus *guarded(const OrtApi *api, const Body &body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::bad_alloc &) {
    return CreateStatus(api, kFail, "ai.losa: out of memory");
  } catch (const std::exception &error) {
    return CreateStatus(api, kInvalidArgument, error.what());
  }
}

// A kernel with the table that reports its errors.
struct Instance {
  const OrtApi *api;
  Kernel kernel;
};

OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
  return guarded(api, [&] { *kernel = new Instance{api, Kernel(as_operator(op), api, info)}; });
}

OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  const auto *instance = static_cast<const Instance *>(kernel);
  return guarded(instance->api, [&] { instance->kernel.run(context); });
}

Operator make_operator(const char *layout_name, losa_layout layout, bool codes, losa_value_type type,
                       size_t weights, bool gated) {
  Operator op = {};
  op.layout = layout;
  op.position_codes = codes;
  op.value_type = type;
  op.weights = weights;
  op.gated = gated;
  op.name = std::string(layout_name) + "MatMul" + kStoredTypes[type].name;
  if (weights > 1) {
    op.name += "x" + std::to_string(weights) + (gated ? "SwiGLU" : "");
  }
  size_t count = 0;
  const bool inside = layout == LOSA_TILED && !codes && type == LOSA_I4;  // in the bytes of the values
  if (layout != LOSA_DENSE && !inside) {
    op.components[count++] = "positions";
  }
  op.components[count++] = "values";
  if (type >= LOSA_I8) {
    op.components[count++] = "scale";
  }
  if (type >= LOSA_I4) {
    op.components[count++] = "table";
  }
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp *self) { return as_operator(self).name.c_str(); };
  op.GetExecutionProviderType = [](const OrtCustomOp *) -> const char * { return nullptr; };  // CPU
  op.GetInputType = [](const OrtCustomOp *self, size_t index) { return as_operator(self).input_type(index); };
  op.GetInputTypeCount = [](const OrtCustomOp *self) {
    return 1 + as_operator(self).weights * as_operator(self).component_count();
  };
  op.GetOutputType = [](const OrtCustomOp *, size_t) { return kFloat; };
  op.GetOutputTypeCount = [](const OrtCustomOp *self) { return as_operator(self).output_count(); };
  op.KernelDestroy = [](void *kernel) { delete static_cast<Instance *>(kernel); };
  op.GetInputCharacteristic = op.GetOutputCharacteristic = [](const OrtCustomOp *, size_t) { return 0; };
  op.GetInputMemoryType = [](const OrtCustomOp *, size_t) { return 0; };
  // Called only for variadic inputs and outputs, of which there are none.
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp *) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp *) { return 1; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.GetStartVersion = [](const OrtCustomOp *) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp *) { return INT32_MAX; };
  return op;
}

// Operators of all forms and value types.
void add_forms(std::deque<Operator> &list, size_t weights, bool gated) {
  const auto add = [&](const char *name, losa_layout layout, bool codes, losa_value_type type) {
    list.push_back(make_operator(name, layout, codes, type, weights, gated));
  };
  const auto add_pairs = [&](losa_value_type type) {
    add("BitmaskPairs", LOSA_BITMASK, false, type);
    list.back().shared_masks = true;
  };
  for (const losa_value_type type : {LOSA_F32, LOSA_F16, LOSA_I8, LOSA_I4, LOSA_I3}) {
    add("Dense", LOSA_DENSE, false, type);
    add("Bitmask", LOSA_BITMASK, false, type);
    add("NmBits", LOSA_NM, false, type);
    add("NmCodes", LOSA_NM, true, type);
  }
  for (const losa_value_type type : {LOSA_I8, LOSA_I4, LOSA_I3}) {
    add_pairs(type);
  }
  for (const losa_value_type type : {LOSA_I8, LOSA_I4}) {
    add("Tiled", LOSA_TILED, false, type);
    add("TiledQuads", LOSA_TILED, true, type);
    add("Sliding", LOSA_SLIDING, false, type);
  }
  add("TiledQuads", LOSA_TILED, true, LOSA_I3);
  add("Sliding", LOSA_SLIDING, false, LOSA_I3);
}

const std::deque<Operator> &operators() {
  static const std::deque<Operator> all = [] {
    std::deque<Operator> list;
    for (size_t weights = 1; weights <= kMostWeights; ++weights) {
      add_forms(list, weights, false);
    }
    add_forms(list, 2, true);
    return list;
  }();
  return all;
}

// Does the table behave as declared? Creates a status and reads it back, and asks for the build.
bool table_answers(const OrtApi *api) {
  constexpr const char *kText = "losa self-test";
  OrtStatus *status = CreateStatus(api, kInvalidArgument, kText);
  if (status == nullptr) {
    return false;
  }
  const char *text = GetErrorMessage(api, status);
  const bool same =
      GetErrorCode(api, status) == kInvalidArgument && text != nullptr && !std::strcmp(text, kText);
  ReleaseStatus(api, status);
  constexpr const char *kBuild = "ORT Build Info";
  const char *build = same ? GetBuildInfoString(api) : nullptr;
  return build != nullptr && std::strncmp(build, kBuild, std::strlen(kBuild)) == 0;
}

// The table, or null and a reason. Asking for a version that is too new makes ONNX Runtime print an
// error, so the version comes first.
const OrtApi *usable_api(const OrtApiBase *base, std::string *reason) {
  const char *version = base->GetVersionString();
  unsigned major = 0, minor = 0;
  const bool read = version != nullptr && std::sscanf(version, "%u.%u", &major, &minor) == 2;
  if (!read || major != 1 || minor < kApiVersion) {
    *reason = "losa_ort needs ONNX Runtime 1." + std::to_string(kApiVersion) + " or a later 1.x, found " +
              (version == nullptr ? "no version" : version);
    return nullptr;
  }
  const OrtApi *api = base->GetApi(kApiVersion);
  if (api == nullptr || !table_answers(api)) {
    *reason = "losa_ort does not recognize the C interface of ONNX Runtime " + std::string(version) +
              ", expected that of version " + std::to_string(kApiVersion);
    return nullptr;
  }
  return api;
}

OrtStatus *add_operators(OrtSessionOptions *options, const OrtApi *api) {
  // Sessions keep pointers to a domain, so it is made once per ONNX Runtime and never released.
  struct Domain {
    const OrtApi *api;
    OrtCustomOpDomain *domain;
  };
  static std::mutex mutex;
  static std::deque<Domain> domains;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Domain &known : domains) {
    if (known.api == api) {
      return AddCustomOpDomain(api, options, known.domain);
    }
  }
  OrtCustomOpDomain *domain = nullptr;
  OrtStatus *status = CreateCustomOpDomain(api, "ai.losa", &domain);
  for (const Operator &op : operators()) {
    if (status != nullptr) {
      return status;
    }
    status = CustomOpDomain_Add(api, domain, &op);
  }
  if (status != nullptr) {
    return status;
  }
  domains.push_back({api, domain});
  return AddCustomOpDomain(api, options, domain);
}

}  // namespace
}  // namespace losa::ort

extern "C" LOSA_EXPORT losa::ort::OrtStatus *RegisterCustomOps(losa::ort::OrtSessionOptions *options,
                                                               const losa::ort::OrtApiBase *base) {
  using namespace losa::ort;
  // Version 1 has the same first entries as any other: enough to report an error.
  const OrtApi *any = base->GetApi(1);
  if (any == nullptr) {
    return nullptr;  // nothing is registered, and no error can be made without a table
  }
  OrtStatus *refused = nullptr;
  OrtStatus *failed = guarded(any, [&] {
    std::string reason;
    const OrtApi *api = usable_api(base, &reason);
    refused = api == nullptr ? CreateStatus(any, kFail, reason.c_str()) : add_operators(options, api);
  });
  return failed == nullptr ? refused : failed;
}
