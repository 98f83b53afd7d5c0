// The only file that names all backends, and opens the one that is a library of its own.
#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>

#include "bindings/bindings.h"
#include "cpu/cpu_backend.h"
#include "cuda/entry.h"
#include "reference/reference_backend.h"

#ifndef LLAMA_EXT_BUILD
#error "LLAMA_EXT_BUILD is set by CMakeLists.txt"
#endif

namespace llama_ext {
namespace {

/// The library beside this module.
std::filesystem::path packaged_library() {
  Dl_info self{};
  require(dladdr(reinterpret_cast<const void*>(&packaged_library), &self) != 0 && self.dli_fname != nullptr,
          ErrorKind::kDevice, "CUDA: the folder of llama_ext cannot be found");
  return std::filesystem::path(self.dli_fname).parent_path() / "libllama_ext_cuda.so";
}

/// That, or the one that LLAMA_EXT_CUDA_LIBRARY names.
std::filesystem::path cuda_library_path() {
  if (const char* named = std::getenv("LLAMA_EXT_CUDA_LIBRARY"); named != nullptr && *named != '\0') return named;
  return packaged_library();
}

/// Opened at the first request and kept. Throws DeviceError.
const CudaLibrary& cuda_library() {
  static const CudaLibrary& library = []() -> const CudaLibrary& {
    const std::filesystem::path path = cuda_library_path();
    require(std::filesystem::exists(path), ErrorKind::kDevice, "this build of llama_ext has no CUDA backend (",
            path.string(), " is not there). Build it with -C cmake.define.LLAMA_EXT_CUDA=ON, or use device='cpu'");
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    require(handle != nullptr, ErrorKind::kDevice, "the CUDA backend cannot be opened: ", dlerror());
    const auto entry = reinterpret_cast<CudaEntry>(dlsym(handle, kCudaEntry));
    require(entry != nullptr, ErrorKind::kDevice, path.string(), " is not the CUDA backend of llama_ext");
    const CudaLibrary* found = entry();
    require(std::string_view(found->build) == LLAMA_EXT_BUILD, ErrorKind::kDevice, path.string(), " is of build ",
            found->build, ", llama_ext of ", LLAMA_EXT_BUILD,
            path == packaged_library() ? ". Install the package again"
                                       : ". Build what LLAMA_EXT_CUDA_LIBRARY names of the sources that are installed");
    return *found;
  }();
  return library;
}

/// "cuda" is the first GPU.
int gpu_index(const std::string& device) {
  if (device == "cuda") return 0;
  const std::string digits = device.substr(5);
  const bool is_number =
      !digits.empty() && digits.size() <= 4 && digits.find_first_not_of("0123456789") == std::string::npos;
  require(is_number, ErrorKind::kDevice, "device '", device, "': a GPU is named cuda:0, cuda:1, ...");
  return std::stoi(digits);
}

}  // namespace

std::shared_ptr<Backend> make_backend(const std::string& device, int threads, const std::string& isa) {
  if (device == "cpu") return make_cpu_backend(threads, isa);
  if (device == "reference") return make_reference_backend();
  if (device == "cuda" || device.starts_with("cuda:")) {
    require(isa.empty(), ErrorKind::kOption, "device '", device, "' has no instruction set to choose, got isa '", isa,
            "'");
    const int index = gpu_index(device);
    return cuda_library().make_backend(index);
  }
  fail(ErrorKind::kDevice, "unknown device '", device, "'; known: cpu, cuda, cuda:0, ..., reference");
}

double gpu_read_bandwidth(const std::string& device, int64_t nbytes, int rounds) {
  return cuda_library().read_bandwidth(gpu_index(device), nbytes, rounds);
}

bool has_nvtx_ranges() { return cuda_library().has_ranges(); }
bool nvtx_ranges_are_on() { return cuda_library().ranges_are_on(); }
void show_nvtx_ranges(bool on) { cuda_library().show_ranges(on); }

GpuReport gpu_report() {
  try {
    const CudaLibrary& library = cuda_library();
    return {library.gpus(), library.why_no_gpu()};
  } catch (const Error& error) {
    return {{}, error.what()};
  }
}

}  // namespace llama_ext
