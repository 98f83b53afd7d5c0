// kv_store and attention of one new token a sequence in one kernel, for caches of bfloat16: decoding. A block has 128 keys, at an
// absolute position, of one key/value head of a token, for all of the query heads that share it, which are the rows of products on
// the tensor cores: both are read once. Its warps share out tiles of 8 keys, then tiles of 8 dimensions. The block that has the new
// token's position rotates, rounds and stores its key and value. Blocks leave their parts in memory, and the last one to do so merges
// them in order: neither which one that is nor how many warps there are changes any bits. Bound by the cache's memory.
#include "cuda/attention_parts.h"
#include "cuda/mma.h"
#include "cuda/rotation.h"

namespace llama_ext::cuda {
namespace {

constexpr int kDecodeWarps = 8;
constexpr int kDecodeThreads = kDecodeWarps * static_cast<int>(kWarp);
constexpr int kDecodeKeys = 128;
constexpr int kQueryRows = 16;  // of the products; the most heads that share keys and values
constexpr int kKeyTiles = kDecodeKeys / 8;

template <int kDim>
struct DecodeShared {
  static constexpr int kPitch = kDim + 8;  // rows do not meet in a bank
  static constexpr int kWeightPitch = kDecodeKeys + 8;
  uint16_t queries[kQueryRows][kPitch];
  uint16_t values[kDecodeKeys][kPitch];
  union {
    uint16_t keys[kDecodeKeys][kPitch];
    uint16_t weights[kQueryRows][kWeightPitch];  // once the keys have been used
  };
  float largest[kQueryRows][kKeyTiles];
  float totals[kQueryRows][kKeyTiles];
  int is_last;
};

struct DecodeView {
  AttentionView attention;
  KvRowsView rows;
  int* arrived = nullptr;  // (tokens, K): parts that are there; zeros, before and after
};

template <int kDim>
__global__ void __launch_bounds__(kDecodeThreads) attention_decode_kernel(const __grid_constant__ DecodeView view) {
  auto& shared = *reinterpret_cast<DecodeShared<kDim>*>(shared_memory());
  const auto thread = static_cast<int>(threadIdx.x);
  const auto token = static_cast<int>(blockIdx.x);
  const auto kv_head = static_cast<int>(blockIdx.y);
  const auto part = static_cast<int>(blockIdx.z);
  const AttentionView& a = view.attention;
  const KvSegmentView& segment = a.segments.of[token];
  const KvLayerView& layer = segment.layer;
  const int64_t position = segment.first_position();
  const int parts = static_cast<int>(position / kDecodeKeys) + 1;
  if (part >= parts) return;
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
#pragma unroll
  for (int key = thread / kVectors; key < kDecodeKeys; key += kAtOnce) {
    if (key == stored) continue;  // the new one, if it belongs here
    const bool is_there = key < stored && vector * 8 < dim;
    const int64_t at = is_there ? vector_at + int64_t{key} * layer.row_bytes : first_at;
    copy_async(&shared.keys[key][vector * 8], layer.keys + at, is_there);
    copy_async(&shared.values[key][vector * 8], layer.values + at, is_there);
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
  const float* cosines = view.rows.cosines + angles;
  const float* sines = view.rows.sines + angles;
  static_assert(kDim <= kDecodeThreads);
  float turn[2] = {};
  if (has_new && thread < half_dim) {
    turn[0] = cosines[thread];
    turn[1] = sines[thread];
  }
  wait_for_predecessors();

  // All loads before the first store: each wait for one would be a microsecond's half.
  float new_key[2] = {};
  float new_value = 0.0f;
  if (has_new && thread < half_dim) {
    const float* k = view.rows.k.row(segment.row) + kv_head * dim;
    new_key[0] = k[thread];
    new_key[1] = k[thread + half_dim];
  }
  if (has_new && thread < dim) new_value = view.rows.v.row(segment.row)[kv_head * dim + thread];
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
    if (thread < kDim) {
      shared.values[stored][thread] = to_bf16(new_value);
      if (thread < dim) reinterpret_cast<uint16_t*>(layer.values + at)[thread] = shared.values[stored][thread];
      if (thread >= dim) shared.keys[stored][thread] = 0;
    }
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
      float* partial = a.partial + partial_at(a, token, first_head + row, part, dim);
      partial[2 + d] = sum;
      if (d == 0) {
        partial[0] = top_scores[c / 2];
        partial[1] = totals[c / 2];
      }
    }
  }
  if (parts == 1) return;

  __threadfence();
  __syncthreads();
  if (thread == 0) {
    int* arrived = view.arrived + token * layer.kv_heads + kv_head;
    shared.is_last = atomicAdd(arrived, 1) == parts - 1;
    if (shared.is_last) *arrived = 0;
  }
  __syncthreads();
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

template <int kDim>
void start(const Gpu& gpu, const DecodeView& view) {
  const AttentionView& a = view.attention;
  const KvLayerView& layer = a.segments.of[0].layer;
  divide_alike(gpu, attention_decode_kernel<kDim>);
  launch<Start::kEarly>(gpu, attention_decode_kernel<kDim>,
                        dim3(static_cast<unsigned>(a.segments.tokens), static_cast<unsigned>(layer.kv_heads),
                             static_cast<unsigned>(a.parts)),
                        kDecodeThreads, sizeof(DecodeShared<kDim>), view);
}

}  // namespace

bool has_attention_decode(const KvSegmentView* segments, int64_t count, int heads) {
  for (int64_t i = 0; i < count; ++i) {
    if (segments[i].tokens != 1 || (segments[i].position + 1) > int64_t{65535} * kDecodeKeys) return false;
  }
  const KvLayerView& layer = segments[0].layer;
  return layer.kind == KvKind::kBF16 && layer.head_dim % 8 == 0 && layer.head_dim <= 128 &&
         heads / layer.kv_heads <= kQueryRows && layer.kv_heads <= kMostDecodeHeads;
}

void attention_decode(const Gpu& gpu, const KvSegmentView* segments, int64_t count, const KvRowsView& rows, Rows q,
                      int heads, float scale, Rows y, int* arrived) {
  for_each_list(segments, count, [&](const SegmentList& list) {
    const KvLayerView& layer = list.of[0].layer;
    DecodeView view;
    AttentionView& a = view.attention;
    a.segments = list;
    a.q = q;
    a.y = y;
    a.heads = heads;
    a.group = heads / layer.kv_heads;
    a.scale = scale;
    a.parts = static_cast<int>(blocks_for(longest_row(list), kDecodeKeys));
    view.rows = rows;
    view.arrived = arrived;
    const int64_t numbers = a.parts > 1 ? list.tokens * heads * a.parts * (layer.head_dim + 2) : 0;
    const Scratch partial(gpu, static_cast<size_t>(numbers) * sizeof(float));
    a.partial = partial.as<float>();
    layer.head_dim <= 64 ? start<64>(gpu, view) : start<128>(gpu, view);
  });
}

}  // namespace llama_ext::cuda
