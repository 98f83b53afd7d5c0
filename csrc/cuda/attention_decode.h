// Decoding attention, for attention_decode.cu and chain.cu: what kDecodeThreads threads do for 128 keys of one key/value head of a token.
#pragma once

#include "cuda/attention_parts.h"
#include "cuda/link_views.h"
#include "cuda/mma.h"
#include "cuda/rotation.h"

namespace llama_ext::cuda {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = kDecodeWarps * static_cast<int>(kWarp);
inline constexpr int kWarpKeys = 32;
inline constexpr int kDecodeKeys = kDecodeWarps * kWarpKeys;
inline constexpr int kQueryRows = 16;  // of the products; the most heads that share keys and values

template <int kDim>
struct DecodeShared {
  static constexpr int kPitch = kDim + 8;  // rows do not meet in a bank
  uint16_t queries[kQueryRows][kPitch];
  uint16_t values[kDecodeKeys][kPitch];
  union {
    uint16_t keys[kDecodeKeys][kPitch];
    float sums[kDecodeWarps][kQueryRows][kDim];  // once the keys have been used
  };
  float largest[kDecodeWarps][kQueryRows];
  float totals[kDecodeWarps][kQueryRows];
  int is_last;
};

/// Part `part` of the keys of a key/value head of token `token` of the list; nothing where there is none. The last part to come merges
/// them all. thread: of the kDecodeThreads, for which sync is. wait, once: until the token's query, key and value may be read; what the cache
/// has of earlier tokens is asked for before.
template <int kDim, typename Wait, typename Sync>
__device__ __forceinline__ void attend_to_part(const DecodeView& view, DecodeShared<kDim>& shared, int thread,
                                               int token, int kv_head, int part, Wait wait, Sync sync) {
  using S = DecodeShared<kDim>;
  constexpr int kPitchWords = S::kPitch / 2;
  constexpr int kScoreTiles = kWarpKeys / 8;
  constexpr int kOutputs = kDim / 8;
  const AttentionView& a = view.attention;
  const KvSegmentView& segment = a.segments.of[token];
  const KvLayerView& layer = segment.layer;
  const int64_t position = segment.first_position();
  const int parts = static_cast<int>(position / kDecodeKeys) + 1;
  if (part >= parts) return wait();
  const int dim = layer.head_dim;
  const int half_dim = dim / 2;
  const int64_t first_key = int64_t{part} * kDecodeKeys;
  const int stored = static_cast<int>(position - first_key < kDecodeKeys ? position - first_key : kDecodeKeys);
  const int visible = stored + (part + 1 == parts ? 1 : 0);

  // It comes while the new token is rotated.
  constexpr int kVectors = kDim / 8;
  const int64_t first_row = layer.row(kv_head, first_key) * layer.row_bytes;
  for (int i = thread; i < kDecodeKeys * kVectors; i += kDecodeThreads) {
    const int key = i / kVectors;
    const int vector = i % kVectors;
    const bool is_there = key < stored && vector * 8 < dim;
    if (key == stored) continue;  // the new one, if it belongs here
    const int64_t at = first_row + (is_there ? int64_t{key} * layer.row_bytes + vector * 16 : 0);
    copy_async(&shared.keys[key][vector * 8], layer.keys + at, is_there);
    copy_async(&shared.values[key][vector * 8], layer.values + at, is_there);
  }
  commit_copies();
  wait();

  const int64_t angles = (segment.live_position == nullptr ? segment.row : position) * half_dim;
  const float* cosines = view.rows.cosines + angles;
  const float* sines = view.rows.sines + angles;
  const float* q = a.q.row(segment.row) + kv_head * a.group * dim;
  for (int i = thread; i < kQueryRows * (kDim / 2); i += kDecodeThreads) {
    const int row = i / (kDim / 2);
    const int d = i % (kDim / 2);
    if (row < a.group && d < half_dim) {
      float first = q[row * dim + d];
      float second = q[row * dim + d + half_dim];
      rotate(first, second, cosines[d], sines[d]);
      shared.queries[row][d] = to_bf16(first);
      shared.queries[row][d + half_dim] = to_bf16(second);
    } else if (row >= a.group) {
      shared.queries[row][2 * d] = shared.queries[row][2 * d + 1] = 0;
    }
    if (row < a.group && d >= half_dim) {  // between dim and kDim
      shared.queries[row][2 * d] = shared.queries[row][2 * d + 1] = 0;
    }
  }
  if (visible > stored) {
    const float* k = view.rows.k.row(segment.row) + kv_head * dim;
    const float* v = view.rows.v.row(segment.row) + kv_head * dim;
    const int64_t at = layer.row(kv_head, position) * layer.row_bytes;
    auto* to_key = reinterpret_cast<uint16_t*>(layer.keys + at);
    auto* to_value = reinterpret_cast<uint16_t*>(layer.values + at);
    for (int d = thread; d < half_dim; d += kDecodeThreads) {
      float first = k[d];
      float second = k[d + half_dim];
      rotate(first, second, cosines[d], sines[d]);
      to_key[d] = shared.keys[stored][d] = to_bf16(first);
      to_key[d + half_dim] = shared.keys[stored][d + half_dim] = to_bf16(second);
    }
    for (int d = thread; d < kDim; d += kDecodeThreads) {
      const uint16_t value = d < dim ? to_bf16(v[d]) : uint16_t{0};
      shared.values[stored][d] = value;
      if (d < dim) to_value[d] = value;
      if (d >= dim) shared.keys[stored][d] = 0;
    }
  }
  wait_for_copies<0>();
  sync();

  const int warp = thread / static_cast<int>(kWarp);
  const int lane = thread % static_cast<int>(kWarp);
  const int g = lane / 4;
  const int t = lane % 4;
  float scores[kScoreTiles][4] = {};
  const auto* q_words = reinterpret_cast<const uint32_t*>(&shared.queries[g][0]) + t;
  const auto* k_words = reinterpret_cast<const uint32_t*>(&shared.keys[warp * kWarpKeys + g][0]) + t;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const uint32_t rows[4] = {q_words[step * 8], q_words[8 * kPitchWords + step * 8], q_words[step * 8 + 4],
                              q_words[8 * kPitchWords + step * 8 + 4]};
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
      const uint32_t* at = k_words + j * 8 * kPitchWords + step * 8;
      const uint32_t keys[2] = {at[0], at[4]};
      mma<MmaType::kBF16>(scores[j], rows, keys);
    }
  }
  uint32_t weights[kScoreTiles][2];
  const float scale = a.scale;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
      for (int c = 2 * half; c < 2 * half + 2; ++c) {
        const int key = warp * kWarpKeys + j * 8 + 2 * t + c % 2;
        scores[j][c] = key < visible ? scores[j][c] * scale : -INFINITY;
        top = max_or_nan(top, scores[j][c]);
      }
    }
    top = max_or_nan(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = max_or_nan(top, __shfl_xor_sync(kAllLanes, top, 2));
    const AttentionShift shift(top);
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
      const float low = fast_exp2(fmaf(scores[j][2 * half], kLog2E, -shift.binary));
      const float high = fast_exp2(fmaf(scores[j][2 * half + 1], kLog2E, -shift.binary));
      total += low + high;
      weights[j][half] = round_pair(low, high);
    }
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    if (t == 0) {
      shared.largest[warp][8 * half + g] = top;
      shared.totals[warp][8 * half + g] = total;
    }
  }
  float sums[kOutputs][4] = {};
  const uint16_t* v_rows = &shared.values[warp * kWarpKeys + lane / 8 % 2 * 8 + lane % 8][lane / 16 * 8];
#pragma unroll
  for (int step = 0; step < kWarpKeys / 16; ++step) {
    const uint32_t rows[4] = {weights[2 * step][0], weights[2 * step][1], weights[2 * step + 1][0],
                              weights[2 * step + 1][1]};
#pragma unroll
    for (int j = 0; j < kOutputs; j += 2) {
      uint32_t columns[4];
      load_transposed(columns, v_rows + step * 16 * S::kPitch + j * 8);
      mma<MmaType::kBF16>(sums[j], rows, columns);
      mma<MmaType::kBF16>(sums[j + 1], rows, columns + 2);
    }
  }
  sync();  // the keys have been used
#pragma unroll
  for (int j = 0; j < kOutputs; ++j) {
    *reinterpret_cast<float2*>(&shared.sums[warp][g][j * 8 + 2 * t]) = {sums[j][0], sums[j][1]};
    *reinterpret_cast<float2*>(&shared.sums[warp][g + 8][j * 8 + 2 * t]) = {sums[j][2], sums[j][3]};
  }
  sync();

  // The block's part, from its warps'.
  float* y = a.y.row(segment.row) + kv_head * a.group * dim;
  const int first_head = kv_head * a.group;
  for (int i = thread; i < a.group * dim; i += kDecodeThreads) {
    const int row = i / dim;
    const int d = i % dim;
    float largest = shared.largest[0][row];
#pragma unroll
    for (int w = 1; w < kDecodeWarps; ++w) largest = max_or_nan(largest, shared.largest[w][row]);
    const AttentionShift shift(largest);
    float total = 0.0f;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float factor = fast_exp2(fmaf(shared.largest[w][row], kLog2E, -shift.binary));
      total = fmaf(shared.totals[w][row], factor, total);
      sum = fmaf(shared.sums[w][row][d], factor, sum);
    }
    if (parts == 1) {
      y[i] = sum / total;
      continue;
    }
    float* partial = a.partial + partial_at(a, token, first_head + row, part, dim);
    partial[2 + d] = sum;
    if (d == 0) {
      partial[0] = largest;
      partial[1] = total;
    }
  }
  if (parts == 1) return;

  __threadfence();
  sync();
  if (thread == 0) {
    int* arrived = view.arrived + token * layer.kv_heads + kv_head;
    shared.is_last = atomicAdd(arrived, 1) == parts - 1;
    if (shared.is_last) *arrived = 0;
  }
  sync();
  if (!shared.is_last) return;
  __threadfence();
  for (int i = thread; i < a.group * dim; i += kDecodeThreads) {
    const int row = i / dim;
    const int d = i % dim;
    const float* partial = a.partial + partial_at(a, token, first_head + row, 0, dim);
    const int pitch = dim + 2;
    float largest = -INFINITY;
#pragma unroll 8
    for (int other = 0; other < parts; ++other) largest = max_or_nan(largest, __ldcg(partial + other * pitch));
    const AttentionShift shift(largest);
    float total = 0.0f;
    float sum = 0.0f;
#pragma unroll 8
    for (int other = 0; other < parts; ++other) {
      const float factor = fast_exp2(fmaf(__ldcg(partial + other * pitch), kLog2E, -shift.binary));
      total = fmaf(__ldcg(partial + other * pitch + 1), factor, total);
      sum = fmaf(__ldcg(partial + other * pitch + 2 + d), factor, sum);
    }
    y[i] = sum / total;
  }
}

}  // namespace llama_ext::cuda
