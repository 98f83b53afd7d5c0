// Keys and values in and out of the cache: a block for a head of a token. Queries, keys and values are met once: rotated,
// rounded and stored. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/numeric.h"
#include "cuda/rotation.h"
#include "cuda/segments.h"

namespace llama_ext::cuda {
namespace {

constexpr unsigned kHeadThreads = 128;
constexpr int64_t kManyTokens = 32;

/// One head of a token to one row of the cache, by a whole block.
__device__ void store_row(const float* from, int head_dim, KvKind kind, unsigned char* to, float* scale, float* place) {
  const int thread = static_cast<int>(threadIdx.x);
  if (kind == KvKind::kF32) {
    for (int d = thread; d < head_dim; d += kHeadThreads) reinterpret_cast<float*>(to)[d] = from[d];
  } else if (kind == KvKind::kBF16) {
    for (int d = thread; d < head_dim; d += kHeadThreads) reinterpret_cast<uint16_t*>(to)[d] = to_bf16(from[d]);
  } else {
    float largest = 0.0f;
    for (int d = thread; d < head_dim; d += kHeadThreads) largest = max_or_nan(largest, fabsf(from[d]));
    largest = block_max(largest, place);
    const float found = kv_scale(largest);
    const float inverse = found > 0.0f ? 1.0f / found : 0.0f;
    for (int d = thread; d < head_dim; d += kHeadThreads) {
      reinterpret_cast<signed char*>(to)[d] =
          found > 0.0f ? static_cast<signed char>(kv_code(from[d], inverse)) : static_cast<signed char>(0);
    }
    if (thread == 0) *scale = found;
  }
}

__global__ void kv_store_kernel(const __grid_constant__ SegmentList segments, KvRowsView rows) {
  wait_for_predecessors();
  auto* place = reinterpret_cast<float*>(shared_memory());
  int64_t token = blockIdx.x;
  const KvSegmentView& segment = segments.find(token);
  const KvLayerView& layer = segment.layer;
  const int64_t row = segment.row + token;
  const int64_t position = segment.first_position() + token;
  const int head = static_cast<int>(blockIdx.y);
  const int half = layer.head_dim / 2;
  const bool is_query = head >= layer.kv_heads;
  float* x =
      is_query ? rows.q.row(row) + (head - layer.kv_heads) * layer.head_dim : rows.k.row(row) + head * layer.head_dim;
  if (rows.cosines != nullptr) {
    const int64_t angles = (segment.live_position == nullptr ? row : position) * half;
    for (int i = static_cast<int>(threadIdx.x); i < half; i += kHeadThreads) {
      rotate(x[i], x[i + half], rows.cosines[angles + i], rows.sines[angles + i]);
    }
  }
  if (is_query) return;
  __syncthreads();
  const int64_t at = layer.row(head, position);
  const float* v = rows.v.row(row) + head * layer.head_dim;
  store_row(x, layer.head_dim, layer.kind, layer.keys + at * layer.row_bytes, layer.key_scales + at, place);
  store_row(v, layer.head_dim, layer.kind, layer.values + at * layer.row_bytes, layer.value_scales + at, place);
}

__device__ float load_element(const unsigned char* row, KvKind kind, int d, const float* scale) {
  if (kind == KvKind::kF32) return reinterpret_cast<const float*>(row)[d];
  if (kind == KvKind::kBF16) return from_bf16(reinterpret_cast<const uint16_t*>(row)[d]);
  return static_cast<float>(reinterpret_cast<const signed char*>(row)[d]) * *scale;
}

__global__ void kv_load_kernel(KvLayerView layer, int64_t position, float* k, float* v) {
  const int head = static_cast<int>(blockIdx.y);
  const int64_t at = layer.row(head, position + blockIdx.x);
  const int64_t to = (int64_t{blockIdx.x} * layer.kv_heads + head) * layer.head_dim;
  for (int d = static_cast<int>(threadIdx.x); d < layer.head_dim; d += kHeadThreads) {
    k[to + d] = load_element(layer.keys + at * layer.row_bytes, layer.kind, d, layer.key_scales + at);
    v[to + d] = load_element(layer.values + at * layer.row_bytes, layer.kind, d, layer.value_scales + at);
  }
}

/// A thread for 16 bytes of a position of a head.
__global__ void kv_copy_kernel(KvLayerView to, KvLayerView from, int64_t length) {
  const int vectors = from.row_bytes / 16;
  const int64_t number = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (number >= length * vectors) return;
  const int64_t position = number / vectors;
  const int head = static_cast<int>(blockIdx.y);
  const auto at = [&](unsigned char* rows, const KvLayerView& layer) {
    return reinterpret_cast<uint4*>(rows + layer.row(head, position) * layer.row_bytes) + number % vectors;
  };
  *at(to.keys, to) = *at(from.keys, from);
  *at(to.values, to) = *at(from.values, from);
  if (from.kind != KvKind::kI8 || number % vectors != 0) return;
  to.key_scales[to.row(head, position)] = from.key_scales[from.row(head, position)];
  to.value_scales[to.row(head, position)] = from.value_scales[from.row(head, position)];
}

}  // namespace

void kv_copy(const Gpu& gpu, const KvLayerView& to, const KvLayerView& from, int64_t length) {
  const int64_t vectors = length * (from.row_bytes / 16);
  launch(gpu, kv_copy_kernel,
         dim3(static_cast<unsigned>(blocks_for(vectors, kHeadThreads)), static_cast<unsigned>(from.kv_heads)),
         kHeadThreads, 0, to, from, length);
}

void kv_store(const Gpu& gpu, const KvSegmentView* segments, int64_t count, const KvRowsView& rows) {
  int64_t tokens = 0;
  for (int64_t i = 0; i < count; ++i) tokens += segments[i].tokens;
  if (tokens >= kManyTokens) return kv_store_rows(gpu, segments, count, rows);
  for_each_list(segments, count, [&](const SegmentList& list) {
    const unsigned heads = static_cast<unsigned>(list.of[0].layer.kv_heads + rows.q_heads);
    launch<Start::kEarly>(gpu, kv_store_kernel, dim3(static_cast<unsigned>(list.tokens), heads), kHeadThreads,
                          kWarp * sizeof(float), list, rows);
  });
}

void kv_load(const Gpu& gpu, const KvLayerView& layer, int64_t position, int64_t tokens, float* k, float* v) {
  launch(gpu, kv_load_kernel, dim3(static_cast<unsigned>(tokens), static_cast<unsigned>(layer.kv_heads)), kHeadThreads,
         0, layer, position, k, v);
}

}  // namespace llama_ext::cuda
