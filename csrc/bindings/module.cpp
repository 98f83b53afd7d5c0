// llama_ext._core. Its Python signatures are in python/llama_ext/_core.pyi.
#include <map>
#include <string>

#include "bindings/bindings.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/thread_pool.h"

// Set by the build: the version of the package, and how it was compiled.
#ifndef LLAMA_EXT_VERSION
#define LLAMA_EXT_VERSION "0.0.0"
#endif
#ifndef LLAMA_EXT_SANITIZE
#define LLAMA_EXT_SANITIZE "OFF"
#endif
#ifndef LLAMA_EXT_CUDA_BUILD
#define LLAMA_EXT_CUDA_BUILD "not built"
#endif
#ifndef LLAMA_EXT_BUILD_TYPE
#define LLAMA_EXT_BUILD_TYPE "unknown"
#endif

namespace llama_ext {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::map<std::string, std::string> build_info() {
  std::string isas;
  for (const std::string& isa : compiled_isas()) isas += (isas.empty() ? "" : ", ") + isa;
  return {{"version", LLAMA_EXT_VERSION},     {"compiler", compiler()}, {"build_type", LLAMA_EXT_BUILD_TYPE},
          {"sanitizers", LLAMA_EXT_SANITIZE}, {"isas", isas},           {"cuda", LLAMA_EXT_CUDA_BUILD}};
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled core of llama_ext.";
  module.attr("__version__") = LLAMA_EXT_VERSION;
  bind_errors();

  module.def("build_info", &build_info);
  module.def("available_isas", &available_isas);
  module.def("compiled_isas", &compiled_isas);
  module.def("cpu_features", &cpu_features);
  module.def("cpu_name", &cpu_name);
  module.def("default_threads", [] {
    const ThreadDefault found = default_threads();
    return py::make_tuple(found.threads, found.reason);
  });
  module.def("available_memory", &available_memory);
  module.def("gpus", [] {
    const GpuReport report = gpu_report();
    return py::make_tuple(report.gpus, report.why_none);
  });
  module.def(
      "gpu_read_bandwidth",
      [](const std::string& device, int64_t nbytes, int rounds) {
        return without_gil([&] { return gpu_read_bandwidth(device, nbytes, rounds); });
      },
      py::arg("device"), py::arg("nbytes"), py::arg("rounds"));
  module.def("has_nvtx_ranges", &has_nvtx_ranges);
  module.def("nvtx_ranges_are_on", &nvtx_ranges_are_on);
  module.def("show_nvtx_ranges", &show_nvtx_ranges, py::arg("on"));
  module.def("set_default_threads", &set_default_threads, py::arg("threads"));
  module.def(
      "random_uniform",
      [](uint64_t seed, uint64_t stream, uint64_t counter) {
        return random_uniform({.seed = seed, .stream = stream, .counter = counter});
      },
      py::arg("seed"), py::arg("stream"), py::arg("counter"));

  bind_backend(module);
  bind_quantize(module);
  bind_model(module);
  bind_session(module);
  bind_generation(module);
  bind_train(module);
  bind_input_gradients(module);
}

}  // namespace llama_ext
