// Packing and the choice of a layout in Python, for tests against their NumPy twins.
#ifndef LOSA_PYTHON_PACKING_H
#define LOSA_PYTHON_PACKING_H

#include <nanobind/nanobind.h>

// Adds find_kept, choose and pack to the module.
void register_packing(nanobind::module_ &module);

#endif
