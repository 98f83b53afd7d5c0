// Attention in float32 over tiles of 128 keys that start at absolute multiples of 128. A block takes one query token and up to
// 8 of the query heads that share a key/value head, so that keys and values are read once for them: a thread first has a key of
// the tile, then one element of the values. Decoding splits the tiles over blocks, whose results a second kernel merges in
// order; with many tokens a block goes through its tiles itself. Both merge by the same steps: a token's bits depend neither on
// the split nor on the batch nor on how its prompt was cut. Bound by the cache's memory when decoding.
#include <algorithm>

#include "cuda/attention_parts.h"

namespace llama_ext::cuda {
namespace {

constexpr int kKeys = 128;  // of a tile, and threads of a block
constexpr int kKeyWarps = kKeys / static_cast<int>(kWarp);

/// Bytes of a row of the cache that a thread takes at once: sixteen codes in float32 would not fit into registers.
template <KvKind kKind>
inline constexpr int kVectorBytes = kKind == KvKind::kI8 ? 8 : 16;
/// The numbers of so many bytes.
template <KvKind kKind>
inline constexpr int kVector = kVectorBytes<kKind> / element_bytes(kKind);

template <KvKind kKind>
__device__ __forceinline__ void load_vector(const unsigned char* from, float out[8]) {
  if constexpr (kKind == KvKind::kI8) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] = static_cast<float>(static_cast<signed char>(words.x >> (8 * i)));
      out[4 + i] = static_cast<float>(static_cast<signed char>(words.y >> (8 * i)));
    }
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    const uint32_t all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kKind == KvKind::kF32) {
        out[i] = __uint_as_float(all[i]);
      } else {
        out[2 * i] = __uint_as_float(all[i] << 16);
        out[2 * i + 1] = __uint_as_float(all[i] & 0xffff0000u);
      }
    }
  }
}

template <KvKind kKind>
__device__ __forceinline__ float load_value(const unsigned char* row, int d) {
  if constexpr (kKind == KvKind::kF32) return reinterpret_cast<const float*>(row)[d];
  if constexpr (kKind == KvKind::kBF16) return from_bf16(reinterpret_cast<const uint16_t*>(row)[d]);
  return static_cast<float>(reinterpret_cast<const signed char*>(row)[d]);
}

template <KvKind kKind, int kHeads>
__global__ void __launch_bounds__(kKeys) attention_kernel(const __grid_constant__ AttentionView a) {
  wait_for_predecessors();
  int64_t token = blockIdx.x;
  const int64_t pass_token = token;
  const KvSegmentView& segment = a.segments.find(token);
  const KvLayerView& layer = segment.layer;
  const int kv_head = static_cast<int>(blockIdx.y) / a.shares;
  const int first_head = kv_head * a.group + static_cast<int>(blockIdx.y) % a.shares * kHeads;
  const int heads = min(kHeads, kv_head * a.group + a.group - first_head);
  const int dim = layer.head_dim;
  const int padded = layer.row_bytes / element_bytes(kKind);
  const int64_t row = segment.row + token;
  const int64_t visible = segment.first_position() + token + 1;
  const int tiles = static_cast<int>((visible + kKeys - 1) / kKeys);
  const int first_tile = a.parts == 0 ? 0 : static_cast<int>(blockIdx.z);
  const int end_tile = a.parts == 0 ? tiles : min(first_tile + 1, tiles);
  if (first_tile >= end_tile) return;

  auto* queries = reinterpret_cast<float*>(shared_memory());  // (kHeads, padded)
  float* weights = queries + kHeads * padded;                 // (kHeads, kKeys)
  float* merged = weights + kHeads * kKeys;                   // (kHeads, dim)
  float* value_scales = merged + kHeads * dim;                // (kKeys), of int8 rows
  float* largest = value_scales + kKeys;                      // (kHeads), of the tiles so far
  float* sums = largest + kHeads;
  float* old_factors = sums + kHeads;
  float* new_factors = old_factors + kHeads;

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / static_cast<int>(kWarp);
  const int lane = thread % static_cast<int>(kWarp);
  for (int i = thread; i < kHeads * padded; i += kKeys) {
    const int h = i / padded;
    const int d = i % padded;
    queries[i] = h < heads && d < dim ? a.q.row(row)[(first_head + h) * dim + d] : 0.0f;
  }

  for (int tile = first_tile; tile < end_tile; ++tile) {
    __syncthreads();
    const int64_t first_key = int64_t{tile} * kKeys;
    const int keys = static_cast<int>(visible - first_key < kKeys ? visible - first_key : kKeys);

    // Scores: a thread has a key.
    float dots[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) dots[h] = 0.0f;
    if (thread < keys) {
      const int64_t at = layer.row(kv_head, first_key + thread);
      const unsigned char* key = layer.keys + at * layer.row_bytes;
#pragma unroll 1
      for (int d = 0; d < padded; d += kVector<kKind>) {
        float values[8];
        load_vector<kKind>(key + d * element_bytes(kKind), values);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float* q = queries + h * padded + d;
#pragma unroll
          for (int i = 0; i < kVector<kKind>; ++i) dots[h] = fmaf(q[i], values[i], dots[h]);
        }
      }
      const float key_scale = kKind == KvKind::kI8 ? layer.key_scales[at] : 1.0f;
      if constexpr (kKind == KvKind::kI8) value_scales[thread] = layer.value_scales[at];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if constexpr (kKind == KvKind::kI8) dots[h] *= key_scale;
        dots[h] *= a.scale;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) weights[h * kKeys + thread] = thread < keys ? dots[h] : -INFINITY;
    __syncthreads();

    // Softmax of the tile: a warp has a head.
    for (int h = warp; h < heads; h += kKeyWarps) {
      float scores[kKeyWarps];
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < kKeyWarps; ++i) {
        scores[i] = weights[h * kKeys + i * static_cast<int>(kWarp) + lane];
        top = max_or_nan(top, scores[i]);
      }
      top = warp_max(top);
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kKeyWarps; ++i) {
        const int key = i * static_cast<int>(kWarp) + lane;
        const float weight = key < keys ? expf(scores[i] - top) : 0.0f;
        weights[h * kKeys + key] = weight;
        total += weight;
      }
      total = warp_sum(total);
      if (lane == 0) {
        if (tile == first_tile) {
          largest[h] = top;
          sums[h] = total;
        } else {
          const MergeFactors factors = merge_factors(largest[h], top);
          old_factors[h] = factors.of_old;
          new_factors[h] = factors.of_new;
          sums[h] = merge(sums[h], total, factors);
          largest[h] = factors.largest;
        }
      }
    }
    __syncthreads();

    // Values: a thread has an element of them.
    for (int d = thread; d < dim; d += kKeys) {
      float found[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) found[h] = 0.0f;
      const int64_t at = layer.row(kv_head, first_key);
      const unsigned char* values = layer.values + at * layer.row_bytes;
#pragma unroll 2
      for (int key = 0; key < keys; ++key) {
        float value = load_value<kKind>(values + int64_t{key} * layer.row_bytes, d);
        if constexpr (kKind == KvKind::kI8) value *= value_scales[key];
#pragma unroll
        for (int h = 0; h < kHeads; ++h) found[h] = fmaf(weights[h * kKeys + key], value, found[h]);
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h >= heads) break;
        float& sum = merged[h * dim + d];
        sum = tile == first_tile ? found[h] : merge(sum, found[h], {0.0f, old_factors[h], new_factors[h]});
      }
    }
  }

  // An element of `merged` is written and read by one thread alone; largest and sums were written before a barrier.
  for (int d = thread; d < dim; d += kKeys) {
    for (int h = 0; h < heads; ++h) {
      if (a.parts == 0) {
        a.y.row(row)[(first_head + h) * dim + d] = merged[h * dim + d] * (1.0f / sums[h]);
      } else {
        float* partial = a.partial + partial_at(a, pass_token, first_head + h, first_tile, dim);
        partial[2 + d] = merged[h * dim + d];
        if (d == 0) {
          partial[0] = largest[h];
          partial[1] = sums[h];
        }
      }
    }
  }
}

/// A block for a head of a token: its parts in order.
__global__ void merge_parts_kernel(const __grid_constant__ AttentionView a, int keys) {
  wait_for_predecessors();
  int64_t token = blockIdx.x;
  const int64_t pass_token = token;
  const KvSegmentView& segment = a.segments.find(token);
  const int head = static_cast<int>(blockIdx.y);
  const int dim = segment.layer.head_dim;
  const int64_t visible = segment.first_position() + token + 1;
  const int parts = static_cast<int>((visible + keys - 1) / keys);
  const float* partial = a.partial + partial_at(a, pass_token, head, 0, dim);
  for (int d = static_cast<int>(threadIdx.x); d < dim; d += kKeys) {
    float largest = partial[0];
    float total = partial[1];
    float sum = partial[2 + d];
    for (int part = 1; part < parts; ++part) {
      const float* next = partial + part * (dim + 2);
      const MergeFactors factors = merge_factors(largest, next[0]);
      total = merge(total, next[1], factors);
      sum = merge(sum, next[2 + d], factors);
      largest = factors.largest;
    }
    a.y.row(segment.row + token)[head * dim + d] = sum * (1.0f / total);
  }
}

template <KvKind kKind, int kHeads>
void start(const Gpu& gpu, AttentionView a) {
  const KvLayerView& layer = a.segments.of[0].layer;
  const int padded = layer.row_bytes / element_bytes(kKind);
  const size_t floats = static_cast<size_t>(kHeads) * static_cast<size_t>(padded + kKeys + layer.head_dim + 4) + kKeys;
  a.shares = static_cast<int>(blocks_for(a.group, kHeads));
  const unsigned shares = static_cast<unsigned>(layer.kv_heads * a.shares);
  const int64_t tiles = blocks_for(longest_row(a.segments), kKeys);
  // Few blocks would leave most of the GPU idle.
  const bool splits =
      tiles > 1 && tiles <= 65535 && a.segments.tokens * shares < 2 * static_cast<int64_t>(gpu.multiprocessors());
  const auto start_blocks = [&](const AttentionView& view) {
    launch<Start::kEarly>(gpu, attention_kernel<kKind, kHeads>,
                          dim3(static_cast<unsigned>(view.segments.tokens), shares,
                               view.parts == 0 ? 1u : static_cast<unsigned>(view.parts)),
                          kKeys, floats * sizeof(float), view);
  };
  splits ? split_keys(gpu, a, kKeys, start_blocks) : start_blocks(a);
}

template <KvKind kKind>
void start_heads(const Gpu& gpu, const AttentionView& a) {
  // Heads of 512 and more elements, which no Llama has, would not leave room for eight in shared memory.
  if (a.group == 1 || a.segments.of[0].layer.head_dim > 512) return start<kKind, 1>(gpu, a);
  if (a.group <= 4) return start<kKind, 4>(gpu, a);
  start<kKind, 8>(gpu, a);
}

}  // namespace

int64_t longest_row(const SegmentList& segments) {
  int64_t longest = 0;
  for (int i = 0; i < segments.count; ++i) {
    const KvSegmentView& segment = segments.of[i];
    if (segment.tokens > 0) longest = std::max(longest, segment.position + segment.tokens);
  }
  return longest;
}

void merge_parts(const Gpu& gpu, const AttentionView& a, int keys) {
  launch<Start::kEarly>(gpu, merge_parts_kernel,
                        dim3(static_cast<unsigned>(a.segments.tokens), static_cast<unsigned>(a.heads)), kKeys, 0, a,
                        keys);
}

void attention(const Gpu& gpu, const KvSegmentView* segments, int64_t count, Rows q, int heads, float scale, Rows y) {
  for_each_list(segments, count, [&](const SegmentList& list) {
    const KvLayerView& layer = list.of[0].layer;
    AttentionView a;
    a.segments = list;
    a.q = q;
    a.y = y;
    a.heads = heads;
    a.group = heads / layer.kv_heads;
    a.scale = scale;
    switch (layer.kind) {
      case KvKind::kF32:
        return start_heads<KvKind::kF32>(gpu, a);
      case KvKind::kBF16:
        return start_heads<KvKind::kBF16>(gpu, a);
      case KvKind::kI8:
        return start_heads<KvKind::kI8>(gpu, a);
    }
  });
}

}  // namespace llama_ext::cuda
