// Views of tensors as kernels take them.
#pragma once

#include "backend/backend.h"
#include "cuda/kernels.h"

namespace llama_ext::cuda {

/// In the emulator of the tests, throws unless every element lies in memory that was allocated on the GPU.
inline float* device_data(const TensorView& view) {
#if defined(LLAMA_EXT_CUDA_EMULATED)
  const int64_t elements = view.size() == 0 ? 0 : (view.rows() - 1) * view.row_stride() + view.inner_size();
  require(elements == 0 || cuda_emulation::is_device_memory(view.data(), static_cast<size_t>(elements) * sizeof(float)),
          ErrorKind::kInternal, "an operation on the GPU was given memory that is not the GPU's");
#endif
  return view.f32();
}

/// Likewise, of a number that operations read there; or null.
inline const int32_t* live_data(const int32_t* number) {
#if defined(LLAMA_EXT_CUDA_EMULATED)
  require(number == nullptr || cuda_emulation::is_device_memory(number, sizeof *number), ErrorKind::kInternal,
          "an operation on the GPU was given a number that is not in the GPU's memory");
#endif
  return number;
}

inline Rows rows_of(const TensorView& view) { return view ? Rows{device_data(view), view.row_stride()} : Rows{}; }
inline float* optional_data(const TensorView& view) { return view ? device_data(view) : nullptr; }
inline NormView norm_of(const InputNorm& norm) { return {optional_data(norm.weight), static_cast<float>(norm.eps)}; }

}  // namespace llama_ext::cuda
