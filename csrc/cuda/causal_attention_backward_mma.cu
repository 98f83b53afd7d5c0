// Gradients of attention on the tensor cores (causal_attention_mma.cu): weights are made again from the saved log_sums and go into the next
// product from registers. d_q has a block for 64 queries, d_k and d_v one for 64 keys, through
// the heads that share them; both compute the scores' gradients, so that there are no atomics and every sum has one order. The
// other side passes through shared memory in two stages. Bound by shared memory, and by the tensor cores.
#include "cuda/causal_tiles.h"

namespace llama_ext::cuda {
namespace {

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

/// d_q of 64 queries of a head. kKeys pass by at a time, 64 or 32: the bits are the same, as each product takes 16.
template <int kDim, int kKeys>
__global__ void __launch_bounds__(kBlockThreads, 2)
    d_q_kernel(const __grid_constant__ CausalView a, const __grid_constant__ Ranges ranges, const Rounded in) {
  using T = Tiles<kDim>;
  constexpr int kProducts = kKeys / 8;
  auto* q_tile = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* d_y_tile = q_tile + T::kTile;
  constexpr int kKeyTile = kKeys * T::kPitch;
  uint16_t* stages = d_y_tile + T::kTile;  // two of (keys, values)
  const Sequence range = find_block(ranges, gridDim.x - 1 - blockIdx.x);
  const int first = range.first;
  const int head = static_cast<int>(blockIdx.y);
  const int kv_head = head / (a.heads / a.kv_heads);
  const int warp_row = static_cast<int>(threadIdx.x / kWarp) * 16;
  const int g = static_cast<int>(threadIdx.x % kWarp) / 4;
  const int t = static_cast<int>(threadIdx.x % kWarp) % 4;
  const auto bring = [&](int key, int stage) {
    uint16_t* keys = stages + 2 * stage * kKeyTile;
    T::template bring<kKeys>(in.k, range.row, a.kv_heads, kv_head, key, range.tokens, keys);
    T::template bring<kKeys>(in.v, range.row, a.kv_heads, kv_head, key, range.tokens, keys + kKeyTile);
    commit_copies();
  };
  T::template bring<kBlockRows>(in.q, range.row, a.heads, head, first, range.tokens, q_tile);
  T::template bring<kBlockRows>(in.d_y, range.row, a.heads, head, first, range.tokens, d_y_tile);
  bring(0, 0);

  const float scale = a.scale * kLog2E;
  const int token = first + warp_row + g;
  float log_sums[2];
  float deltas[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool is_there = token + 8 * half < range.tokens;
    const int64_t at = (range.row + (is_there ? token + 8 * half : 0)) * a.heads + head;
    log_sums[half] = a.log_sums[at] * kLog2E;
    deltas[half] = in.deltas[at];
  }
  float sums[T::kOutputs][4] = {};
  const int end = first + kBlockRows;
  int stage = 0;
#pragma unroll 1
  for (int key = 0; key < end; key += kKeys, stage ^= 1) {
    wait_for_copies<0>();
    __syncthreads();
    if (key + kKeys < end) bring(key + kKeys, stage ^ 1);
    const uint16_t* keys = stages + 2 * stage * kKeyTile;
    float scores[kProducts][4];
    float slopes[kProducts][4];
    multiply_rows<kDim, kProducts>(scores, {q_tile}, warp_row, {keys});
    multiply_rows<kDim, kProducts>(slopes, {d_y_tile}, warp_row, {keys + kKeyTile});
    const bool is_last = key >= first;
    const uint32_t kept = kept_weights<kProducts>(a, [&](int j, int c) {
      return dropout_index(a, range.row + token + c / 2 * 8, head, key + j * 8 + 2 * t + c % 2);
    });
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int at = key + j * 8 + 2 * t + c % 2;
        const float weight = fast_exp2(fmaf(scores[j][c], scale, -log_sums[c / 2]));
        const float slope = drop(a, kept, j, c, slopes[j][c]) - deltas[c / 2];
        slopes[j][c] = is_last && at > token + c / 2 * 8 ? 0.0f : weight * slope;
      }
    }
    add_weighted<kDim, kProducts>(sums, slopes, {keys});
  }
  const float factors[2] = {a.scale, a.scale};
  store_rows<kDim>(a.d_q, range.row, first + warp_row, range.tokens, head, a.head_dim, sums, factors);
}

/// d_k and d_v of 64 keys of a key/value head. Everything is transposed: rows are keys, columns are queries.
template <int kDim>
__global__ void __launch_bounds__(kBlockThreads, 2)
    d_kv_kernel(const __grid_constant__ CausalView a, const __grid_constant__ Ranges ranges, const Rounded in) {
  using T = Tiles<kDim>;
  constexpr int kProducts = T::kQueries / 8;
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
      to[0] = a.log_sums[at] * kLog2E;
      to[T::kQueries] = in.deltas[at];
    }
  };
  T::template bring<kBlockRows>(in.k, range.row, a.kv_heads, kv_head, first, range.tokens, k_tile);
  T::template bring<kBlockRows>(in.v, range.row, a.kv_heads, kv_head, first, range.tokens, v_tile);
  bring(0, 0);

  const float scale = a.scale * kLog2E;
  const int token = first + warp_row + g;  // the key
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
    const bool is_masked = query < first + kBlockRows || query + T::kQueries > range.tokens;
    float weights[kProducts][4];
    float slopes[kProducts][4];
    multiply_rows<kDim, kProducts>(weights, {k_tile}, warp_row, {queries});
    multiply_rows<kDim, kProducts>(slopes, {v_tile}, warp_row, {queries + T::kQueryTile});
    const uint32_t kept = kept_weights<kProducts>(a, [&](int j, int c) {
      return dropout_index(a, range.row + query + j * 8 + 2 * t + c % 2, head, token + c / 2 * 8);
    });
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = j * 8 + 2 * t + c % 2;
        const bool is_hidden = is_masked && (token + c / 2 * 8 > query + column || query + column >= range.tokens);
        const float weight = fast_exp2(fmaf(weights[j][c], scale, -log_sums[column]));
        const float slope = weight * (drop(a, kept, j, c, slopes[j][c]) - log_sums[T::kQueries + column]);
        weights[j][c] = is_hidden ? 0.0f : drop(a, kept, j, c, weight);
        slopes[j][c] = is_hidden ? 0.0f : slope;
      }
    }
    add_weighted<kDim, kProducts>(v_sums, weights, {queries + T::kQueryTile});
    add_weighted<kDim, kProducts>(k_sums, slopes, {queries});
  }
  const float ones[2] = {1.0f, 1.0f};
  const float factors[2] = {a.scale, a.scale};
  store_rows<kDim>(a.d_k, range.row, first + warp_row, range.tokens, kv_head, a.head_dim, k_sums, factors);
  store_rows<kDim>(a.d_v, range.row, first + warp_row, range.tokens, kv_head, a.head_dim, v_sums, ones);
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
  const auto shared_for = [](int keys) { return size_t{2} * (T::kTile + 2 * keys * T::kPitch) * sizeof(uint16_t); };
  // Consumer cards have 99 KB, which wide heads' 64 keys exceed.
  const bool has_room = shared_for(64) <= gpu.shared_bytes_per_block();
  const auto d_q = has_room ? d_q_kernel<kDim, 64> : d_q_kernel<kDim, 32>;
  for_each_list(ranges, count, [&](const Ranges& list) {
    launch(gpu, d_q, grid_of(list, a.heads), kBlockThreads, shared_for(has_room ? 64 : 32), a, list, in);
    launch(gpu, d_kv_kernel<kDim>, grid_of(list, a.kv_heads), kBlockThreads,
           (2 * T::kTile + 4 * T::kQueryTile) * sizeof(uint16_t) + 4 * T::kQueries * sizeof(float), a, list, in);
  });
}

}  // namespace

void causal_attention_backward_mma(const Gpu& gpu, const CausalView& a, const TokenRange* ranges, int64_t count,
                                   int64_t rows) {
  a.head_dim <= 64 ? backward<64>(gpu, a, ranges, count, rows) : backward<128>(gpu, a, ranges, count, rows);
}

}  // namespace llama_ext::cuda
