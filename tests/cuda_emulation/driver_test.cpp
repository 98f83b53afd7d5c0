// Drivers, for a library that is built with CUDA 12: the emulator's Python tests have one of CUDA 13.
#include <cstdlib>

#include "claims.h"
#include "cuda/runtime.h"

using namespace llama_ext::cuda;
using claims::error_of;
using claims::expect;

int main() {
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  const auto set_driver = [](const char* version) { setenv("LLAMA_EXT_CUDA_EMULATION_DRIVER", version, 1); };

  set_driver("11080");
  expect(has(why_no_gpu(), "it supports CUDA 11.8, and CUDA 12.4 (driver 550 or later) is needed"),
         "a driver that the runtime refuses is too old");
  set_driver("12030");
  int count = 0;
  expect(cudaGetDeviceCount(&count) == cudaSuccess && count == 1 &&
             has(why_no_gpu(), "it supports CUDA 12.3, and CUDA 12.4 (driver 550 or later) is needed"),
         "so is one that finds GPUs but does not load the kernels");
  expect(gpu_count() == 0, "there are no GPUs then");
  expect(has(error_of([] { const Gpu gpu(0); }), "device 'cuda:0': the NVIDIA driver is too old"),
         "nor can one be had");
  set_driver("0");
  expect(has(why_no_gpu(), "no NVIDIA driver was found; one of version 550 or later is needed (CUDA 12.4)"),
         "no driver is told from an old one");
  for (const char* version : {"12040", "13000"}) {
    set_driver(version);
    expect(why_no_gpu().empty() && gpu_count() == 1 && error_of([] { const Gpu gpu(0); }).empty(),
           "drivers of CUDA 12.4 and later will do");
  }
  return claims::exit_status();
}
