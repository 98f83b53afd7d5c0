// Hopper's instructions as they are emulated: what the hardware would not forgive has to show.
#include <string>
#include <vector>

#include "claims.h"
#include "core/half.h"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.h"

using namespace llama_ext::cuda;
using claims::error_of;
using claims::expect;

namespace {

constexpr int kTile = 64 * 128;  // bytes of 64 rows of 64 numbers

enum class Fault { kNone, kNoBarrier, kReadsEarly, kNeverWaits, kOverwrites, kOneArrivalTooMany, kOutOfPlace };

/// c (64, 64) = a b^T of two tiles.
__global__ void product_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, float* c,
                               Fault fault) {
  unsigned char* memory = shared_memory();
  memory += (1024 - shared_address(memory) % 1024) % 1024;
  auto* full = reinterpret_cast<uint64_t*>(memory + 2 * kTile);
  if (threadIdx.x == 0) {
    init_barrier(full, 1);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_expecting(full, 2 * kTile);
    bring_box<false>(&a, 0, 0, memory, full, 0);
    bring_box<false>(&b, 0, 0, memory + kTile + (fault == Fault::kOutOfPlace ? 64 : 0), full, 0);
    if (fault == Fault::kOneArrivalTooMany) arrive(full);
  }
  if (fault != Fault::kNoBarrier) wait_barrier(full, 0);
  float sums[32] = {};
  fence_products();
  for (int k = 0; k < 4; ++k) {
    product_of_tiles<64>(sums, operand(memory) + k * kOperandStep, operand(memory + kTile) + k * kOperandStep, k > 0);
  }
  commit_products();
  if (fault == Fault::kNeverWaits) return;
  if (fault == Fault::kOverwrites) {
    if (threadIdx.x == 0) {
      arrive_expecting(full, kTile);
      bring_box<false>(&a, 0, 0, memory, full, 0);
    }
    __syncthreads();
  }
  float early = sums[0];
  wait_for_products<0>();
  if (fault == Fault::kOverwrites) wait_barrier(full, 1);
  if (fault != Fault::kReadsEarly) early = sums[0];
  const int row = static_cast<int>(threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4);
  for (int i = 0; i < 32; ++i) {
    c[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + i % 2] =
        i == 0 ? early : sums[i];
  }
}

/// One thread of block 0 arrives at block 1's barrier, which has gone if it does not wait for that.
__global__ void cluster_kernel(float* out, bool stays) {
  auto* barrier = reinterpret_cast<uint64_t*>(shared_memory());
  if (threadIdx.x == 0) init_barrier(barrier, 1);
  sync_cluster();
  if (!stays && cluster_rank() == 0) __syncthreads();
  if (threadIdx.x == 0 && cluster_rank() == 0) arrive_at(barrier, 1);
  if (threadIdx.x == 0 && cluster_rank() == 1 && stays) {
    wait_barrier(barrier, 0);
    *out = 1.0f;
  }
  if (stays) sync_cluster();
}

/// Of 640 threads, which have 96 registers each.
template <int kTaken>
__global__ void registers_kernel() {
  threadIdx.x < 512 ? take_registers<kTaken>() : give_registers<32>();
}

CUtensorMap map_of(const Gpu& gpu, const void* data, int64_t columns, int64_t rows, int64_t pitch) {
  const int64_t size[2] = {columns, rows};
  const int box[2] = {64, 64};
  return tensor_map(gpu, data, 2, size, &pitch, box);
}

}  // namespace

int main() {
  const Gpu gpu(0);
  constexpr int kRows = 60;  // of 64: zeros come from beyond
  std::vector<uint16_t> a(64 * 64), b(64 * 64);
  for (size_t i = 0; i < a.size(); ++i) a[i] = llama_ext::f32_to_bf16(static_cast<float>(i * 7 % 13) - 6);
  for (size_t i = 0; i < b.size(); ++i) b[i] = llama_ext::f32_to_bf16(static_cast<float>(i * 5 % 11) - 5);
  auto* operands = static_cast<uint16_t*>(gpu.allocate(4 * 64 * 64, "a test"));
  auto* out = static_cast<float*>(gpu.allocate(64 * 64 * sizeof(float), "a test"));
  gpu.copy_to_device(operands, a.data(), 2 * a.size());
  gpu.copy_to_device(operands + a.size(), b.data(), 2 * b.size());
  const CUtensorMap of_a = map_of(gpu, operands, 64, kRows, 128);
  const CUtensorMap of_b = map_of(gpu, operands + a.size(), 64, 64, 128);
  std::vector<float> c(64 * 64);
  const auto run = [&](Fault fault) {
    const std::string error =
        error_of([&] { launch(gpu, product_kernel, dim3(1), 128, 2 * kTile + 2048, of_a, of_b, out, fault); });
    gpu.copy_to_host(c.data(), out, c.size() * sizeof(float));
    return error;
  };
  const auto is_right = [&] {
    for (size_t row = 0; row < 64; ++row) {
      for (size_t column = 0; column < 64; ++column) {
        float sum = 0;
        for (size_t k = 0; k < 64 && row < kRows; ++k)
          sum += llama_ext::bf16_to_f32(a[row * 64 + k]) * llama_ext::bf16_to_f32(b[column * 64 + k]);
        if (c[row * 64 + column] != sum) return false;
      }
    }
    return true;
  };

  for (const char* order : {"forward", "backward", "shuffled"}) {
    setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order, 1);
    expect(run(Fault::kNone).empty() && is_right(),
           "tiles are multiplied as the PTX manual lays them out, in every order");
  }
  setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", "forward", 1);
  expect(run(Fault::kNoBarrier).find("nobody waited") != std::string::npos && c[0] != c[0],
         "tiles that nobody waited for are NaN, and an error");
  expect(run(Fault::kReadsEarly).empty() && !is_right(), "and sums before their wait are what they were");
  expect(run(Fault::kOverwrites).empty() && !is_right(),
         "a tile that is brought anew is lost for products on their way");
  expect(run(Fault::kNeverWaits).find("nobody waited") != std::string::npos, "products must be waited for");
  expect(run(Fault::kOneArrivalTooMany).find("more arrivals") != std::string::npos,
         "a phase takes no more arrivals than it counts");
  expect(run(Fault::kOutOfPlace).find("128 bytes") != std::string::npos, "a box has to lie at a multiple of 128 bytes");

  const auto in_cluster = [&](bool stays) {
    return error_of([&] { launch_clusters(gpu, cluster_kernel, 2, 2, 32, 64, out, stays); });
  };
  expect(in_cluster(true).empty(), "blocks of a cluster arrive at each other's barriers");
  expect(in_cluster(false).find("ended") != std::string::npos, "but not at those of one that has ended");

  const auto take = [&](void (*kernel)()) { return error_of([&] { launch(gpu, kernel, dim3(1), 640, 0); }); };
  expect(take(registers_kernel<112>).empty(), "threads take the registers that others give back");
  expect(take(registers_kernel<120>).find("given back") != std::string::npos, "and no more of them");

  expect(!error_of([&] { map_of(gpu, operands, 64, 4, 120); }).empty(), "rows lie a multiple of 16 bytes apart");
  expect(!error_of([&] { map_of(gpu, operands + 1, 64, 4, 128); }).empty(), "and begin at one");
  return claims::exit_status();
}
