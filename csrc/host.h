// Defined in host.cpp, entered into the extension by bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace crsam {

void define_host_functions(pybind11::module_& m);

}  // namespace crsam
