// An NVIDIA GPU as a backend. A shared library of its own (entry.h), which links the CUDA runtime statically.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace llama_ext {

/// index: as the CUDA runtime counts. Throws DeviceError, with what was found and what is needed.
std::unique_ptr<Backend> make_cuda_backend(int index);

}  // namespace llama_ext
