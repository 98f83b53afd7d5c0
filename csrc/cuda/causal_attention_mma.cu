// Attention of whole sequences for training, and its gradients, on the tensor cores: queries, keys, values, the output's gradient, and
// weights on their way to a product are rounded to bfloat16, sums and softmax are float32. As in FlashAttention-2: a block has 64
// queries of a head (for y and d_q) or 64 keys of a key/value head (for d_k and d_v, over the heads that share it, one after the
// other), a warp 16 of them, with its sums in registers; the other side passes through shared memory in two stages. Weights are made
// again from the saved log_sums. Three kernels and no atomics: two of them compute the scores' gradients, and every sum has
// one fixed order that depends on nothing but the sequence. Bound by the tensor cores and by shared memory.
#include "cuda/causal_ranges.h"
#include "cuda/fragments.h"
#include "ops/dropout.h"

namespace llama_ext::cuda {
namespace {

constexpr unsigned kBlockThreads = 128;
constexpr int kRows = 64;  // queries or keys of a block
constexpr int kKeys = 64;  // that pass by, for queries
constexpr int kStep = 16;  // of those, multiplied at once for gradients
constexpr float kLog2OfE = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

/// Rounded inputs, (M, heads, kDim) with zeros beyond head_dim, and what the gradients need.
struct Rounded {
  const uint16_t* q = nullptr;
  const uint16_t* k = nullptr;
  const uint16_t* v = nullptr;
  const uint16_t* d_y = nullptr;
  const float* deltas = nullptr;  // (M, H)
};

__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return exp2f(x);
#endif
}

template <int kDim>
__global__ void round_heads_kernel(Rows x, int heads, int head_dim, uint16_t* y) {
  constexpr int kVectors = kDim / 8;
  const float* from = x.row(blockIdx.x);
  auto* to = reinterpret_cast<uint4*>(y + int64_t{blockIdx.x} * heads * kDim);
  for (int i = static_cast<int>(threadIdx.x); i < heads * kVectors; i += static_cast<int>(blockDim.x)) {
    const int first = i % kVectors * 8;
    const float* head = from + i / kVectors * head_dim;
    float values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = first + j < head_dim ? head[first + j] : 0.0f;
    to[i] = {round_pair(values[0], values[1]), round_pair(values[2], values[3]), round_pair(values[4], values[5]),
             round_pair(values[6], values[7])};
  }
}

/// A warp for a head of a row: delta = d_y . y, of the rounded d_y, so that the scores' gradients of a row cancel.
template <int kDim>
__global__ void delta_kernel(const __grid_constant__ CausalView a, const uint16_t* d_y, float* deltas) {
  const int64_t row = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  for (int head = static_cast<int>(threadIdx.x / kWarp); head < a.heads;
       head += static_cast<int>(kBlockThreads / kWarp)) {
    float sum = 0.0f;
    for (int d = lane; d < a.head_dim; d += static_cast<int>(kWarp)) {
      sum = fmaf(from_bf16(d_y[(row * a.heads + head) * kDim + d]), a.y.row(row)[head * a.head_dim + d], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) deltas[row * a.heads + head] = sum;
  }
}

/// A block's sequence, and the first of its tokens there: at most 2^20 (ops/causal_attention.h).
struct Sequence {
  int64_t row;
  int tokens;
  int first;
};
__device__ __forceinline__ Sequence find_block(const Ranges& ranges, unsigned block) {
  int64_t first = block;
  const TokenRange& range = ranges.find_block(first, kRows);
  return {range.row, static_cast<int>(range.tokens), static_cast<int>(first)};
}

template <int kDim>
struct Tiles {
  static constexpr int kPitch = kDim + 8;
  static constexpr int kOutputs = kDim / 8;
  static constexpr int kTile = kRows * kPitch;
  // Queries that pass by, for keys: as many as shared memory holds for three blocks.
  static constexpr int kQueries = kDim <= 64 ? 64 : 32;
  static constexpr int kQueryTile = kQueries * kPitch;

  /// Starts to bring `kCount` tokens of a head; zeros from `tokens` on.
  template <int kCount>
  __device__ __forceinline__ static void bring(const uint16_t* from, int64_t row, int heads, int head, int first,
                                               int tokens, uint16_t* tile) {
    constexpr int kVectors = kDim / 8;
#pragma unroll 1  // addresses of all at once would take registers from the sums
    for (int i = static_cast<int>(threadIdx.x); i < kCount * kVectors; i += static_cast<int>(kBlockThreads)) {
      const int token = i / kVectors;
      const int vector = i % kVectors;
      const bool is_there = first + token < tokens;
      const int64_t at = (row + (is_there ? first + token : 0)) * heads + head;
      copy_async(tile + token * kPitch + vector * 8, from + at * kDim + vector * 8, is_there);
    }
  }
};

/// sums (16, 8 kProducts) = rows of a times rows of b, over kDim.
template <int kDim, int kProducts>
__device__ __forceinline__ void multiply_rows(float sums[kProducts][4], FragmentTile<kDim + 8> a, int row,
                                              FragmentTile<kDim + 8> b) {
#pragma unroll
  for (int j = 0; j < kProducts; ++j) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.0f;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t left[4];
    a.load_a(left, row, step * 16);
#pragma unroll
    for (int j = 0; j < kProducts; j += 2) {
      uint32_t right[4];
      b.load_b(right, j * 8, step * 16);
      mma<MmaType::kBF16>(sums[j], left, right);
      mma<MmaType::kBF16>(sums[j + 1], left, right + 2);
    }
  }
}

/// Operand A of 16 rows: kept in registers for heads of 64, read again from shared memory for longer ones.
template <int kDim>
struct KeptRows {
  static constexpr bool kIsKept = kDim <= 64;
  FragmentTile<kDim + 8> tile;
  int row;
  uint32_t words[kIsKept ? kDim / 16 : 1][4];

  __device__ __forceinline__ void load() {
    if constexpr (kIsKept) {
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) tile.load_a(words[step], row, step * 16);
    }
  }
  /// sums (16, 16) = these rows times rows [first, first + 16) of b.
  __device__ __forceinline__ void multiply(float sums[2][4], FragmentTile<kDim + 8> b, int first) {
#pragma unroll
    for (int j = 0; j < 2; ++j) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.0f;
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t right[4];
      b.load_b(right, first, step * 16);
      if constexpr (!kIsKept) tile.load_a(words[0], row, step * 16);
      const uint32_t* left = words[kIsKept ? step : 0];
      mma<MmaType::kBF16>(sums[0], left, right);
      mma<MmaType::kBF16>(sums[1], left, right + 2);
    }
  }
};

/// sums (16, kDim) += weights (16, 16), rounded, times rows [first, first + 16) of b.
template <int kDim>
__device__ __forceinline__ void add_weighted_rows(float sums[kDim / 8][4], const float weights[2][4],
                                                  FragmentTile<kDim + 8> b, int first) {
  uint32_t left[4];
  pack_a(left, weights[0], weights[1]);
#pragma unroll
  for (int j = 0; j < kDim / 8; j += 2) {
    uint32_t right[4];
    b.load_b_across(right, first, j * 8);
    mma<MmaType::kBF16>(sums[j], left, right);
    mma<MmaType::kBF16>(sums[j + 1], left, right + 2);
  }
}

/// sums (16, kDim) += weights (16, 8 kProducts), rounded, times the rows of b.
template <int kDim, int kProducts>
__device__ __forceinline__ void add_weighted(float sums[kDim / 8][4], const float weights[kProducts][4],
                                             FragmentTile<kDim + 8> b) {
#pragma unroll
  for (int step = 0; step < kProducts / 2; ++step) {
    uint32_t left[4];
    pack_a(left, weights[2 * step], weights[2 * step + 1]);
#pragma unroll
    for (int j = 0; j < kDim / 8; j += 2) {
      uint32_t right[4];
      b.load_b_across(right, step * 16, j * 8);
      mma<MmaType::kBF16>(sums[j], left, right);
      mma<MmaType::kBF16>(sums[j + 1], left, right + 2);
    }
  }
}

/// Which of a lane's weights dropout keeps, one bit for sums[j][c]: found in a loop of its own, as the registers are the sums'. index:
/// the weight's, of j and c.
template <int kProducts, typename Index>
__device__ __forceinline__ uint32_t kept_weights(const CausalView& a, const Index& index) {
  static_assert(4 * kProducts <= 32);
  if (a.threshold == 0) return 0xffffffffu;
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < 4 * kProducts; ++i) {
    kept |= static_cast<uint32_t>(dropout_bits(a.seed, index(i / 4, i % 4)) >= a.threshold) << i;
  }
  return kept;
}
__device__ __forceinline__ float drop(const CausalView& a, uint32_t kept, int j, int c, float weight) {
  return (kept >> (4 * j + c) & 1u) != 0 ? weight * a.kept_scale : 0.0f;
}
__device__ __forceinline__ uint64_t dropout_index(const CausalView& a, int64_t row, int head, int key) {
  return static_cast<uint64_t>((row * a.heads + head) * kDropoutPlaces + key);
}

/// A lane's part of 16 rows of a head: columns 2 t and 2 t + 1 of each product, of rows g and g + 8.
template <int kDim>
__device__ __forceinline__ void store_rows(Rows to, int64_t row, int first, int tokens, int head, int head_dim,
                                           const float sums[kDim / 8][4], const float factors[2]) {
  const int g = static_cast<int>(threadIdx.x % kWarp) / 4;
  const int t = static_cast<int>(threadIdx.x % kWarp) % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = first + 8 * half + g;
    if (token >= tokens) continue;
    float* out = to.row(row + token) + head * head_dim;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int d = j * 8 + 2 * t + c;
        if (d < head_dim) out[d] = sums[j][2 * half + c] * factors[half];
      }
    }
  }
}

template <int kDim>
__global__ void __launch_bounds__(kBlockThreads, 2)
    forward_kernel(const __grid_constant__ CausalView a, const __grid_constant__ Ranges ranges, const Rounded in) {
  using T = Tiles<kDim>;
  constexpr int kProducts = kKeys / 8;
  auto* q_tile = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* stages = q_tile + T::kTile;                                   // two of (keys, values)
  const Sequence range = find_block(ranges, gridDim.x - 1 - blockIdx.x);  // long ones come first
  const int first = range.first;
  const int head = static_cast<int>(blockIdx.y);
  const int kv_head = head / (a.heads / a.kv_heads);
  const int warp_row = static_cast<int>(threadIdx.x / kWarp) * 16;
  const int g = static_cast<int>(threadIdx.x % kWarp) / 4;
  const int t = static_cast<int>(threadIdx.x % kWarp) % 4;
  const auto bring = [&](int key, int stage) {
    uint16_t* keys = stages + 2 * stage * T::kTile;
    T::template bring<kKeys>(in.k, range.row, a.kv_heads, kv_head, key, range.tokens, keys);
    T::template bring<kKeys>(in.v, range.row, a.kv_heads, kv_head, key, range.tokens, keys + T::kTile);
    commit_copies();
  };
  T::template bring<kRows>(in.q, range.row, a.heads, head, first, range.tokens, q_tile);
  bring(0, 0);

  const float scale = a.scale * kLog2OfE;
  const int token = first + warp_row + g;  // and the one 8 further on
  float found[T::kOutputs][4] = {};
  float largest[2] = {-INFINITY, -INFINITY};
  float totals[2] = {};
  int stage = 0;
#pragma unroll 1
  for (int key = 0; key <= first; key += kKeys, stage ^= 1) {
    wait_for_copies<0>();
    __syncthreads();  // this stage is complete, and nobody reads the other one any more
    if (key + kKeys <= first) bring(key + kKeys, stage ^ 1);
    const uint16_t* keys = stages + 2 * stage * T::kTile;
    float scores[kProducts][4];
    multiply_rows<kDim, kProducts>(scores, {q_tile}, warp_row, {keys});
    const bool is_last = key == first;
    float top[2] = {largest[0], largest[1]};
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        scores[j][c] *= scale;
        if (is_last && key + j * 8 + 2 * t + c % 2 > token + c / 2 * 8) scores[j][c] = -INFINITY;
        top[c / 2] = fmaxf(top[c / 2], scores[j][c]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(kAllLanes, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(kAllLanes, top[half], 2));
      if (top[half] == -INFINITY) top[half] = 0.0f;  // scores beyond float32
      const float factor = power_of_two(largest[half] - top[half]);
      largest[half] = top[half];
      totals[half] *= factor;
#pragma unroll
      for (int j = 0; j < T::kOutputs; ++j) {
        found[j][2 * half] *= factor;
        found[j][2 * half + 1] *= factor;
      }
    }
    const uint32_t kept = kept_weights<kProducts>(a, [&](int j, int c) {
      return dropout_index(a, range.row + token + c / 2 * 8, head, key + j * 8 + 2 * t + c % 2);
    });
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float weight = power_of_two(scores[j][c] - largest[c / 2]);
        totals[c / 2] += weight;
        scores[j][c] = drop(a, kept, j, c, weight);
      }
    }
    add_weighted<kDim, kProducts>(found, scores, {keys + T::kTile});
  }
  float factors[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    totals[half] += __shfl_xor_sync(kAllLanes, totals[half], 1);
    totals[half] += __shfl_xor_sync(kAllLanes, totals[half], 2);
    factors[half] = 1.0f / totals[half];
    if (t == 0 && token + 8 * half < range.tokens) {
      a.log_sums[(range.row + token + 8 * half) * a.heads + head] = fmaf(largest[half], kLn2, logf(totals[half]));
    }
  }
  store_rows<kDim>(a.y, range.row, first + warp_row, range.tokens, head, a.head_dim, found, factors);
}

/// d_q of 64 queries of a head.
template <int kDim>
__global__ void __launch_bounds__(kBlockThreads, 2)
    d_q_kernel(const __grid_constant__ CausalView a, const __grid_constant__ Ranges ranges, const Rounded in) {
  using T = Tiles<kDim>;
  auto* q_tile = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* d_y_tile = q_tile + T::kTile;
  uint16_t* stages = d_y_tile + T::kTile;  // two of (keys, values)
  const Sequence range = find_block(ranges, gridDim.x - 1 - blockIdx.x);
  const int first = range.first;
  const int head = static_cast<int>(blockIdx.y);
  const int kv_head = head / (a.heads / a.kv_heads);
  const int warp_row = static_cast<int>(threadIdx.x / kWarp) * 16;
  const int g = static_cast<int>(threadIdx.x % kWarp) / 4;
  const int t = static_cast<int>(threadIdx.x % kWarp) % 4;
  const auto bring = [&](int key, int stage) {
    uint16_t* keys = stages + 2 * stage * T::kTile;
    T::template bring<kKeys>(in.k, range.row, a.kv_heads, kv_head, key, range.tokens, keys);
    T::template bring<kKeys>(in.v, range.row, a.kv_heads, kv_head, key, range.tokens, keys + T::kTile);
    commit_copies();
  };
  T::template bring<kRows>(in.q, range.row, a.heads, head, first, range.tokens, q_tile);
  T::template bring<kRows>(in.d_y, range.row, a.heads, head, first, range.tokens, d_y_tile);
  bring(0, 0);

  const float scale = a.scale * kLog2OfE;
  const int token = first + warp_row + g;
  float log_sums[2];
  float deltas[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool is_there = token + 8 * half < range.tokens;
    const int64_t at = (range.row + (is_there ? token + 8 * half : 0)) * a.heads + head;
    log_sums[half] = a.log_sums[at] * kLog2OfE;
    deltas[half] = in.deltas[at];
  }
  KeptRows<kDim> queries{{q_tile}, warp_row, {}};
  KeptRows<kDim> d_ys{{d_y_tile}, warp_row, {}};
  float sums[T::kOutputs][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int key = 0; key <= first; key += kKeys, stage ^= 1) {
    wait_for_copies<0>();
    __syncthreads();
    if (key + kKeys <= first) bring(key + kKeys, stage ^ 1);
    if (key == 0) {
      queries.load();
      d_ys.load();
    }
    const uint16_t* keys = stages + 2 * stage * T::kTile;
    // On the diagonal a warp's rows see no key behind them.
    const int end = key == first ? warp_row + kStep : kKeys;
#pragma unroll 1
    for (int step = 0; step < end; step += kStep) {
      float scores[2][4];
      float slopes[2][4];
      queries.multiply(scores, {keys}, step);
      d_ys.multiply(slopes, {keys + T::kTile}, step);
      const uint32_t kept = kept_weights<2>(a, [&](int j, int c) {
        return dropout_index(a, range.row + token + c / 2 * 8, head, key + step + j * 8 + 2 * t + c % 2);
      });
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int at = key + step + j * 8 + 2 * t + c % 2;
          const float weight = power_of_two(fmaf(scores[j][c], scale, -log_sums[c / 2]));
          const float slope = drop(a, kept, j, c, slopes[j][c]) - deltas[c / 2];
          slopes[j][c] = at > token + c / 2 * 8 ? 0.0f : weight * slope;
        }
      }
      add_weighted_rows<kDim>(sums, slopes, {keys}, step);
    }
  }
  const float factors[2] = {a.scale, a.scale};
  store_rows<kDim>(a.d_q, range.row, first + warp_row, range.tokens, head, a.head_dim, sums, factors);
}

/// d_k and d_v of 64 keys of a key/value head. Everything is transposed: rows are keys, columns are queries.
template <int kDim>
__global__ void __launch_bounds__(kBlockThreads, 2)
    d_kv_kernel(const __grid_constant__ CausalView a, const __grid_constant__ Ranges ranges, const Rounded in) {
  using T = Tiles<kDim>;
  auto* k_tile = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* v_tile = k_tile + T::kTile;
  uint16_t* stages = v_tile + T::kTile;                                  // two of (queries, d_y)
  auto* numbers = reinterpret_cast<float*>(stages + 4 * T::kQueryTile);  // two of (log_sums, deltas)
  const Sequence range = find_block(ranges, blockIdx.x);
  const int first = range.first;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int group = a.heads / a.kv_heads;
  const int warp_row = static_cast<int>(threadIdx.x / kWarp) * 16;
  const int g = static_cast<int>(threadIdx.x % kWarp) / 4;
  const int t = static_cast<int>(threadIdx.x % kWarp) % 4;
  const int per_head = (range.tokens - first + T::kQueries - 1) / T::kQueries;
  const auto bring = [&](int index, int stage) {
    const int head = kv_head * group + index / per_head;
    const int query = first + index % per_head * T::kQueries;
    uint16_t* queries = stages + 2 * stage * T::kQueryTile;
    T::template bring<T::kQueries>(in.q, range.row, a.heads, head, query, range.tokens, queries);
    T::template bring<T::kQueries>(in.d_y, range.row, a.heads, head, query, range.tokens, queries + T::kQueryTile);
    commit_copies();
    for (int i = static_cast<int>(threadIdx.x); i < T::kQueries; i += static_cast<int>(kBlockThreads)) {
      const bool is_there = query + i < range.tokens;
      const int64_t at = (range.row + (is_there ? query + i : 0)) * a.heads + head;
      float* to = numbers + 2 * stage * T::kQueries + i;
      to[0] = a.log_sums[at] * kLog2OfE;
      to[T::kQueries] = in.deltas[at];
    }
  };
  T::template bring<kRows>(in.k, range.row, a.kv_heads, kv_head, first, range.tokens, k_tile);
  T::template bring<kRows>(in.v, range.row, a.kv_heads, kv_head, first, range.tokens, v_tile);
  bring(0, 0);

  const float scale = a.scale * kLog2OfE;
  const int token = first + warp_row + g;  // the key
  KeptRows<kDim> own_keys{{k_tile}, warp_row, {}};
  KeptRows<kDim> own_values{{v_tile}, warp_row, {}};
  float k_sums[T::kOutputs][4] = {};
  float v_sums[T::kOutputs][4] = {};
  const int count = group * per_head;
  int stage = 0;
#pragma unroll 1
  for (int index = 0; index < count; ++index, stage ^= 1) {
    wait_for_copies<0>();
    __syncthreads();
    if (index + 1 < count) bring(index + 1, stage ^ 1);
    const int head = kv_head * group + index / per_head;
    const int query = first + index % per_head * T::kQueries;
    const uint16_t* queries = stages + 2 * stage * T::kQueryTile;
    const float* log_sums = numbers + 2 * stage * T::kQueries;
    if (index == 0) {
      own_keys.load();
      own_values.load();
    }
    // On the diagonal nobody before a warp's keys sees them; queries end with the sequence.
    const int begin = query <= first + warp_row ? (first + warp_row - query) / kStep * kStep : 0;
    const int end = query + T::kQueries <= range.tokens ? T::kQueries : range.tokens - query;
#pragma unroll 1
    for (int step = begin; step < end; step += kStep) {
      float weights[2][4];
      float slopes[2][4];
      own_keys.multiply(weights, {queries}, step);
      own_values.multiply(slopes, {queries + T::kQueryTile}, step);
      const uint32_t kept = kept_weights<2>(a, [&](int j, int c) {
        return dropout_index(a, range.row + query + step + j * 8 + 2 * t + c % 2, head, token + c / 2 * 8);
      });
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int column = step + j * 8 + 2 * t + c % 2;
          const bool is_hidden = token + c / 2 * 8 > query + column || query + column >= range.tokens;
          const float weight = power_of_two(fmaf(weights[j][c], scale, -log_sums[column]));
          const float slope = weight * (drop(a, kept, j, c, slopes[j][c]) - log_sums[T::kQueries + column]);
          weights[j][c] = is_hidden ? 0.0f : drop(a, kept, j, c, weight);
          slopes[j][c] = is_hidden ? 0.0f : slope;
        }
      }
      add_weighted_rows<kDim>(v_sums, weights, {queries + T::kQueryTile}, step);
      add_weighted_rows<kDim>(k_sums, slopes, {queries}, step);
    }
  }
  const float ones[2] = {1.0f, 1.0f};
  const float factors[2] = {a.scale, a.scale};
  store_rows<kDim>(a.d_k, range.row, first + warp_row, range.tokens, kv_head, a.head_dim, k_sums, factors);
  store_rows<kDim>(a.d_v, range.row, first + warp_row, range.tokens, kv_head, a.head_dim, v_sums, ones);
}

/// Memory for rounded tensors of M rows, and the kernels that fill it.
template <int kDim>
struct RoundedHeads {
  Scratch memory;

  RoundedHeads(const Gpu& gpu, Rows x, int64_t rows, int heads, int head_dim)
      : memory(gpu, static_cast<size_t>(rows * heads * kDim) * sizeof(uint16_t)) {
    launch(gpu, round_heads_kernel<kDim>, dim3(static_cast<unsigned>(rows)), kThreads, 0, x, heads, head_dim,
           memory.as<uint16_t>());
  }
  const uint16_t* data() const { return memory.as<uint16_t>(); }
};

dim3 grid_of(const Ranges& list, int heads) {
  return dim3(static_cast<unsigned>(list.blocks(kRows)), static_cast<unsigned>(heads));
}

template <int kDim>
void forward(const Gpu& gpu, const CausalView& a, const TokenRange* ranges, int64_t count, int64_t rows) {
  using T = Tiles<kDim>;
  const RoundedHeads<kDim> q(gpu, a.q, rows, a.heads, a.head_dim);
  const RoundedHeads<kDim> k(gpu, a.k, rows, a.kv_heads, a.head_dim);
  const RoundedHeads<kDim> v(gpu, a.v, rows, a.kv_heads, a.head_dim);
  const Rounded in{q.data(), k.data(), v.data()};
  for_each_list(ranges, count, [&](const Ranges& list) {
    launch(gpu, forward_kernel<kDim>, grid_of(list, a.heads), kBlockThreads, 5 * T::kTile * sizeof(uint16_t), a, list,
           in);
  });
}

template <int kDim>
void backward(const Gpu& gpu, const CausalView& a, const TokenRange* ranges, int64_t count, int64_t rows) {
  using T = Tiles<kDim>;
  const RoundedHeads<kDim> q(gpu, a.q, rows, a.heads, a.head_dim);
  const RoundedHeads<kDim> k(gpu, a.k, rows, a.kv_heads, a.head_dim);
  const RoundedHeads<kDim> v(gpu, a.v, rows, a.kv_heads, a.head_dim);
  const RoundedHeads<kDim> d_y(gpu, a.d_y, rows, a.heads, a.head_dim);
  const Scratch deltas(gpu, static_cast<size_t>(rows * a.heads) * sizeof(float));
  launch(gpu, delta_kernel<kDim>, dim3(static_cast<unsigned>(rows)), kBlockThreads, 0, a, d_y.data(),
         deltas.as<float>());
  const Rounded in{q.data(), k.data(), v.data(), d_y.data(), deltas.as<float>()};
  for_each_list(ranges, count, [&](const Ranges& list) {
    launch(gpu, d_q_kernel<kDim>, grid_of(list, a.heads), kBlockThreads, 6 * T::kTile * sizeof(uint16_t), a, list, in);
    launch(gpu, d_kv_kernel<kDim>, grid_of(list, a.kv_heads), kBlockThreads,
           (2 * T::kTile + 4 * T::kQueryTile) * sizeof(uint16_t) + 4 * T::kQueries * sizeof(float), a, list, in);
  });
}

}  // namespace

bool has_causal_attention_mma(int heads, int head_dim) { return heads > 0 && head_dim > 0 && head_dim <= 128; }

void causal_attention_mma(const Gpu& gpu, const CausalView& a, const TokenRange* ranges, int64_t count, int64_t rows) {
  a.head_dim <= 64 ? forward<64>(gpu, a, ranges, count, rows) : forward<128>(gpu, a, ranges, count, rows);
}

void causal_attention_backward_mma(const Gpu& gpu, const CausalView& a, const TokenRange* ranges, int64_t count,
                                   int64_t rows) {
  a.head_dim <= 64 ? backward<64>(gpu, a, ranges, count, rows) : backward<128>(gpu, a, ranges, count, rows);
}

}  // namespace llama_ext::cuda
