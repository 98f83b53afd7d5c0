// Keys and values of many tokens into the cache, as kv_cache.cu stores them. Queries, keys and values are met once: rotated, rounded
// and stored. Bound by memory: a thread has the loads of several heads in flight, 16 bytes each, where they lie so that it can; elsewhere
// a warp handles a head of a token, number by number.
#include "cuda/kernels.h"
#include "cuda/mma.h"
#include "cuda/numeric.h"
#include "cuda/rotation.h"
#include "cuda/segments.h"
#include "cuda/vectors.h"

namespace llama_ext::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;
/// Heads of a token that a thread handles, with the same angles.
constexpr int kHeadsAtOnce = 4;
__host__ __device__ constexpr int groups_of(int heads) { return (heads + kHeadsAtOnce - 1) / kHeadsAtOnce; }

/// Numbers [at, at + 4) of the two halves of a head: what is rotated together.
struct Pairs {
  float4 first;
  float4 second;
};

/// What nobody writes while the kernel runs.
__device__ __forceinline__ float4 read_constant(const float* from) {
#if defined(__CUDA_ARCH__)
  return __ldg(reinterpret_cast<const float4*>(from));
#else
  return *reinterpret_cast<const float4*>(from);
#endif
}

__device__ __forceinline__ void rotate_pairs(Pairs& x, const float4& cosines, const float4& sines) {
  rotate(x.first.x, x.second.x, cosines.x, sines.x);
  rotate(x.first.y, x.second.y, cosines.y, sines.y);
  rotate(x.first.z, x.second.z, cosines.z, sines.z);
  rotate(x.first.w, x.second.w, cosines.w, sines.w);
}

__device__ __forceinline__ float largest_of(const float4& x) {
  return max_or_nan(max_or_nan(fabsf(x.x), fabsf(x.y)), max_or_nan(fabsf(x.z), fabsf(x.w)));
}

/// The scale of a head that `lanes` lanes hold, a power of two. For whole warps.
__device__ __forceinline__ float scale_of(const Pairs& x, int lanes) {
  float largest = max_or_nan(largest_of(x.first), largest_of(x.second));
  for (int i = lanes / 2; i > 0; i /= 2) largest = max_or_nan(largest, __shfl_xor_sync(kAllLanes, largest, i));
  return kv_scale(largest);
}

template <KvKind kKind>
__device__ __forceinline__ void store_vector(const float4& x, float inverse, unsigned char* to) {
  if constexpr (kKind == KvKind::kF32) {
    *reinterpret_cast<float4*>(to) = x;
  } else if constexpr (kKind == KvKind::kBF16) {
    *reinterpret_cast<uint2*>(to) = {round_pair(x.x, x.y), round_pair(x.z, x.w)};
  } else {
    const auto code = [&](float value) { return static_cast<uint32_t>(kv_code(value, inverse)) & 0xffu; };
    // Zeros where the scale is zero or NaN; a code of NaN would be -127.
    *reinterpret_cast<uint32_t*>(to) =
        inverse > 0.0f ? code(x.x) | code(x.y) << 8 | code(x.z) << 16 | code(x.w) << 24 : 0u;
  }
}

/// A block for a token or a part of its heads. A thread handles four pairs of numbers of each of kHeadsAtOnce heads, of keys, of values
/// or of queries.
template <KvKind kKind>
__global__ void __launch_bounds__(kThreads)
    kv_store_vectors_kernel(const __grid_constant__ SegmentList segments, KvRowsView rows) {
  int64_t token = blockIdx.x;
  const KvSegmentView& segment = segments.find(token);
  const KvLayerView& layer = segment.layer;
  const int64_t row = segment.row + token;
  const int half = layer.head_dim / 2;
  const unsigned lanes = static_cast<unsigned>(half / kVector);
  const unsigned number = blockIdx.y * blockDim.x + threadIdx.x;
  const int group = static_cast<int>(number / lanes);
  const int at = static_cast<int>(number % lanes) * kVector;
  const int kv_groups = groups_of(layer.kv_heads);
  const bool is_key = group < kv_groups;
  const bool is_query = group >= 2 * kv_groups;
  const int begin = (group - (is_key ? 0 : is_query ? 2 * kv_groups : kv_groups)) * kHeadsAtOnce;
  const int count = (is_query ? rows.q_heads : layer.kv_heads) - begin;  // below 1 for threads of no head
  float* head = (is_key ? rows.k.row(row) : is_query ? rows.q.row(row) : rows.v.row(row)) + begin * layer.head_dim + at;

  Pairs x[kHeadsAtOnce] = {};
#pragma unroll
  for (int i = 0; i < kHeadsAtOnce; ++i) {
    if (i >= count) continue;
    x[i].first = *reinterpret_cast<const float4*>(head + i * layer.head_dim);
    x[i].second = *reinterpret_cast<const float4*>(head + i * layer.head_dim + half);
  }
  const int64_t position = segment.first_position() + token;
  if (rows.cosines != nullptr && (is_key || is_query)) {
    const int64_t angles = (segment.live_position == nullptr ? row : position) * half + at;
    const float4 cosines = read_constant(rows.cosines + angles);
    const float4 sines = read_constant(rows.sines + angles);
#pragma unroll
    for (int i = 0; i < kHeadsAtOnce; ++i) {
      if (i >= count) continue;
      rotate_pairs(x[i], cosines, sines);
      *reinterpret_cast<float4*>(head + i * layer.head_dim) = x[i].first;
      *reinterpret_cast<float4*>(head + i * layer.head_dim + half) = x[i].second;
    }
  }
  if (kKind != KvKind::kI8 && is_query) return;

#pragma unroll
  for (int i = 0; i < kHeadsAtOnce; ++i) {
    float scale = 0.0f;
    if constexpr (kKind == KvKind::kI8) scale = scale_of(x[i], static_cast<int>(lanes));  // all lanes of the warp
    if (is_query || i >= count) continue;
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    const int64_t index = layer.row(begin + i, position);
    unsigned char* to = (is_key ? layer.keys : layer.values) + index * layer.row_bytes;
    store_vector<kKind>(x[i].first, inverse, to + at * element_bytes(kKind));
    store_vector<kKind>(x[i].second, inverse, to + (at + half) * element_bytes(kKind));
    if (kKind == KvKind::kI8 && at == 0) (is_key ? layer.key_scales : layer.value_scales)[index] = scale;
  }
}

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
  int64_t token = blockIdx.x;
  const int head = static_cast<int>(blockIdx.y * kWarps + threadIdx.x / kWarp);
  if (head >= heads) return;
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

bool takes_vectors(const KvLayerView& layer, const KvRowsView& rows) {
  for (const Rows& x : {rows.k, rows.v, rows.q}) {
    if (!has_vectors(x.data, x.stride)) return false;
  }
  for (const float* angles : {rows.cosines, rows.sines}) {
    if (!has_vectors(angles, 0)) return false;
  }
  if (layer.head_dim == 0 || layer.head_dim % (2 * kVector) != 0) return false;
  // The scale of a head is found by lanes of one warp.
  return layer.kind != KvKind::kI8 || kWarp % static_cast<unsigned>(layer.head_dim / 2 / kVector) == 0;
}

template <KvKind kKind>
void store_vectors(const Gpu& gpu, const SegmentList& list, const KvRowsView& rows) {
  const KvLayerView& layer = list.of[0].layer;
  const int groups = 2 * groups_of(layer.kv_heads) + groups_of(rows.q_heads);
  const int64_t all = int64_t{groups} * (layer.head_dim / 2 / kVector);
  const int64_t blocks = blocks_for(all, kThreads);
  const int64_t warps = blocks_for(blocks_for(all, blocks), kWarp);
  launch(gpu, kv_store_vectors_kernel<kKind>, dim3(static_cast<unsigned>(list.tokens), static_cast<unsigned>(blocks)),
         static_cast<unsigned>(warps * kWarp), 0, list, rows);
}

}  // namespace

void kv_store_rows(const Gpu& gpu, const KvSegmentView* segments, int64_t count, const KvRowsView& rows) {
  for_each_list(segments, count, [&](const SegmentList& list) {
    const KvLayerView& layer = list.of[0].layer;
    if (takes_vectors(layer, rows)) {
      if (layer.kind == KvKind::kF32) return store_vectors<KvKind::kF32>(gpu, list, rows);
      if (layer.kind == KvKind::kBF16) return store_vectors<KvKind::kBF16>(gpu, list, rows);
      return store_vectors<KvKind::kI8>(gpu, list, rows);
    }
    const int heads = layer.kv_heads + rows.q_heads;
    launch(gpu, kv_store_rows_kernel,
           dim3(static_cast<unsigned>(list.tokens), static_cast<unsigned>(blocks_for(heads, kWarps))), kThreads, 0,
           list, rows, heads);
  });
}

}  // namespace llama_ext::cuda
