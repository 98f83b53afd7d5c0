// The one symbol of libllama_ext_cuda.so.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace llama_ext {

/// What the library offers. Both sides are built from the same headers: `build` says so, and stays the first.
struct CudaLibrary {
  const char* build;  // the version and a number of those headers
  std::unique_ptr<Backend> (*make_backend)(int index);
  /// A line for each GPU: "cuda:0: compute capability 9.0, 132 multiprocessors, ...".
  std::vector<std::string> (*gpus)();
  /// Why there is none, or "".
  std::string (*why_no_gpu)();
  /// Bytes a second that a GPU's memory can be read with: `nbytes`, a multiple of 16, `rounds` times.
  double (*read_bandwidth)(int index, int64_t nbytes, int rounds);
  /// NVTX ranges: whether this build has them, whether they are on, and switching them (cuda/ranges.h).
  bool (*has_ranges)();
  bool (*ranges_are_on)();
  void (*show_ranges)(bool on);
};

inline constexpr const char* kCudaEntry = "llama_ext_cuda_library";
using CudaEntry = const CudaLibrary* (*)();

}  // namespace llama_ext
