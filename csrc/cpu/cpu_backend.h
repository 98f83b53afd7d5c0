// The CPU: SIMD kernels chosen at run time, on a thread pool of our own.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"

namespace llama_ext {

/// threads: > 0, or 0 for default_threads(). isa: a name from available_isas(), or "" for what LLAMA_EXT_ISA says or, without
/// it, the best there is. Throws DeviceError for an ISA this machine or build lacks, OptionError for threads out of range.
std::unique_ptr<Backend> make_cpu_backend(int threads = 0, const std::string& isa = "");

}  // namespace llama_ext
