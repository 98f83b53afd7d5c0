// The only file that names all backends.
#include "bindings/bindings.h"
#include "cpu/cpu_backend.h"
#include "reference/reference_backend.h"

namespace llama_ext {

std::shared_ptr<Backend> make_backend(const std::string& device, int threads, const std::string& isa) {
  if (device == "cpu") return make_cpu_backend(threads, isa);
  if (device == "reference") return make_reference_backend();
  require(device != "cuda" && !device.starts_with("cuda:"), ErrorKind::kDevice, "device '", device,
          "': this build has no CUDA backend. Use device='cpu'");
  fail(ErrorKind::kDevice, "unknown device '", device, "'; known: cpu, reference");
}

}  // namespace llama_ext
