// Attention of whole sequences for training on the tensor cores: queries, keys, values, and weights on their way to a product are
// rounded to bfloat16, sums and softmax are float32. As in FlashAttention-2: a block has 64 queries of a head, a warp 16 of them, with
// its sums in registers; keys and values pass through shared memory 64 at a time in two stages. The order of a sum depends
// on nothing but the sequence. Bound by the tensor cores and by shared memory.
#include "cuda/causal_tiles.h"

namespace llama_ext::cuda {
namespace {

constexpr int kKeys = 64;  // that pass by
constexpr float kLn2 = 0.6931471805599453f;

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
  T::template bring<kBlockRows>(in.q, range.row, a.heads, head, first, range.tokens, q_tile);
  bring(0, 0);

  const float scale = a.scale * kLog2E;
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
      const float factor = fast_exp2(largest[half] - top[half]);
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
        const float weight = fast_exp2(scores[j][c] - largest[c / 2]);
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

}  // namespace

void round_heads(const Gpu& gpu, Rows x, int64_t rows, int heads, int head_dim, int padded, uint16_t* y) {
  const auto kernel = padded == 64 ? round_heads_kernel<64> : round_heads_kernel<128>;
  launch(gpu, kernel, dim3(static_cast<unsigned>(rows)), kThreads, 0, x, heads, head_dim, y);
}

bool has_causal_attention_mma(int heads, int head_dim) { return heads > 0 && head_dim > 0 && head_dim <= 128; }

void causal_attention_mma(const Gpu& gpu, const CausalView& a, const TokenRange* ranges, int64_t count, int64_t rows) {
  a.head_dim <= 64 ? forward<64>(gpu, a, ranges, count, rows) : forward<128>(gpu, a, ranges, count, rows);
}

}  // namespace llama_ext::cuda
