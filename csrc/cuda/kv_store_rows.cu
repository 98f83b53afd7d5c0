// Keys and values of many tokens into the cache, as kv_cache.cu stores them: a warp for a head of a token, so that nobody waits for
// a block. Queries, keys and values are met once: rotated, rounded and stored. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/numeric.h"
#include "cuda/rotation.h"
#include "cuda/segments.h"

namespace llama_ext::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;

/// One head of a token to one row of the cache, by a warp.
__device__ __forceinline__ void store_row(const float* from, int head_dim, KvKind kind, unsigned char* to,
                                          float* scale) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  constexpr int kStep = static_cast<int>(kWarp);
  if (kind == KvKind::kF32) {
    for (int d = lane; d < head_dim; d += kStep) reinterpret_cast<float*>(to)[d] = from[d];
  } else if (kind == KvKind::kBF16) {
    for (int d = lane; d < head_dim; d += kStep) reinterpret_cast<uint16_t*>(to)[d] = to_bf16(from[d]);
  } else {
    float largest = 0.0f;
    for (int d = lane; d < head_dim; d += kStep) largest = max_or_nan(largest, fabsf(from[d]));
    const float found = kv_scale(warp_max(largest));
    const float inverse = found > 0.0f ? 1.0f / found : 0.0f;
    for (int d = lane; d < head_dim; d += kStep) {
      reinterpret_cast<signed char*>(to)[d] =
          found > 0.0f ? static_cast<signed char>(kv_code(from[d], inverse)) : static_cast<signed char>(0);
    }
    if (lane == 0) *scale = found;
  }
}

__global__ void kv_store_rows_kernel(const __grid_constant__ SegmentList segments, KvRowsView rows, int heads) {
  const int64_t number = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  int64_t token = number / heads;
  if (token >= segments.tokens) return;
  const int head = static_cast<int>(number % heads);
  const KvSegmentView& segment = segments.find(token);
  const KvLayerView& layer = segment.layer;
  const int64_t row = segment.row + token;
  const int64_t position = segment.first_position() + token;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int half = layer.head_dim / 2;
  const bool is_query = head >= layer.kv_heads;
  float* x =
      is_query ? rows.q.row(row) + (head - layer.kv_heads) * layer.head_dim : rows.k.row(row) + head * layer.head_dim;
  if (rows.cosines != nullptr) {
    const int64_t angles = (segment.live_position == nullptr ? row : position) * half;
    for (int i = lane; i < half; i += static_cast<int>(kWarp)) {
      rotate(x[i], x[i + half], rows.cosines[angles + i], rows.sines[angles + i]);
    }
  }
  if (is_query) return;
  __syncwarp();
  const int64_t at = layer.row(head, position);
  const float* v = rows.v.row(row) + head * layer.head_dim;
  store_row(x, layer.head_dim, layer.kind, layer.keys + at * layer.row_bytes, layer.key_scales + at);
  store_row(v, layer.head_dim, layer.kind, layer.values + at * layer.row_bytes, layer.value_scales + at);
}

}  // namespace

void kv_store_rows(const Gpu& gpu, const KvSegmentView* segments, int64_t count, const KvRowsView& rows) {
  for_each_list(segments, count, [&](const SegmentList& list) {
    const int heads = list.of[0].layer.kv_heads + rows.q_heads;
    launch(gpu, kv_store_rows_kernel, dim3(static_cast<unsigned>(blocks_for(list.tokens * heads, kWarps))), kThreads, 0,
           list, rows, heads);
  });
}

}  // namespace llama_ext::cuda
