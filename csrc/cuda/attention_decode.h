// Decoding attention, for attention_decode.cu and chain.cu: what a block does for 128 keys of one key/value head of a token.
#pragma once

#include "cuda/attention_parts.h"
#include "cuda/mma.h"
#include "cuda/rotation.h"

namespace llama_ext::cuda {

inline constexpr int kDecodeWarps = 8;
inline constexpr int kDecodeThreads = kDecodeWarps * static_cast<int>(kWarp);
inline constexpr int kDecodeKeys = 128;
inline constexpr int kQueryRows = 16;  // of the products; the most heads that share keys and values
inline constexpr int kKeyTiles = kDecodeKeys / 8;

template <int kDim>
struct DecodeShared {
  static constexpr int kPitch = kDim + 8;  // rows do not meet in a bank
  static constexpr int kWeightPitch = kDecodeKeys + 8;
  uint16_t queries[kQueryRows][kPitch];
  union {
    uint16_t keys[kDecodeKeys][kPitch];
    uint16_t values[kDecodeKeys][kPitch];  // once the keys have been used
  };
  uint16_t weights[kQueryRows][kWeightPitch];
  float largest[kQueryRows][kKeyTiles];
  float totals[kQueryRows][kKeyTiles];
  int is_last;
};

/// Of all tokens.
struct DecodeArgs {
  Rows q;
  Rows y;
  KvRowsView rows;
  int heads = 0;  // H
  int group = 0;  // H / K
  int parts = 0;  // of the keys of the longest row
  float scale = 1.0f;
  float* partial = nullptr;  // (tokens, H, parts): largest, sum, head_dim sums
  int* arrived = nullptr;    // (tokens, K): parts that are there; zeros, before and after

  __device__ int64_t partial_at(int token, int head, int part, int dim) const {
    return ((int64_t{token} * heads + head) * parts + part) * (dim + 2);
  }
};

/// Part `part` of the keys of a key/value head of token `token`; nothing where there is none. The last part to come merges them all. wait, once:
/// until the token's query, key and value may be read; what the cache has of earlier tokens is asked for before.
template <int kDim, typename Wait>
__device__ __forceinline__ void attend_to_part(const DecodeArgs& a, const KvSegmentView& segment,
                                               DecodeShared<kDim>& shared, int token, int kv_head, int part,
                                               const Wait& wait) {
  const auto thread = static_cast<int>(threadIdx.x);
  const KvLayerView& layer = segment.layer;
  const int64_t position = segment.first_position();
  const int parts = static_cast<int>(position / kDecodeKeys) + 1;
  if (part >= parts) return wait();
  const int dim = layer.head_dim;
  const int half_dim = dim / 2;
  const int64_t first_key = int64_t{part} * kDecodeKeys;
  const int stored = static_cast<int>(position - first_key < kDecodeKeys ? position - first_key : kDecodeKeys);
  const int visible = stored + (part + 1 == parts ? 1 : 0);

  // What is stored and where the new token goes was known before this token's kernels began: it comes before they are waited for.
  constexpr int kVectors = kDim / 8;
  constexpr int kAtOnce = kDecodeThreads / kVectors;  // keys
  const int vector = thread % kVectors;
  const int64_t first_at = layer.row(kv_head, first_key) * layer.row_bytes;
  const int64_t vector_at = first_at + vector * 16;
  uint4 values[kDecodeKeys / kAtOnce];  // which wait in registers for the keys' memory
#pragma unroll
  for (int i = 0; i < kDecodeKeys / kAtOnce; ++i) {
    const int key = thread / kVectors + i * kAtOnce;
    const bool is_there = key < stored && vector * 8 < dim;
    const int64_t at = is_there ? vector_at + int64_t{key} * layer.row_bytes : first_at;
    values[i] = is_there ? *reinterpret_cast<const uint4*>(layer.values + at) : uint4{0, 0, 0, 0};
    if (key == stored) continue;  // the new one, if it belongs here
    copy_async(&shared.keys[key][vector * 8], layer.keys + at, is_there);
  }
  commit_copies();
  constexpr int kHalf = kDim / 2;
  for (int i = thread; i < kQueryRows * kHalf; i += kDecodeThreads) {
    const int row = i / kHalf;
    const int d = i % kHalf;
    if (row >= a.group || d >= half_dim) shared.queries[row][2 * d] = shared.queries[row][2 * d + 1] = 0;
  }

  const bool has_new = visible > stored;
  const int64_t angles = (segment.live_position == nullptr ? segment.row : position) * half_dim;
  const float* cosines = a.rows.cosines + angles;
  const float* sines = a.rows.sines + angles;
  static_assert(kDim <= kDecodeThreads);
  float turn[2] = {};
  if (has_new && thread < half_dim) {
    turn[0] = cosines[thread];
    turn[1] = sines[thread];
  }
  wait();

  // All loads before the first store: each wait for one would be a microsecond's half.
  float new_key[2] = {};
  float new_value = 0.0f;
  if (has_new && thread < half_dim) {
    const float* k = a.rows.k.row(segment.row) + kv_head * dim;
    new_key[0] = k[thread];
    new_key[1] = k[thread + half_dim];
  }
  if (has_new && thread < dim) new_value = a.rows.v.row(segment.row)[kv_head * dim + thread];
  constexpr int kPairs = 2;
  const float* q = a.q.row(segment.row) + kv_head * a.group * dim;
#pragma unroll 1
  for (int base = thread; base < a.group * kHalf; base += kPairs * kDecodeThreads) {
    float first[kPairs];
    float second[kPairs];
    float cosine[kPairs];
    float sine[kPairs];
    const auto is_there = [&](int i) { return i / kHalf < a.group && i % kHalf < half_dim; };
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int i = base + j * kDecodeThreads;
      if (!is_there(i)) continue;
      const int d = i % kHalf;
      first[j] = q[i / kHalf * dim + d];
      second[j] = q[i / kHalf * dim + d + half_dim];
      cosine[j] = cosines[d];
      sine[j] = sines[d];
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int i = base + j * kDecodeThreads;
      if (!is_there(i)) continue;
      rotate(first[j], second[j], cosine[j], sine[j]);
      shared.queries[i / kHalf][i % kHalf] = to_bf16(first[j]);
      shared.queries[i / kHalf][i % kHalf + half_dim] = to_bf16(second[j]);
    }
  }
  if (has_new) {
    const int64_t at = layer.row(kv_head, position) * layer.row_bytes;
    if (thread < half_dim) {
      auto* to_key = reinterpret_cast<uint16_t*>(layer.keys + at);
      rotate(new_key[0], new_key[1], turn[0], turn[1]);
      to_key[thread] = shared.keys[stored][thread] = to_bf16(new_key[0]);
      to_key[thread + half_dim] = shared.keys[stored][thread + half_dim] = to_bf16(new_key[1]);
    }
    if (thread < dim) reinterpret_cast<uint16_t*>(layer.values + at)[thread] = to_bf16(new_value);
    if (thread >= dim && thread < kDim) shared.keys[stored][thread] = 0;
  }
  wait_for_copies<0>();
  __syncthreads();

  const int warp = thread / static_cast<int>(kWarp);
  const int lane = thread % static_cast<int>(kWarp);
  const int g = lane / 4;
  const int t = lane % 4;
  // Rows of operand A that a lane names to load_matrices().
  const int a_row = lane / 8 % 2 * 8 + lane % 8;
  const int a_column = lane / 16 * 8;
  constexpr int kTilesEach = kKeyTiles / kDecodeWarps;
  float scores[kTilesEach][2][4] = {};
#pragma unroll
  for (int step = 0; step < kDim / 16; step += 2) {
    uint32_t rows[2][4];
    load_matrices(rows[0], &shared.queries[a_row][a_column + step * 16]);
    load_matrices(rows[1], &shared.queries[a_row][a_column + step * 16 + 16]);
#pragma unroll
    for (int j = 0; j < kTilesEach; ++j) {
      uint32_t keys[4];
      load_matrices(keys, &shared.keys[(warp + j * kDecodeWarps) * 8 + lane % 8][lane / 8 * 8 + step * 16]);
      mma<MmaType::kBF16>(scores[j][0], rows[0], keys);
      mma<MmaType::kBF16>(scores[j][1], rows[1], keys + 2);
    }
  }
  const float scale = a.scale;
#pragma unroll
  for (int j = 0; j < kTilesEach; ++j) {
    const int tile = warp + j * kDecodeWarps;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int c = 2 * half; c < 2 * half + 2; ++c) {
        const int key = tile * 8 + 2 * t + c % 2;
        scores[j][0][c] = key < visible ? (scores[j][0][c] + scores[j][1][c]) * scale : -INFINITY;
        top = max_or_nan(top, scores[j][0][c]);
      }
      top = max_or_nan(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = max_or_nan(top, __shfl_xor_sync(kAllLanes, top, 2));
      if (t == 0) shared.largest[8 * half + g][tile] = top;
    }
  }
  __syncthreads();

#pragma unroll
  for (int j = 0; j < kDecodeKeys / kAtOnce; ++j) {
    const int key = thread / kVectors + j * kAtOnce;
    void* to = &shared.values[key][vector * 8];
    if (key != stored) *static_cast<uint4*>(to) = values[j];
  }
  if (has_new && thread < kDim) shared.values[stored][thread] = to_bf16(new_value);  // 0 beyond dim
  float top_scores[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY;
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) top = max_or_nan(top, shared.largest[8 * half + g][tile]);
    top_scores[half] = top;
    const AttentionShift shift(top);
#pragma unroll
    for (int j = 0; j < kTilesEach; ++j) {
      const int tile = warp + j * kDecodeWarps;
      const float low = fast_exp2(fmaf(scores[j][0][2 * half], kLog2E, -shift.binary));
      const float high = fast_exp2(fmaf(scores[j][0][2 * half + 1], kLog2E, -shift.binary));
      uint16_t* weights = shared.weights[8 * half + g] + tile * 8 + 2 * t;
      *reinterpret_cast<uint32_t*>(weights) = round_pair(low, high);
      float total = low + high;
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      if (t == 0) shared.totals[8 * half + g][tile] = total;
    }
  }
  __syncthreads();

  float totals[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) totals[half] += shared.totals[8 * half + g][tile];
  }
  float* y = a.y.row(segment.row) + kv_head * a.group * dim;
  const int first_head = kv_head * a.group;
#pragma unroll 1
  for (int first = warp * 8; first < dim; first += kDecodeWarps * 8) {
    float sums[2][4] = {};
#pragma unroll 2
    for (int key = 0; key < visible; key += 32) {
      uint32_t rows[2][4];
      uint32_t columns[4];
      load_matrices(rows[0], &shared.weights[a_row][a_column + key]);
      load_matrices(rows[1], &shared.weights[a_row][a_column + key + 16]);
      load_transposed(columns, &shared.values[key + lane][first]);
      mma<MmaType::kBF16>(sums[0], rows[0], columns);
      mma<MmaType::kBF16>(sums[1], rows[1], columns + 2);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int row = c / 2 * 8 + g;
      if (row >= a.group) continue;
      const int d = first + 2 * t + c % 2;
      const float sum = sums[0][c] + sums[1][c];
      if (parts == 1) {
        y[row * dim + d] = sum / totals[c / 2];
        continue;
      }
      float* partial = a.partial + a.partial_at(token, first_head + row, part, dim);
      partial[2 + d] = sum;
      if (d == 0) {
        partial[0] = top_scores[c / 2];
        partial[1] = totals[c / 2];
      }
    }
  }
  if (parts == 1) return;

  __syncthreads();
  if (thread == 0) {
    __threadfence();  // what all of the block's threads have written by then
    int* arrived = a.arrived + token * layer.kv_heads + kv_head;
    shared.is_last = atomicAdd(arrived, 1) == parts - 1;
    if (shared.is_last) *arrived = 0;
    __threadfence();
  }
  __syncthreads();
  if (!shared.is_last) return;
  for (int i = thread; i < a.group * dim; i += kDecodeThreads) {
    const int row = i / dim;
    const int d = i % dim;
    const float* partial = a.partial + a.partial_at(token, first_head + row, 0, dim);
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
