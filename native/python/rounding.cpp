#include "rounding.h"

#include <nanobind/ndarray.h>

#include <stdexcept>

#include "train/rounding.h"

namespace nb = nanobind;
using In = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using InBits = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutBits = nb::ndarray<uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace {

template <typename Other>
losa::Grid grid_of(const In &weight, const In &scales, const Other &other, size_t width, float low,
                   float high) {
  const losa::Grid grid = {weight.shape(0), weight.shape(1), width, scales.shape(1), low, high};
  const bool whole = width > 0 && grid.groups == (grid.columns + width - 1) / width;
  if (!whole || scales.shape(0) != grid.rows || other.shape(0) != grid.rows ||
      other.shape(1) != grid.columns) {
    throw std::invalid_argument("the shapes of weight, scales and result do not fit");
  }
  return grid;
}

template <typename Result>
void round_rows(const In &weight, const In &scales, size_t width, float low, float high, Result result) {
  const losa::Grid grid = grid_of(weight, scales, result, width, low, high);
  const nb::gil_scoped_release release;
  losa::round_rows(grid, weight.data(), scales.data(), 0, grid.rows, result.data());
}

template <typename Gradient>
void round_gradient(const In &weight, const In &scales, size_t width, float low, float high,
                    const Gradient &gradient, Out weight_gradient, Out scale_gradient) {
  const losa::Grid grid = grid_of(weight, scales, gradient, width, low, high);
  grid_of(weight, scales, weight_gradient, width, low, high);
  if (scale_gradient.shape(0) != grid.rows || scale_gradient.shape(1) != grid.groups) {
    throw std::invalid_argument("the gradient of the scales has another shape than they");
  }
  const nb::gil_scoped_release release;
  losa::round_gradient(grid, weight.data(), scales.data(), gradient.data(), 0, grid.rows,
                       weight_gradient.data(), scale_gradient.data());
}

}  // namespace

void register_rounding(nb::module_ &module) {
  const char *text =
      "weight [rows, columns] on the grid of scales [rows, groups] into result, f32 or bf16 bits.";
  module.def("round_rows", &round_rows<Out>, nb::arg("weight"), nb::arg("scales"), nb::arg("width"),
             nb::arg("low"), nb::arg("high"), nb::arg("result"), text);
  module.def("round_rows", &round_rows<OutBits>, nb::arg("weight"), nb::arg("scales"), nb::arg("width"),
             nb::arg("low"), nb::arg("high"), nb::arg("result"), text);
  text = "Gradients of weight and scales from that of the rounded weight, f32 or bf16 bits.";
  module.def("round_gradient", &round_gradient<In>, nb::arg("weight"), nb::arg("scales"), nb::arg("width"),
             nb::arg("low"), nb::arg("high"), nb::arg("gradient"), nb::arg("weight_gradient"),
             nb::arg("scale_gradient"), text);
  module.def("round_gradient", &round_gradient<InBits>, nb::arg("weight"), nb::arg("scales"),
             nb::arg("width"), nb::arg("low"), nb::arg("high"), nb::arg("gradient"),
             nb::arg("weight_gradient"), nb::arg("scale_gradient"), text);
}
