// The kernels in Python, for calibration text, tests, benchmarks and doctor.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <future>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "losa/kernels.h"
#include "packing.h"
#include "rounding.h"
#include "timing.h"

namespace nb = nanobind;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

namespace {

void check(int status) {
  if (status != LOSA_OK) {
    throw std::runtime_error(losa_status_text(status));
  }
}

losa_bytes part(const Bytes &bytes) { return {bytes.data(), bytes.size()}; }

// A checked tensor and the row index that belongs to it; keeps the arrays it reads alive.
class Tensor {
 public:
  Tensor(uint8_t layout, uint8_t value_type, uint32_t rows, uint32_t columns, uint8_t scale_type, uint8_t n,
         uint8_t m, uint8_t position_bits, uint16_t group_size, Bytes positions, Bytes values, Bytes scale,
         Bytes table)
      : keep_{positions, values, scale, table} {
    losa_parts parts = {};
    parts.rows = rows;
    parts.columns = columns;
    parts.layout = layout;
    parts.value_type = value_type;
    parts.scale_type = scale_type;
    parts.n = n;
    parts.m = m;
    parts.position_bits = position_bits;
    parts.group_size = group_size;
    parts.positions = part(positions);
    parts.values = part(values);
    parts.scale = part(scale);
    parts.table = part(table);
    open(parts);
  }

  explicit Tensor(Bytes blob) : keep_{blob} {
    losa_parts parts;
    check(losa_blob_parts(blob.data(), blob.size(), &parts));
    open(parts);
  }

  uint64_t kept() const { return tensor_.kept; }

  // x [tokens, columns] -> y [tokens, rows]; `step` rows at a time, each of `threads` its share of them.
  Result matmul(const Matrix &x, size_t step, size_t threads) const {
    const size_t tokens = x.shape(0), rows = tensor_.parts.rows;
    if (x.shape(1) != tensor_.parts.columns) {
      throw std::invalid_argument("x has " + std::to_string(x.shape(1)) + " columns, expected " +
                                  std::to_string(tensor_.parts.columns));
    }
    if (step < 1 || threads < 1) throw std::invalid_argument("matmul needs a row and a thread");
    auto y = std::make_unique<float[]>(tokens * rows + 1);
    {
      // Threads of Python multiply at the same time.
      const nb::gil_scoped_release others;
      std::vector<float> activations(losa_activation_bytes(&tensor_, tokens) / sizeof(float) + 1);
      check(losa_prepare(&tensor_, x.data(), x.shape(1), 0, tokens, tokens, activations.data()));
      const size_t share =
          ((rows + threads - 1) / threads + LOSA_ROW_STEP - 1) / LOSA_ROW_STEP * LOSA_ROW_STEP;
      std::vector<std::future<void>> shares;
      for (size_t begin = share; begin < rows; begin += share) {
        shares.push_back(std::async(std::launch::async, [&, begin] {
          multiply(activations.data(), tokens, begin, std::min(begin + share, rows), step, y.get());
        }));
      }
      multiply(activations.data(), tokens, 0, std::min(share, rows), step, y.get());
      for (std::future<void> &other : shares) other.get();
    }
    float *data = y.release();
    const nb::capsule owner(data, [](void *p) noexcept { delete[] static_cast<float *>(p); });
    return Result(data, {tokens, rows}, owner);
  }

 private:
  // Rows [begin, end) of y.
  void multiply(const float *activations, size_t tokens, size_t begin, size_t end, size_t step,
                float *y) const {
    std::vector<float> scratch(losa_scratch_bytes(&tensor_, tokens) / sizeof(float) + 1);
    const size_t rows = tensor_.parts.rows;
    for (size_t row = begin; row < end; row += step) {
      const size_t last = step < end - row ? row + step : end;
      check(losa_matmul(&tensor_, activations, tokens, row, last, y, rows, scratch.data()));
    }
  }

  void open(const losa_parts &parts) {
    starts_.resize(losa_starts_count(&parts));
    check(losa_tensor_open(&parts, starts_.data(), &tensor_));
  }

  std::vector<Bytes> keep_;
  std::vector<uint64_t> starts_;
  losa_tensor tensor_ = {};
};

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Native kernels of losa-deploy.";
  module.def("kernels_version", [] { return LOSA_KERNELS_VERSION; });
  module.def("target_name", [] { return std::string(losa_target_name()); }, "Kernels in use, e.g. avx2.");
  module.def("target_reason", [] { return std::string(losa_target_reason()); }, "Why these.");
  module.def(
      "targets",
      [] {
        std::vector<std::string> names;
        for (size_t i = 0; losa_target_available(i) != nullptr; ++i) {
          names.emplace_back(losa_target_available(i));
        }
        return names;
      },
      "Kernels that this CPU can run, fastest last.");
  module.def(
      "set_target",
      [](const std::string &name) { check(losa_target_set(name.empty() ? nullptr : name.c_str())); },
      nb::arg("name"), "Use these kernels in the whole process; an empty name chooses again.");
  module.def(
      "mask_count",
      [](const Bytes &mask) {
        uint64_t count = 0;
        check(losa_mask_count(mask.data(), mask.size(), &count));
        return count;
      },
      nb::arg("mask"), "Number of set bits in a packed mask [bytes] uint8.");
  nb::class_<Tensor>(module, "Tensor", "A packed weight [rows, columns], checked when it is made.")
      .def(nb::init<uint8_t, uint8_t, uint32_t, uint32_t, uint8_t, uint8_t, uint8_t, uint8_t, uint16_t, Bytes,
                    Bytes, Bytes, Bytes>(),
           nb::arg("layout"), nb::arg("value_type"), nb::arg("rows"), nb::arg("columns"),
           nb::arg("scale_type"), nb::arg("n"), nb::arg("m"), nb::arg("position_bits"), nb::arg("group_size"),
           nb::arg("positions"), nb::arg("values"), nb::arg("scale"), nb::arg("table"))
      .def(nb::init<Bytes>(), nb::arg("blob"))
      .def_prop_ro("kept", &Tensor::kept)
      .def("matmul", &Tensor::matmul, nb::arg("x"), nb::arg("step") = 1 << 30, nb::arg("threads") = 1,
           "x [tokens, columns] -> x @ W.T [tokens, rows].");
  register_packing(module);
  register_rounding(module);
  register_timing(module);
}
