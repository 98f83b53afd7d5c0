// y = x W^T for bfloat16 weights on Hopper: wgmma on tiles that the copy engine brings (wgmma.h). A block makes 128 x 256 numbers (or
// 192, 128 or 64 columns): one warp asks for tiles 64 k at a time, as far ahead as shared memory allows, and two warpgroups
// multiply them, 64 rows each. Blocks of a cluster lie one below the other and share the weights' tile, of which each brings a part to
// all. Blocks stay and take one tile after the other.
//
// A number's order of summation depends on nothing but k: its bits depend on neither M, N, the shape of tiles nor the cluster.
// Bound by the tensor cores.
#include "cuda/kernels.h"
#include "cuda/mma.h"
#include "cuda/numeric.h"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.h"
#include "cuda/wgmma_tiles.h"

namespace llama_ext::cuda {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kConsumers = 2;
constexpr int kWgmmaThreads = (1 + kConsumers) * kGroupThreads;
[[maybe_unused]] constexpr int kConsumerWarps = 4 * kConsumers;
constexpr int kSharedBytes = 227 * 1024;
constexpr int kBarrierBytes = 1024;

enum class Epilogue : uint8_t { kStore, kAdd, kGateUp };

struct WgmmaView {
  CUtensorMap x;
  CUtensorMap weight;
  TileGrid grid;
  int rows = 0;
  int columns = 0;  // rows of the weight
  int steps = 0;    // of 64 k
  const float* bias = nullptr;
  Rows y;
  bool is_aligned = false;  // rows of y, to 16 bytes
  RoundedRows hidden;
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

/// The lane of t ^ kOther gives what this lane is not to keep, and gets what that one is not: `second` is kept where `keeps_second`.
template <int kOther, typename Number>
__device__ __forceinline__ void exchange(Number& first, Number& second, bool keeps_second) {
  const Number given = keeps_second ? first : second;
  const Number got = __shfl_xor_sync(kAllLanes, given, kOther);
  if (keeps_second) {
    first = got;
  } else {
    second = got;
  }
}

struct Tile {
  int row;  // of the warp's 16
  int column;
  bool is_whole;  // nothing of it lies outside, and 16 bytes can be stored at once
};

template <int kColumns>
__device__ __forceinline__ void add_bias(const WgmmaView& p, float (&sums)[kColumns / 2], int column) {
  const int t = static_cast<int>(threadIdx.x % 4);
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

/// Gates and ups come in turns of two times 8 columns. The four lanes of a row gather 16 hidden numbers of it and of the row 8
/// below, 16 bytes a lane.
template <int kColumns>
__device__ __forceinline__ void store_hidden(const WgmmaView& p, const float (&sums)[kColumns / 2], Tile tile) {
  const int g = static_cast<int>(threadIdx.x % kWarp) / 4;
  const int t = static_cast<int>(threadIdx.x % 4);
  const int m = tile.row + g + 8 * (t % 2);
#pragma unroll
  for (int q = 0; q < kColumns / 32; ++q) {
    const int f = tile.column / 2 + q * 16;
    uint32_t words[2][2];  // which 8 columns, which row
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = f + h * 8 + 2 * t;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int gate = 4 * (4 * q + h) + 2 * half;
        const float low = n < p.hidden.width ? gated(sums[gate], sums[gate + 8]) : 0.0f;
        const float high = n + 1 < p.hidden.width ? gated(sums[gate + 1], sums[gate + 9]) : 0.0f;
        words[h][half] = round_pair(low, high);
      }
    }
    // Lane t keeps row t % 2 and columns t / 2, and gets the words of lanes 0 to 3 in order.
    exchange<1>(words[0][0], words[0][1], t % 2 == 1);
    exchange<1>(words[1][0], words[1][1], t % 2 == 1);
    exchange<2>(words[0][0], words[1][0], t / 2 == 1);
    exchange<2>(words[0][1], words[1][1], t / 2 == 1);
    const int n = f + 8 * (t / 2);
    if (m < p.rows && n < p.hidden.padded) {
      *reinterpret_cast<uint4*>(p.hidden.data + int64_t{m} * p.hidden.stride + n) =
          uint4{words[0][0], words[0][1], words[1][0], words[1][1]};
    }
  }
}

/// A row's four lanes gather 16 columns of it, 16 bytes a lane.
template <int kColumns, bool kAdds>
__device__ __forceinline__ void store_whole(const WgmmaView& p, const float (&sums)[kColumns / 2], Tile tile) {
  const int g = static_cast<int>(threadIdx.x % kWarp) / 4;
  const int t = static_cast<int>(threadIdx.x % 4);
  const int column = tile.column + 8 * (t % 2) + 4 * (t / 2);
  float* rows[2] = {p.y.row(tile.row + g) + column, p.y.row(tile.row + 8 + g) + column};
  constexpr int kBatch = kColumns % 128 == 0 ? 8 : 4;  // whose old numbers are on their way together
  static_assert(kColumns / 16 % kBatch == 0);
#pragma unroll
  for (int first = 0; first < kColumns / 16; first += kBatch) {
    float4 old[kBatch][2];
    if constexpr (kAdds) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          old[j][half] = *reinterpret_cast<const float4*>(rows[half] + (first + j) * 16);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = 8 * (first + j) + 2 * half;
        float4 sum{sums[at], sums[at + 1], sums[at + 4], sums[at + 5]};
        exchange<1>(sum.x, sum.z, t % 2 == 1);
        exchange<1>(sum.y, sum.w, t % 2 == 1);
        if constexpr (kAdds) {
          const float4& y = old[j][half];
          sum = {y.x + sum.x, y.y + sum.y, y.z + sum.z, y.w + sum.w};
        }
        *reinterpret_cast<float4*>(rows[half] + (first + j) * 16) = sum;
      }
    }
  }
}

template <int kColumns, bool kAdds>
__device__ __forceinline__ void store_part(const WgmmaView& p, const float (&sums)[kColumns / 2], Tile tile) {
  const int g = static_cast<int>(threadIdx.x % kWarp) / 4;
  const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = tile.row + 8 * half + g;
    if (m >= p.rows) continue;
    float* row = p.y.row(m);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = tile.column + j * 8 + 2 * t + i;
        const float sum = sums[4 * j + 2 * half + i];
        if (n < p.columns) row[n] = kAdds ? row[n] + sum : sum;
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
      if constexpr (kCluster == 1) {
        if (lane == 0) arrive(empty + stage);
      } else {
        if (lane < kCluster) arrive_at(empty + stage, lane);
      }
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
      Tile found;
      found.row = (place.row_group * kCluster + static_cast<int>(rank)) * kTileRows + group * (kTileRows / kConsumers) +
                  warp * 16;
      found.column = place.column * kColumns;
      found.is_whole = p.is_aligned && found.row + 16 <= p.rows && found.column + kColumns <= p.columns;
      if (p.bias != nullptr) add_bias<kColumns>(p, sums, found.column);
      if constexpr (kEpilogue == Epilogue::kGateUp) {
        store_hidden<kColumns>(p, sums, found);
      } else if (found.is_whole) {
        store_whole<kColumns, kEpilogue == Epilogue::kAdd>(p, sums, found);
      } else {
        store_part<kColumns, kEpilogue == Epilogue::kAdd>(p, sums, found);
      }
    }
  }
  // Nobody leaves while others bring something here, or arrive here.
  if constexpr (kCluster > 1) sync_cluster();
#else
  __trap();  // nobody starts it: Gpu::has_hopper_code()
#endif
}

/// (rows, stride) numbers, in boxes of 64 columns.
CUtensorMap map_of(const Gpu& gpu, const void* data, int64_t rows, int64_t stride, int box_rows) {
  const int64_t size[2] = {stride, rows};
  const int64_t pitch[1] = {2 * stride};
  const int box[2] = {kTileDepth, box_rows};
  return tensor_map(gpu, data, 2, size, pitch, box);
}

template <int kColumns, int kCluster, Epilogue kEpilogue>
void start(const Gpu& gpu, WgmmaView p, const void* x, const WeightView& w) {
  using S = Stages<kColumns, kCluster>;
  p.x = map_of(gpu, x, p.rows, w.stride, kTileRows);
  p.weight = map_of(gpu, w.data, w.rows, w.stride, kColumns / kCluster);
  p.columns = w.rows;
  p.steps = (w.stride + kTileDepth - 1) / kTileDepth;
  p.grid = tile_grid(p.rows, w.rows, kCluster, kColumns);
  p.is_aligned = p.y.stride % 4 == 0 && reinterpret_cast<uintptr_t>(p.y.data) % 16 == 0;
  const int clusters = min(p.grid.count(), gpu.multiprocessors() / kCluster);
  launch_clusters(gpu, matmul_wgmma_kernel<kColumns, kCluster, kEpilogue>, static_cast<unsigned>(clusters * kCluster),
                  kCluster, kWgmmaThreads, S::kShared, p);
}

template <Epilogue kEpilogue>
void start_shape(const Gpu& gpu, const WgmmaView& p, const void* x, const WeightView& w) {
  const int steps = (w.stride + kTileDepth - 1) / kTileDepth;
  const TileShape& shape = kTileShapes[choose_tile_shape(p.rows, w.rows, steps, gpu.multiprocessors())];
  if (shape.columns == 256) return start<256, 2, kEpilogue>(gpu, p, x, w);
  if (shape.columns == 192) return start<192, 2, kEpilogue>(gpu, p, x, w);
  if (shape.columns == 128 && shape.cluster == 2) return start<128, 2, kEpilogue>(gpu, p, x, w);
  if (shape.columns == 128) return start<128, 1, kEpilogue>(gpu, p, x, w);
  start<64, 1, kEpilogue>(gpu, p, x, w);
}

}  // namespace

bool has_wgmma(const Gpu& gpu, Kind kind) { return kind == Kind::kBF16 && gpu.has_hopper_code(); }

void matmul_wgmma(const Gpu& gpu, const MmaView& product) {
  WgmmaView p;
  p.rows = static_cast<int>(product.rows);
  p.bias = product.bias;
  p.y = product.y;
  if (product.accumulate) return start_shape<Epilogue::kAdd>(gpu, p, product.x, product.weight);
  start_shape<Epilogue::kStore>(gpu, p, product.x, product.weight);
}

void gate_up_wgmma(const Gpu& gpu, const MmaView& product, RoundedRows hidden) {
  WgmmaView p;
  p.rows = static_cast<int>(product.rows);
  p.bias = product.bias;
  p.hidden = hidden;
  start_shape<Epilogue::kGateUp>(gpu, p, product.x, product.weight);
}

}  // namespace llama_ext::cuda
