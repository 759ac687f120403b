// Timing of the kernels and of the memory they read, for `losa-deploy bench kernels`.
#ifndef LOSA_PYTHON_TIMING_H
#define LOSA_PYTHON_TIMING_H

#include <nanobind/nanobind.h>

// Adds read_bandwidth and time_matmul to the module.
void register_timing(nanobind::module_ &module);

#endif
