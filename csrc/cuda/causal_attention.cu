// Attention of whole sequences for training, and its gradients, in float32. A block has a head of a token: of the queries for y
// and d_q, of the keys for d_k and d_v, which go through the heads that share them. It meets the other side 128 tokens at a time:
// first a thread has one of those tokens, then one dimension of the sums. Simple and in a fixed order, not fast: bound by the cache.
#include "cuda/causal_ranges.h"
#include "cuda/numeric.h"
#include "ops/dropout.h"

namespace llama_ext::cuda {
namespace {

constexpr int kTokens = 128;  // met at a time, and threads of a block

/// Numbers that a row of a head has in shared memory: the compiler reads its last ones as 16 bytes, which must not be others' business.
__host__ __device__ constexpr int row_pitch(int dim) { return (dim + 3) / 4 * 4; }

/// A weight after dropout, of a query's row and a key's token.
__device__ __forceinline__ float dropped(const CausalView& a, int64_t row, int head, int64_t key, float weight) {
  if (a.threshold == 0) return weight;
  const uint64_t index = static_cast<uint64_t>((row * a.heads + head) * kDropoutPlaces + key);
  return dropout_bits(a.seed, index) >= a.threshold ? weight * a.kept_scale : 0.0f;
}

__device__ __forceinline__ float dot(const float* a, const float* b, int size) {
  float sum = 0.0f;
  for (int d = 0; d < size; ++d) sum = fmaf(a[d], b[d], sum);
  return sum;
}

__global__ void forward_kernel(const __grid_constant__ CausalView a, const __grid_constant__ Ranges ranges) {
  auto* query = reinterpret_cast<float*>(shared_memory());  // (dim)
  float* sums = query + row_pitch(a.head_dim);              // (dim)
  float* weights = sums + row_pitch(a.head_dim);            // (kTokens)
  float* place = weights + kTokens;
  int64_t token = blockIdx.x;
  const TokenRange& range = ranges.find(token);
  const int64_t row = range.row + token;
  const int head = static_cast<int>(blockIdx.y);
  const int dim = a.head_dim;
  const int kv = head / (a.heads / a.kv_heads) * dim;
  const int thread = static_cast<int>(threadIdx.x);
  for (int d = thread; d < dim; d += kTokens) {
    query[d] = a.q.row(row)[head * dim + d];
    sums[d] = 0.0f;
  }
  __syncthreads();
  float largest = -INFINITY;
  float total = 0.0f;
  for (int64_t first = 0; first <= token; first += kTokens) {
    const int64_t key = first + thread;
    const float score = key <= token ? a.scale * dot(query, a.k.row(range.row + key) + kv, dim) : -INFINITY;
    const float top = max_or_nan(largest, block_max(score, place));
    const float weight = key <= token ? expf(score - top) : 0.0f;
    const float old = expf(largest - top);
    total = fmaf(total, old, block_sum(weight, place));
    weights[thread] = key <= token ? dropped(a, row, head, key, weight) : 0.0f;
    largest = top;
    __syncthreads();
    const int keys = static_cast<int>(token + 1 - first < kTokens ? token + 1 - first : kTokens);
    for (int d = thread; d < dim; d += kTokens) {
      float found = 0.0f;
      for (int i = 0; i < keys; ++i) found = fmaf(weights[i], a.v.row(range.row + first + i)[kv + d], found);
      sums[d] = fmaf(sums[d], old, found);
    }
    __syncthreads();
  }
  for (int d = thread; d < dim; d += kTokens) a.y.row(row)[head * dim + d] = sums[d] / total;
  if (thread == 0) a.log_sums[row * a.heads + head] = largest + logf(total);
}

/// delta = d_y . y of each head of a token: (M, H).
__global__ void delta_kernel(const __grid_constant__ CausalView a, const __grid_constant__ Ranges ranges,
                             float* deltas) {
  auto* place = reinterpret_cast<float*>(shared_memory());
  int64_t token = blockIdx.x;
  const TokenRange& range = ranges.find(token);
  const int64_t row = range.row + token;
  const int head = static_cast<int>(blockIdx.y);
  float sum = 0.0f;
  for (int d = static_cast<int>(threadIdx.x); d < a.head_dim; d += kTokens) {
    sum = fmaf(a.d_y.row(row)[head * a.head_dim + d], a.y.row(row)[head * a.head_dim + d], sum);
  }
  sum = block_sum(sum, place);
  if (threadIdx.x == 0) deltas[row * a.heads + head] = sum;
}

struct Slope {
  float weight;  // after dropout
  float score;   // d of the score
};
/// Of query token i (row, head) and key token j, whose rows are given.
__device__ __forceinline__ Slope slope(const CausalView& a, int64_t row, int head, int64_t key, const float* q,
                                       const float* k, const float* d_y, const float* v, float delta) {
  const float p = expf(a.scale * dot(q, k, a.head_dim) - a.log_sums[row * a.heads + head]);
  return {dropped(a, row, head, key, p), p * (dropped(a, row, head, key, dot(d_y, v, a.head_dim)) - delta)};
}

__global__ void d_q_kernel(const __grid_constant__ CausalView a, const __grid_constant__ Ranges ranges,
                           const float* deltas, float* d_q) {
  auto* query = reinterpret_cast<float*>(shared_memory());
  float* d_y = query + row_pitch(a.head_dim);
  float* slopes = d_y + row_pitch(a.head_dim);  // (kTokens)
  int64_t token = blockIdx.x;
  const TokenRange& range = ranges.find(token);
  const int64_t row = range.row + token;
  const int head = static_cast<int>(blockIdx.y);
  const int dim = a.head_dim;
  const int kv = head / (a.heads / a.kv_heads) * dim;
  const int thread = static_cast<int>(threadIdx.x);
  float* to = d_q + (row * a.heads + head) * dim;
  for (int d = thread; d < dim; d += kTokens) {
    query[d] = a.q.row(row)[head * dim + d];
    d_y[d] = a.d_y.row(row)[head * dim + d];
    to[d] = 0.0f;
  }
  const float delta = deltas[row * a.heads + head];
  for (int64_t first = 0; first <= token; first += kTokens) {
    __syncthreads();
    const int64_t key = first + thread;
    if (key <= token) {
      const int64_t key_row = range.row + key;
      slopes[thread] = slope(a, row, head, key, query, a.k.row(key_row) + kv, d_y, a.v.row(key_row) + kv, delta).score;
    }
    __syncthreads();
    const int keys = static_cast<int>(token + 1 - first < kTokens ? token + 1 - first : kTokens);
    for (int d = thread; d < dim; d += kTokens) {
      float sum = to[d];
      for (int i = 0; i < keys; ++i) sum = fmaf(a.scale * slopes[i], a.k.row(range.row + first + i)[kv + d], sum);
      to[d] = sum;
    }
  }
}

__global__ void d_kv_kernel(const __grid_constant__ CausalView a, const __grid_constant__ Ranges ranges,
                            const float* deltas, float* d_k, float* d_v) {
  auto* key = reinterpret_cast<float*>(shared_memory());
  float* value = key + row_pitch(a.head_dim);
  float* slopes = value + row_pitch(a.head_dim);  // (kTokens)
  float* weights = slopes + kTokens;              // (kTokens)
  int64_t token = blockIdx.x;
  const TokenRange& range = ranges.find(token);
  const int64_t row = range.row + token;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int dim = a.head_dim;
  const int group = a.heads / a.kv_heads;
  const int thread = static_cast<int>(threadIdx.x);
  float* to_k = d_k + (row * a.kv_heads + kv_head) * dim;
  float* to_v = d_v + (row * a.kv_heads + kv_head) * dim;
  for (int d = thread; d < dim; d += kTokens) {
    key[d] = a.k.row(row)[kv_head * dim + d];
    value[d] = a.v.row(row)[kv_head * dim + d];
    to_k[d] = 0.0f;
    to_v[d] = 0.0f;
  }
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t first = token; first < range.tokens; first += kTokens) {
      __syncthreads();
      const int64_t query = first + thread;
      if (query < range.tokens) {
        const int64_t query_row = range.row + query;
        const Slope found = slope(a, query_row, head, token, a.q.row(query_row) + head * dim, key,
                                  a.d_y.row(query_row) + head * dim, value, deltas[query_row * a.heads + head]);
        slopes[thread] = found.score;
        weights[thread] = found.weight;
      }
      __syncthreads();
      const int queries = static_cast<int>(range.tokens - first < kTokens ? range.tokens - first : kTokens);
      for (int d = thread; d < dim; d += kTokens) {
        float sum_k = to_k[d];
        float sum_v = to_v[d];
        for (int i = 0; i < queries; ++i) {
          const int64_t query_row = range.row + first + i;
          sum_k = fmaf(a.scale * slopes[i], a.q.row(query_row)[head * dim + d], sum_k);
          sum_v = fmaf(weights[i], a.d_y.row(query_row)[head * dim + d], sum_v);
        }
        to_k[d] = sum_k;
        to_v[d] = sum_v;
      }
    }
  }
}

/// From memory of their own to where the gradients belong, which may be where q, k and v were read.
__global__ void copy_kernel(const __grid_constant__ Ranges ranges, const float* from, int width, Rows to) {
  int64_t token = blockIdx.x;
  const TokenRange& range = ranges.find(token);
  const int64_t row = range.row + token;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += kTokens) to.row(row)[i] = from[row * width + i];
}

}  // namespace

void causal_attention(const Gpu& gpu, const CausalView& a, const TokenRange* ranges, int64_t count) {
  const size_t floats = static_cast<size_t>(2 * row_pitch(a.head_dim) + kTokens) + kWarp;
  for_each_list(ranges, count, [&](const Ranges& list) {
    launch(gpu, forward_kernel, dim3(static_cast<unsigned>(list.tokens), static_cast<unsigned>(a.heads)), kTokens,
           floats * sizeof(float), a, list);
  });
}

void causal_attention_backward(const Gpu& gpu, const CausalView& a, const TokenRange* ranges, int64_t count,
                               int64_t rows) {
  const int64_t q_width = int64_t{a.heads} * a.head_dim;
  const int64_t kv_width = int64_t{a.kv_heads} * a.head_dim;
  const Scratch memory(gpu, static_cast<size_t>(rows * (a.heads + q_width + 2 * kv_width)) * sizeof(float));
  auto* deltas = memory.as<float>();
  float* d_q = deltas + rows * a.heads;
  float* d_k = d_q + rows * q_width;
  float* d_v = d_k + rows * kv_width;
  const size_t shared = static_cast<size_t>(2 * row_pitch(a.head_dim) + 2 * kTokens) * sizeof(float);
  for_each_list(ranges, count, [&](const Ranges& list) {
    const auto grid = [&](int heads) { return dim3(static_cast<unsigned>(list.tokens), static_cast<unsigned>(heads)); };
    launch(gpu, delta_kernel, grid(a.heads), kTokens, kWarp * sizeof(float), a, list, deltas);
    launch(gpu, d_q_kernel, grid(a.heads), kTokens, shared, a, list, deltas, d_q);
    launch(gpu, d_kv_kernel, grid(a.kv_heads), kTokens, shared, a, list, deltas, d_k, d_v);
    launch(gpu, copy_kernel, grid(1), kTokens, 0, list, d_q, static_cast<int>(q_width), a.d_q);
    launch(gpu, copy_kernel, grid(1), kTokens, 0, list, d_k, static_cast<int>(kv_width), a.d_k);
    launch(gpu, copy_kernel, grid(1), kTokens, 0, list, d_v, static_cast<int>(kv_width), a.d_v);
  });
}

}  // namespace llama_ext::cuda
