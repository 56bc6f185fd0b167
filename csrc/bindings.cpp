// The Python module: build information, the functions of host.cpp and, with kernels, of operators.cpp.
#include <map>
#include <string>

#include "build_info.h"  // written by setup.py
#include "host.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"version", CRSAM_VERSION}, {"revision", CRSAM_REVISION},           {"torch", CRSAM_TORCH},
      {"cuda", CRSAM_CUDA},       {"architectures", CRSAM_ARCHITECTURES}, {"compiler", __VERSION__},
  };
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled parts of crsam_ext. With kernels, importing this module registers torch.ops.crsam.";
  m.def("build_info", &build_info, "Versions of crsam_ext, its sources, torch, CUDA and the compiler; architectures.");
  crsam::define_host_functions(m);
#ifdef CRSAM_WITH_KERNELS
  crsam::define_operators(m);
#endif
}
