// A kernel that does nothing, and what it was compiled for: as all others of this library. One block and no work; never started.
#include "cuda/launch.h"

namespace llama_ext::cuda {
namespace {

__global__ void marker_kernel() {}

}  // namespace

int architecture_of_code(const Gpu& gpu) { return architecture_of(gpu, marker_kernel); }

}  // namespace llama_ext::cuda
