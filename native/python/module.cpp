#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "losa/kernels.h"

namespace nb = nanobind;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

NB_MODULE(_native, module) {
  module.doc() = "Native kernels of losa-deploy.";
  module.def("kernels_version", [] { return LOSA_KERNELS_VERSION; });
  module.def(
      "mask_count",
      [](const Bytes &mask) {
        uint64_t count = 0;
        if (losa_mask_count(mask.data(), mask.size(), &count) != LOSA_OK) {
          throw std::runtime_error("losa_mask_count failed");
        }
        return count;
      },
      nb::arg("mask"), "Number of set bits in a packed mask [bytes] uint8.");
}
