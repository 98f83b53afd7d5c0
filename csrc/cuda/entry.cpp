#include "cuda/entry.h"

#include "cuda/cuda_backend.h"
#include "cuda/kernels.h"
#include "cuda/ranges.h"
#include "cuda/runtime.h"

#ifndef LLAMA_EXT_BUILD
#error "LLAMA_EXT_BUILD is set by CMakeLists.txt"
#endif

namespace llama_ext {
namespace {

std::vector<std::string> gpus() {
  std::vector<std::string> lines;
  for (int index = 0; index < cuda::gpu_count(); ++index) {
    try {
      const cuda::Gpu gpu(index);
      lines.push_back(cat("cuda:", index, ": compute capability ", gpu.capability() / 10, ".", gpu.capability() % 10,
                          ", ", gpu.multiprocessors(), " multiprocessors, ", gpu.memory().total >> 20, " MiB"));
    } catch (const Error& error) {
      lines.push_back(error.what());
    }
  }
  return lines;
}

double read_bandwidth(int index, int64_t nbytes, int rounds) {
  require(nbytes > 0 && nbytes % 16 == 0 && rounds > 0, ErrorKind::kOption,
          "read_bandwidth: a multiple of 16 bytes and at least one round, got ", nbytes, " and ", rounds);
  return cuda::read_probe(cuda::Gpu(index), nbytes, rounds);
}

}  // namespace
}  // namespace llama_ext

extern "C" __attribute__((visibility("default"))) const llama_ext::CudaLibrary* llama_ext_cuda_library() {
  static const llama_ext::CudaLibrary library = {LLAMA_EXT_BUILD,
                                                 &llama_ext::make_cuda_backend,
                                                 &llama_ext::gpus,
                                                 &llama_ext::cuda::why_no_gpu,
                                                 &llama_ext::read_bandwidth,
                                                 &llama_ext::cuda::has_ranges,
                                                 &llama_ext::cuda::ranges_are_on,
                                                 &llama_ext::cuda::show_ranges};
  return &library;
}
