// Rounding to a grid in Python, for training on the CPU.
#ifndef LOSA_PYTHON_ROUNDING_H
#define LOSA_PYTHON_ROUNDING_H

#include <nanobind/nanobind.h>

// Adds round_rows and round_gradient to the module.
void register_rounding(nanobind::module_ &module);

#endif
