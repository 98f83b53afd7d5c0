#include "cuda/tensor_map.h"

namespace llama_ext::cuda {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

EncodeTiled encoder() {
  static const EncodeTiled function = [] {
    void* found = driver_function("cuTensorMapEncodeTiled", 12000);
    require(found != nullptr, ErrorKind::kDevice, "CUDA: the driver makes no tensor maps");
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

}  // namespace

CUtensorMap tensor_map(const Gpu& gpu, const void* data, int rank, const int64_t* size, const int64_t* pitch,
                       const int* box) {
  constexpr int kMostAxes = 3;
  require(rank >= 1 && rank <= kMostAxes, ErrorKind::kInternal, "tensor_map: ", rank, " axes");
  cuuint64_t sizes[kMostAxes];
  cuuint64_t pitches[kMostAxes];
  cuuint32_t boxes[kMostAxes];
  cuuint32_t steps[kMostAxes];
  for (int i = 0; i < rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(size[i]);
    if (i + 1 < rank) pitches[i] = static_cast<cuuint64_t>(pitch[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
  }
  const CurrentGpu current = gpu.use();
  CUtensorMap map{};
  const CUresult result =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, static_cast<cuuint32_t>(rank), const_cast<void*>(data), sizes,
                pitches, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, ErrorKind::kDevice, "CUDA: the driver refused to describe a matrix of ", size[0],
          " columns (error ", static_cast<int>(result), ")");
  return map;
}

}  // namespace llama_ext::cuda
