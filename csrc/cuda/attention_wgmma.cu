// Attention of long chunks on Hopper: what attention_mma.cu does, with wgmma and tiles that the copy engine brings (wgmma.h). A block has
// 128 rows of queries (192 where heads are small), 64 for each warpgroup, and one warp that asks for keys and values. Scores of the next 64
// keys are computed together with the weighted sums of the last; one warpgroup's exponentials run beside the products of another. Scores,
// weights and both sums stay in registers; so could queries, but ptxas 13.0 then gives weights their registers.
//
// Every sum has the order that it has in attention_mma.cu, and so the same bits. Bound by the tensor cores and the exponentials.
#include "cuda/attention_parts.h"
#include "cuda/mma.h"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.h"
#include "cuda/wgmma_tiles.h"

namespace llama_ext::cuda {
namespace {

constexpr int kTileKeys = 64;
[[maybe_unused]] constexpr int kTilesPerPart = kAttentionPartKeys / kTileKeys;
constexpr int kGroupThreads = 128;
constexpr int kGroupRows = 64;
constexpr int kBoxBytes = kTileKeys * 128;  // of 64 dimensions
constexpr int kBarrierBytes = 1024;
[[maybe_unused]] constexpr int kTurnBarrier = 1;  // of each warpgroup, and so the next
[[maybe_unused]] constexpr int kQueriesBarrier = 5;

struct WgmmaAttention {
  CUtensorMap keys;  // (kv_heads, positions, dimensions)
  CUtensorMap values;
  KvSegmentView segment;
  Rows q;
  Rows y;
  RoundedRows rounded;  // in its place, if it has data
  int group = 0;        // H / K
  float scale = 1.0f;
};

template <int kDim>
struct Layout {
  static constexpr int kGroups = kDim == 64 ? 3 : 2;  // warpgroups that multiply
  static constexpr int kRows = kGroups * kGroupRows;
  static constexpr int kThreadCount = (1 + kGroups) * kGroupThreads;
  static constexpr int kRegisters = kDim == 64 ? 160 : 240;
  static constexpr int kBoxes = kDim / 64;
  static constexpr int kStageBytes = 2 * kBoxes * kBoxBytes;
  static constexpr int kStages = kDim == 64 ? 8 : 5;
  static constexpr int kQueriesAt = kStages * kStageBytes;
  static constexpr int kBarriersAt = kQueriesAt + kRows * kDim * 2;
  static constexpr int kShared = kBarriersAt + kBarrierBytes + 1024;
};

#if defined(LLAMA_EXT_HAS_WGMMA)
/// What a warpgroup has found, of a lane's two rows: in the present part of the keys, and before it.
template <int kDim>
struct Sums {
  float found[kDim / 2];
  float merged[kDim / 2];
  float largest[2];
  float sums[2];
  float merged_largest[2];
  float merged_sums[2];
};

/// The end of a part.
template <int kDim>
__device__ __forceinline__ void merge_part(Sums<kDim>& s, bool is_first) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = s.sums[half];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    MergeFactors factors{s.largest[half], 0.0f, 1.0f};
    if (!is_first) factors = merge_factors(s.merged_largest[half], s.largest[half]);
    s.merged_sums[half] = is_first ? sum : merge(s.merged_sums[half], sum, factors);
    s.merged_largest[half] = factors.largest;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
      for (int c = 4 * j + 2 * half; c < 4 * j + 2 * half + 2; ++c) {
        s.merged[c] = is_first ? s.found[c] : merge(s.merged[c], s.found[c], factors);
      }
    }
  }
}

/// Scores become weights; what was found before is scaled to the new largest score.
template <int kDim>
__device__ __forceinline__ void weigh(float (&scores)[kTileKeys / 2], float scale, Sums<kDim>& s,
                                      uint32_t (&weights)[kTileKeys / 16][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = scores[2 * half];
#pragma unroll
    for (int j = 0; j < kTileKeys / 8; ++j) {
      top = fmaxf(top, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
    }
    top = fmaxf(s.largest[half], top * scale);
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
    const AttentionShift shift(top);
    const float factor = fast_exp(s.largest[half] - shift.natural);
    s.largest[half] = top;
    s.sums[half] *= factor;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      s.found[4 * j + 2 * half] *= factor;
      s.found[4 * j + 2 * half + 1] *= factor;
    }
    const float binary_scale = scale * kLog2E;
#pragma unroll
    for (int j = 0; j < kTileKeys / 8; ++j) {
      const float low = attention_weight(scores[4 * j + 2 * half], binary_scale, shift);
      const float high = attention_weight(scores[4 * j + 2 * half + 1], binary_scale, shift);
      s.sums[half] += low + high;
      weights[j / 2][2 * (j % 2) + half] = round_pair(low, high);
    }
  }
}

/// found += weights values.
template <int kDim>
__device__ __forceinline__ void add_values(Sums<kDim>& s, const uint32_t (&weights)[kTileKeys / 16][4],
                                           const unsigned char* values) {
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
    const uint64_t b = transposed_operand(values, kBoxBytes) + step * kTransposedStep;
    product_of_registers<kDim, true>(s.found, weights[step], b, true);
  }
}

/// A warpgroup's queries, rounded and swizzled: rows [first, first + 64) of the block's.
template <int kDim>
__device__ __forceinline__ void load_queries(const WgmmaAttention& a, int64_t token, int kv_head, int first, int rows,
                                             unsigned char* queries) {
  constexpr int kVectors = kDim / 8;
  const int dim = a.segment.layer.head_dim;
  const bool is_aligned = dim % 4 == 0 && a.q.stride % 4 == 0 && reinterpret_cast<uintptr_t>(a.q.data) % 16 == 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) % kGroupThreads; i < kGroupRows * kVectors; i += kGroupThreads) {
    const int row = i / kVectors;
    const int d = i % kVectors * 8;
    float values[8] = {};
    if (first + row < rows) {
      const int of_block = first + row;
      const float* from =
          a.q.row(a.segment.row + token + of_block / a.group) + (kv_head * a.group + of_block % a.group) * dim + d;
#pragma unroll
      for (int part = 0; part < 8; part += 4) {
        if (is_aligned && d + part < dim) {
          const float4 four = *reinterpret_cast<const float4*>(from + part);
          values[part] = four.x;
          values[part + 1] = four.y;
          values[part + 2] = four.z;
          values[part + 3] = four.w;
        } else {
#pragma unroll
          for (int j = part; j < part + 4; ++j) values[j] = d + j < dim ? from[j] : 0.0f;
        }
      }
    }
    const uint4 words{round_pair(values[0], values[1]), round_pair(values[2], values[3]),
                      round_pair(values[4], values[5]), round_pair(values[6], values[7])};
    unsigned char* box = queries + d / 64 * Layout<kDim>::kRows * 128;
    *reinterpret_cast<uint4*>(box + swizzled_byte(row, d % 64 / 8)) = words;
  }
}
#endif

template <int kDim>
__global__ void __launch_bounds__(Layout<kDim>::kThreadCount, 1)
    attention_wgmma_kernel(const __grid_constant__ WgmmaAttention a) {
#if defined(LLAMA_EXT_HAS_WGMMA)
  using L = Layout<kDim>;
  unsigned char* memory = shared_memory();
  memory += (1024 - shared_address(memory) % 1024) % 1024;
  auto* full = reinterpret_cast<uint64_t*>(memory + L::kBarriersAt);
  uint64_t* empty = full + L::kStages;

  const KvSegmentView& segment = a.segment;
  const int tokens = L::kRows / a.group;
  const int kv_head = static_cast<int>(blockIdx.x);
  // The last ones see the most keys, and come first.
  const int64_t token = int64_t{gridDim.y - 1 - blockIdx.y} * tokens;
  const int rows = static_cast<int>(segment.tokens - token < tokens ? segment.tokens - token : tokens) * a.group;
  const int end_key = static_cast<int>(segment.position + token) + rows / a.group;
  const int tiles = (end_key + kTileKeys - 1) / kTileKeys;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < L::kStages; ++stage) {
      init_barrier(full + stage, 1);
      init_barrier(empty + stage, L::kGroups * 4);
    }
    publish_barriers();
    prefetch_map(&a.keys);
    prefetch_map(&a.values);
  }
  __syncthreads();

  if (threadIdx.x < kGroupThreads) {
    give_registers<24>();
    if (threadIdx.x == 0) {
      int stage = 0;
      uint32_t phase = 0;
      for (int tile = 0; tile < tiles; ++tile) {
        unsigned char* to = memory + stage * L::kStageBytes;
        wait_barrier(empty + stage, phase ^ 1);
        arrive_expecting(full + stage, L::kStageBytes);
#pragma unroll
        for (int box = 0; box < L::kBoxes; ++box) {
          bring_box(&a.keys, box * 64, tile * kTileKeys, kv_head, to + box * kBoxBytes, full + stage);
        }
#pragma unroll
        for (int box = 0; box < L::kBoxes; ++box) {
          bring_box(&a.values, box * 64, tile * kTileKeys, kv_head, to + (L::kBoxes + box) * kBoxBytes, full + stage);
        }
        if (++stage == L::kStages) {
          stage = 0;
          phase ^= 1;
        }
      }
    }
  } else {
    take_registers<L::kRegisters>();
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
    const int next_group = group + 1 == L::kGroups ? 0 : group + 1;
    const int first_row = static_cast<int>(threadIdx.x / kWarp - 4) * 16 + g;
    const int dim = segment.layer.head_dim;

    int visible[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 8 * half;
      visible[half] = row < rows ? static_cast<int>(segment.position + token) + row / a.group + 1 : 0;
    }
    unsigned char* queries = memory + L::kQueriesAt + group * kGroupRows * 128;  // boxes of all rows and 64 dimensions
    load_queries<kDim>(a, token, kv_head, group * kGroupRows, rows, queries);
    publish_stores();
    sync_warps(kQueriesBarrier + group, kGroupThreads);

    Sums<kDim> s;
    const auto begin_part = [&] {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) s.found[i] = 0.0f;
      s.largest[0] = s.largest[1] = -INFINITY;
      s.sums[0] = s.sums[1] = 0.0f;
    };
    begin_part();
    float scores[kTileKeys / 2];
    uint32_t weights[kTileKeys / 16][4];
    int stage = 0;
    int previous = 0;
    uint32_t phase = 0;
    const auto multiply_keys = [&] {
      const unsigned char* keys = memory + stage * L::kStageBytes;
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        const uint64_t of_queries = operand(queries + step / 4 * L::kRows * 128) + step % 4 * kOperandStep;
        const uint64_t of_keys = operand(keys + step / 4 * kBoxBytes) + step % 4 * kOperandStep;
        product_of_tiles<kTileKeys>(scores, of_queries, of_keys, step > 0);
      }
      commit_products();
    };
    const auto weigh_tile = [&](int tile) {
      if ((tile + 1) * kTileKeys > end_key - rows / a.group) {  // not all rows see all of these
#pragma unroll
        for (int i = 0; i < kTileKeys / 2; ++i) {
          const int key = tile * kTileKeys + i / 4 * 8 + 2 * t + i % 2;
          if (key >= visible[i / 2 % 2]) scores[i] = -INFINITY;
        }
      }
      weigh<kDim>(scores, a.scale, s, weights);
      previous = stage;
      if (++stage == L::kStages) {
        stage = 0;
        phase ^= 1;
      }
    };
    // Warpgroups take turns, so that the exponentials of one run beside the products of the others.
    const auto take_turn = [&] { sync_warps(kTurnBarrier + group, 2 * kGroupThreads); };
    const auto end_turn = [&](int tile) {
      if (tile + 1 < tiles || group + 1 < L::kGroups) arrive_warps(kTurnBarrier + next_group, 2 * kGroupThreads);
    };
    if (group + 1 == L::kGroups) arrive_warps(kTurnBarrier, 2 * kGroupThreads);

    wait_barrier(full, 0);
    take_turn();
    fence_products();
    multiply_keys();
    end_turn(0);
    wait_for_products<0>();
    weigh_tile(0);
    for (int tile = 1; tile < tiles; ++tile) {
      wait_barrier(full + stage, phase);
      take_turn();
      fence_products();
      add_values<kDim>(s, weights, memory + previous * L::kStageBytes + L::kBoxes * kBoxBytes);
      multiply_keys();
      end_turn(tile);
      wait_for_products<0>();
      if (lane == 0) arrive(empty + previous);
      if (tile % kTilesPerPart == 0) {
        merge_part<kDim>(s, tile == kTilesPerPart);
        begin_part();
      }
      weigh_tile(tile);
    }
    fence_products();
    add_values<kDim>(s, weights, memory + previous * L::kStageBytes + L::kBoxes * kBoxBytes);
    commit_products();
    wait_for_products<0>();
    merge_part<kDim>(s, tiles <= kTilesPerPart);

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 8 * half;
      if (row >= rows) continue;
      const int64_t y_row = segment.row + token + row / a.group;
      const int first_column = (kv_head * a.group + row % a.group) * dim;
      const float factor = 1.0f / s.merged_sums[half];
      if (a.rounded.data != nullptr) {
        uint16_t* to = a.rounded.data + y_row * a.rounded.stride + first_column;
#pragma unroll
        for (int j = 0; j < kDim / 8; ++j) {
          const int d = j * 8 + 2 * t;
          const float* pair = s.merged + 4 * j + 2 * half;
          if (d < dim) *reinterpret_cast<uint32_t*>(to + d) = round_pair(pair[0] * factor, pair[1] * factor);
        }
        continue;
      }
      float* to = a.y.row(y_row) + first_column;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int d = j * 8 + 2 * t + c;
          if (d < dim) to[d] = s.merged[4 * j + 2 * half + c] * factor;
        }
      }
    }
  }
#else
  __trap();  // nobody starts it: Gpu::has_hopper_code()
#endif
}

template <int kDim>
void start(const Gpu& gpu, const WgmmaAttention& a) {
  using L = Layout<kDim>;
  const int64_t blocks = blocks_for(a.segment.tokens, L::kRows / a.group);
  launch(gpu, attention_wgmma_kernel<kDim>,
         dim3(static_cast<unsigned>(a.segment.layer.kv_heads), static_cast<unsigned>(blocks)), L::kThreadCount,
         L::kShared, a);
}

}  // namespace

bool has_attention_wgmma(const Gpu& gpu, const KvSegmentView& segment, int heads, float scale) {
  const KvLayerView& layer = segment.layer;
  const int group = heads / layer.kv_heads;
  return gpu.has_hopper_code() && layer.kind == KvKind::kBF16 && layer.head_dim <= 128 && group <= 64 && scale > 0.0f &&
         segment.position + segment.tokens < (int64_t{1} << 30) &&
         // The keys' end is part of the tensor map, and a recording's is not known when that is made.
         segment.live_position == nullptr &&
         // Fewer blocks would leave the GPU idle, where attention_mma splits the keys.
         2 * blocks_for(segment.tokens * group, 128) * layer.kv_heads >= gpu.multiprocessors();
}

namespace {

void start_any(const Gpu& gpu, const KvSegmentView& segment, Rows q, int heads, float scale, Rows y,
               const RoundedRows& rounded) {
  const KvLayerView& layer = segment.layer;
  WgmmaAttention a;
  // Zeros from the end of the keys on, whatever lies there.
  const int64_t size[3] = {layer.row_bytes / 2, segment.position + segment.tokens, layer.kv_heads};
  const int64_t pitch[2] = {layer.row_bytes, layer.capacity * layer.row_bytes};
  const int box[3] = {64, kTileKeys, 1};
  a.keys = tensor_map(gpu, layer.keys, 3, size, pitch, box);
  a.values = tensor_map(gpu, layer.values, 3, size, pitch, box);
  a.segment = segment;
  a.q = q;
  a.y = y;
  a.rounded = rounded;
  a.group = heads / layer.kv_heads;
  a.scale = scale;
  if (layer.head_dim <= 64) return start<64>(gpu, a);
  start<128>(gpu, a);
}

}  // namespace

void attention_wgmma(const Gpu& gpu, const KvSegmentView& segment, Rows q, int heads, float scale, Rows y) {
  start_any(gpu, segment, q, heads, scale, y, {});
}

void attention_wgmma_rounded(const Gpu& gpu, const KvSegmentView& segment, Rows q, int heads, float scale,
                             RoundedRows y) {
  start_any(gpu, segment, q, heads, scale, {}, y);
}

}  // namespace llama_ext::cuda
