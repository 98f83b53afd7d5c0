// y = x W^T for bfloat16 weights on Hopper: wgmma on tiles that the copy engine brings (wgmma.h). A block makes 128 x 256 numbers (or
// 192, 128 or 64 columns): one warp asks for tiles 64 k at a time, as far ahead as shared memory allows, and two warpgroups
// multiply them, 64 rows each. Blocks of a cluster lie one below the other and share the weights' tile, of which each brings a part to
// all. Blocks stay and take one tile after the other.
//
// A number's order of summation depends on nothing but k: its bits depend on neither M, N, the shape of tiles nor the cluster.
// Bound by the tensor cores.
#include <cuda.h>

#include "cuda/kernels.h"
#include "cuda/numeric.h"
#include "cuda/mma.h"
#include "cuda/wgmma.h"
#include "cuda/wgmma_tiles.h"

namespace llama_ext::cuda {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kConsumers = 2;
constexpr int kWgmmaThreads = (1 + kConsumers) * kGroupThreads;
constexpr int kConsumerWarps = 4 * kConsumers;
constexpr int kSharedBytes = 227 * 1024;
constexpr int kBarrierBytes = 1024;
constexpr int kGateGroup = 16;  // ops/feed_forward.h

enum class Epilogue : uint8_t { kStore, kAdd, kRed, kGateUp };

struct WgmmaView {
  CUtensorMap x;
  CUtensorMap weight;
  TileGrid grid;
  int rows = 0;
  int columns = 0;  // rows of the weight
  int steps = 0;    // of 64 k
  const float* bias = nullptr;
  Rows y;
  uint16_t* hidden = nullptr;
  int hidden_width = 0;
  int hidden_stride = 0;
};

template <int kColumns, int kCluster>
struct Stages {
  static constexpr int kXBytes = kTileRows * kTileDepth * 2;
  static constexpr int kWeightBytes = kColumns * kTileDepth * 2;
  static constexpr int kBytes = kXBytes + kWeightBytes;
  static constexpr int kMost = (kSharedBytes - kBarrierBytes - 1024) / kBytes;
  static constexpr int kCount = kMost > 8 ? 8 : kMost;
  static constexpr int kShared = kCount * kBytes + kBarrierBytes + 1024;
};

#if defined(LLAMA_EXT_HAS_WGMMA)
/// silu(gate) up to far more digits than bfloat16 keeps.
__device__ __forceinline__ float gated(float gate, float up) { return __fdividef(gate, 1.0f + fast_exp(-gate)) * up; }

__device__ __forceinline__ void red_add(float* at, float a, float b) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(a), "f"(b) : "memory");
}

template <int kColumns, Epilogue kEpilogue>
__device__ __forceinline__ void finish_tile(const WgmmaView& p, float (&sums)[kColumns / 2], int row, int column) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int g = lane / 4;
  const int t = lane % 4;
  if (p.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = column + j * 8 + 2 * t + i;
        const float bias = n < p.columns ? p.bias[n] : 0.0f;
        sums[4 * j + i] += bias;
        sums[4 * j + 2 + i] += bias;
      }
    }
  }
  if constexpr (kEpilogue == Epilogue::kGateUp) {
#pragma unroll
    for (int q = 0; q < kColumns / 32; ++q) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = row + 8 * half + g;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int f = column / 2 + q * 16 + h * 8 + 2 * t;
          const int gate = 4 * (4 * q + h) + 2 * half;
          const int up = gate + 8;
          const float low = f < p.hidden_width ? gated(sums[gate], sums[up]) : 0.0f;
          const float high = f + 1 < p.hidden_width ? gated(sums[gate + 1], sums[up + 1]) : 0.0f;
          if (m < p.rows && f < p.hidden_stride) {
            *reinterpret_cast<uint32_t*>(p.hidden + int64_t{m} * p.hidden_stride + f) = round_pair(low, high);
          }
        }
      }
    }
  } else {
    const bool is_paired = p.y.stride % 2 == 0 && reinterpret_cast<uintptr_t>(p.y.data) % 8 == 0;
    float* rows[2] = {p.y.row(row + g) + column + 2 * t, p.y.row(row + 8 + g) + column + 2 * t};
    constexpr int kBatch = 4;
#pragma unroll
    for (int first = 0; first < kColumns / 8; first += kBatch) {
      float2 old[kBatch][2];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int n = column + (first + j) * 8 + 2 * t;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          old[j][half] = {0.0f, 0.0f};
          if (kEpilogue != Epilogue::kAdd || row + 8 * half + g >= p.rows) continue;
          const float* from = rows[half] + (first + j) * 8;
          if (is_paired && n + 1 < p.columns) {
            old[j][half] = *reinterpret_cast<const float2*>(from);
          } else {
            if (n < p.columns) old[j][half].x = from[0];
            if (n + 1 < p.columns) old[j][half].y = from[1];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int n = column + (first + j) * 8 + 2 * t;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (row + 8 * half + g >= p.rows) continue;
          float* to = rows[half] + (first + j) * 8;
          float2 sum = {sums[4 * (first + j) + 2 * half], sums[4 * (first + j) + 2 * half + 1]};
          if (kEpilogue == Epilogue::kAdd) sum = {old[j][half].x + sum.x, old[j][half].y + sum.y};
          if (is_paired && n + 1 < p.columns) {
            if (kEpilogue == Epilogue::kRed) {
              red_add(to, sum.x, sum.y);
            } else {
              *reinterpret_cast<float2*>(to) = sum;
            }
          } else {
            const bool adds = kEpilogue == Epilogue::kRed;
            if (n < p.columns) to[0] = adds ? to[0] + sum.x : sum.x;
            if (n + 1 < p.columns) to[1] = adds ? to[1] + sum.y : sum.y;
          }
        }
      }
    }
  }
}
#endif

template <int kColumns, int kCluster, Epilogue kEpilogue>
__global__ void __launch_bounds__(kWgmmaThreads, 1) matmul_wgmma_kernel(const __grid_constant__ WgmmaView p) {
#if defined(LLAMA_EXT_HAS_WGMMA)
  using S = Stages<kColumns, kCluster>;
  // The same places in all blocks of a cluster.
  unsigned char* memory = shared_memory();
  memory += (1024 - shared_address(memory) % 1024) % 1024;
  auto* full = reinterpret_cast<uint64_t*>(memory + S::kCount * S::kBytes);
  uint64_t* empty = full + S::kCount;
  const uint32_t rank = kCluster == 1 ? 0 : cluster_rank();
  const int first = static_cast<int>(blockIdx.x) / kCluster;
  const int clusters = static_cast<int>(gridDim.x) / kCluster;
  const int tiles = p.grid.count();

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kCount; ++stage) {
      init_barrier(full + stage, 1);
      init_barrier(empty + stage, kConsumerWarps * kCluster);
    }
    publish_barriers();
    prefetch_map(&p.x);
    prefetch_map(&p.weight);
  }
  if constexpr (kCluster > 1) {
    sync_cluster();
  } else {
    __syncthreads();
  }

  if (threadIdx.x < kGroupThreads) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      constexpr int kPart = kColumns / kCluster;  // of the weights' tile, that this block brings
      int stage = 0;
      uint32_t phase = 0;
      for (int tile = first; tile < tiles; tile += clusters) {
        const TilePlace place = tile_place(p.grid, tile);
        const int row = (place.row_group * kCluster + static_cast<int>(rank)) * kTileRows;
        const int column = place.column * kColumns + static_cast<int>(rank) * kPart;
        for (int step = 0; step < p.steps; ++step) {
          unsigned char* x_tile = memory + stage * S::kBytes;
          unsigned char* w_tile = x_tile + S::kXBytes + static_cast<int>(rank) * kPart * kTileDepth * 2;
          wait_barrier(empty + stage, phase ^ 1);
          arrive_expecting(full + stage, S::kBytes);
          bring_box<false>(&p.x, step * kTileDepth, row, x_tile, full + stage, 0);
          bring_box<(kCluster > 1)>(&p.weight, step * kTileDepth, column, w_tile, full + stage,
                                    static_cast<uint16_t>((1 << kCluster) - 1));
          if (++stage == S::kCount) {
            stage = 0;
            phase ^= 1;
          }
        }
      }
    }
  } else {
    take_registers<232>();
    const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
    const int warp = static_cast<int>(threadIdx.x) % kGroupThreads / static_cast<int>(kWarp);
    const uint32_t lane = threadIdx.x % kWarp;
    const auto release = [&](int stage) {
      if (lane < kCluster) arrive_at(empty + stage, lane);
    };
    int stage = 0;
    uint32_t phase = 0;
    for (int tile = first; tile < tiles; tile += clusters) {
      float sums[kColumns / 2];
      int previous = 0;
      for (int step = 0; step < p.steps; ++step) {
        const unsigned char* x_tile = memory + stage * S::kBytes;
        const uint64_t a = operand(x_tile + group * (kTileRows / kConsumers) * kTileDepth * 2);
        const uint64_t b = operand(x_tile + S::kXBytes);
        wait_barrier(full + stage, phase);
        fence_products();
#pragma unroll
        for (int k = 0; k < kTileDepth / 16; ++k) {
          product_of_tiles<kColumns>(sums, a + k * kOperandStep, b + k * kOperandStep, step > 0 || k > 0);
        }
        commit_products();
        wait_for_products<1>();  // of the step before, which nobody reads any more
        if (step > 0) release(previous);
        previous = stage;
        if (++stage == S::kCount) {
          stage = 0;
          phase ^= 1;
        }
      }
      wait_for_products<0>();
      release(previous);
      const TilePlace place = tile_place(p.grid, tile);
      const int row = (place.row_group * kCluster + static_cast<int>(rank)) * kTileRows +
                      group * (kTileRows / kConsumers) + warp * 16;
      finish_tile<kColumns, kEpilogue>(p, sums, row, place.column * kColumns);
    }
  }
  // Nobody leaves while others bring something here, or arrive here.
  if constexpr (kCluster > 1) sync_cluster();
#endif
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/// The driver's function, without linking the driver.
EncodeTiled encoder() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    require_success(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
                    "asking the driver for tensor maps");
    require(result == cudaDriverEntryPointSuccess, ErrorKind::kDevice, "CUDA: the driver makes no tensor maps");
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

/// (rows, stride) bfloat16 numbers, brought in boxes of `box` rows and 64 columns; zeros from outside.
CUtensorMap map_of(const void* data, int64_t rows, int64_t stride, int box) {
  CUtensorMap map{};
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(stride), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t extent[2] = {kTileDepth, static_cast<cuuint32_t>(box)};
  const cuuint32_t strides[2] = {1, 1};
  const CUresult result =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), size, pitch, extent, strides,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, ErrorKind::kDevice, "CUDA: the driver refused a tensor map of ", rows, " x ", stride,
          " (error ", static_cast<int>(result), ")");
  return map;
}

template <int kColumns, int kCluster, Epilogue kEpilogue>
void start(const Gpu& gpu, WgmmaView p, const void* x, const WeightView& w) {
  using S = Stages<kColumns, kCluster>;
  p.x = map_of(x, p.rows, w.stride, kTileRows);
  p.weight = map_of(w.data, w.rows, w.stride, kColumns / kCluster);
  p.columns = w.rows;
  p.steps = (w.stride + kTileDepth - 1) / kTileDepth;
  p.grid = tile_grid(p.rows, w.rows, kCluster, kColumns);
  const int clusters = min(p.grid.count(), gpu.multiprocessors() / kCluster);
  const auto kernel = matmul_wgmma_kernel<kColumns, kCluster, kEpilogue>;
  gpu.use();
  require_success(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kShared),
                  "a kernel's shared memory");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster));
  config.blockDim = dim3(kWgmmaThreads);
  config.dynamicSmemBytes = S::kShared;
  config.stream = gpu.stream();
  config.attrs = &attribute;
  config.numAttrs = 1;
  require_success(cudaLaunchKernelEx(&config, kernel, p), "a kernel");
}

}  // namespace
}  // namespace llama_ext::cuda
