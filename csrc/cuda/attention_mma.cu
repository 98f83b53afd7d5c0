// Attention on the tensor cores, for caches of bfloat16 or int8 whose queries and weights may be rounded to bfloat16. As in
// FlashAttention-2, a warp keeps 16 rows of queries and their running softmax in registers, and keys and values pass through
// shared memory 64 at a time in two stages. A row is a query head of a token: the heads that share a key/value head lie next to
// each other, so that both are read once for all of them, when decoding too. A block has 4 warps, or 1 where few tokens
// come.
//
// Every 256 keys, at absolute positions, what was summed is merged into the rest (attention_parts.h): by the block itself, or, where
// few blocks would leave the GPU idle, by a second kernel after blocks that had 256 keys each. So a row's bits depend neither on the
// split nor on the other rows. Only numbers that are not finite spoil the earlier tokens of a block: a weight of 0 times
// infinity. Bound by the tensor cores, or by the cache's memory when decoding.
#include <vector>

#include "cuda/attention_parts.h"
#include "cuda/mma.h"

namespace llama_ext::cuda {
namespace {

constexpr int kTileKeys = 64;
constexpr int kPartKeys = kAttentionPartKeys;
static_assert(kPartKeys % kTileKeys == 0);
constexpr int kSteps = kTileKeys / 16;  // of 16 keys
constexpr int kScores = kTileKeys / 8;  // products of 8 keys

struct Place {
  int segment;
  int64_t token;       // of the segment, the block's first
  int64_t pass_token;  // of all
};

/// Tokens of a block: their heads fill its rows.
__host__ __device__ constexpr int tokens_per_block(int rows, int group) { return rows / group; }

__device__ __forceinline__ Place find_block(const SegmentList& segments, int64_t block, int tokens) {
  Place place{0, 0, 0};
  for (;; ++place.segment) {
    const int64_t all = segments.of[place.segment].tokens;
    const int64_t blocks = (all + tokens - 1) / tokens;
    if (block < blocks) break;
    block -= blocks;
    place.pass_token += all;
  }
  place.token = block * tokens;
  place.pass_token += place.token;
  return place;
}

template <KvKind kKind, int kDim, int kWarps>
struct Tiles {
  static constexpr int kThreadCount = kWarps * static_cast<int>(kWarp);
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kPitch = kDim + 8;  // rows do not meet in a bank
  static constexpr int kTile = kTileKeys * kPitch;
  static constexpr int kScaleBytes = kKind == KvKind::kI8 ? 2 * 2 * kTileKeys * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kBytes = (kRows * kPitch + 4 * kTile) * 2 + kScaleBytes;

  uint16_t* queries;  // (kRows, kPitch)
  uint16_t* stages;   // two of (keys, values), each (kTileKeys, kPitch)
  float* scales;      // two of (keys, values), of int8

  __device__ __forceinline__ uint16_t* keys(int stage) const { return stages + 2 * stage * kTile; }
  __device__ __forceinline__ uint16_t* values(int stage) const { return keys(stage) + kTile; }
  __device__ __forceinline__ float* key_scales(int stage) const { return scales + 2 * stage * kTileKeys; }
  __device__ __forceinline__ float* value_scales(int stage) const { return key_scales(stage) + kTileKeys; }

  /// Starts to bring keys [first, first + 64) and their values; zeros from `end` on.
  __device__ __forceinline__ void bring(const KvLayerView& layer, int kv_head, int64_t first, int64_t end,
                                        int stage) const {
    constexpr int kElements = 16 / element_bytes(kKind);  // of 16 bytes
    constexpr int kVectors = kDim / kElements;
    const int padded = layer.row_bytes / 16;
    for (int i = static_cast<int>(threadIdx.x); i < kTileKeys * kVectors; i += kThreadCount) {
      const int key = i / kVectors;
      const int vector = i % kVectors;
      const bool is_there = first + key < end && vector < padded;
      const int64_t at =
          layer.row(kv_head, is_there ? first + key : 0) * layer.row_bytes + (is_there ? vector * 16 : 0);
      const int to = key * kPitch + vector * kElements;
      if constexpr (kKind == KvKind::kBF16) {
        copy_async(keys(stage) + to, layer.keys + at, is_there);
        copy_async(values(stage) + to, layer.values + at, is_there);
      } else {
        widen(layer.keys + at, is_there, keys(stage) + to);
        widen(layer.values + at, is_there, values(stage) + to);
      }
    }
    if constexpr (kKind == KvKind::kI8) {
      for (int key = static_cast<int>(threadIdx.x); key < kTileKeys; key += kThreadCount) {
        const bool is_there = first + key < end;
        const int64_t at = layer.row(kv_head, is_there ? first + key : 0);
        key_scales(stage)[key] = is_there ? layer.key_scales[at] : 0.0f;
        value_scales(stage)[key] = is_there ? layer.value_scales[at] : 0.0f;
      }
    }
    commit_copies();
  }

  /// 16 codes as bfloat16, exactly.
  __device__ __forceinline__ static void widen(const unsigned char* from, bool is_there, uint16_t* to) {
    uint4 words{0, 0, 0, 0};
    if (is_there) words = *reinterpret_cast<const uint4*>(from);
    const uint32_t all[4] = {words.x, words.y, words.z, words.w};
    uint32_t pairs[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = all[i / 2] >> (16 * (i % 2));
      pairs[i] = pack_bf16(static_cast<float>(static_cast<signed char>(word)),
                           static_cast<float>(static_cast<signed char>(word >> 8)));
    }
    reinterpret_cast<uint4*>(to)[0] = {pairs[0], pairs[1], pairs[2], pairs[3]};
    reinterpret_cast<uint4*>(to)[1] = {pairs[4], pairs[5], pairs[6], pairs[7]};
  }
};

template <KvKind kKind, int kDim, int kWarps>
__global__ void __launch_bounds__(kWarps * 32) attention_mma_kernel(const __grid_constant__ AttentionView a) {
  using T = Tiles<kKind, kDim, kWarps>;
  constexpr int kPitchWords = T::kPitch / 2;
  constexpr int kProducts = kDim / 8;  // of 8 dimensions
  wait_for_predecessors();
  T tiles;
  tiles.queries = reinterpret_cast<uint16_t*>(shared_memory());
  tiles.stages = tiles.queries + T::kRows * T::kPitch;
  tiles.scales = reinterpret_cast<float*>(tiles.stages + 4 * T::kTile);

  const int tokens = tokens_per_block(T::kRows, a.group);
  const Place place = find_block(a.segments, blockIdx.x, tokens);
  const KvSegmentView& segment = a.segments.of[place.segment];
  const KvLayerView& layer = segment.layer;
  const int dim = layer.head_dim;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int64_t left = segment.tokens - place.token;
  const int rows = (left < tokens ? static_cast<int>(left) : tokens) * a.group;  // in use
  // Keys that any of the rows sees.
  const int64_t position = segment.first_position();
  const int64_t end_key = position + place.token + rows / a.group;
  const int64_t first_key = a.parts == 0 ? 0 : int64_t{blockIdx.z} * kPartKeys;
  const int64_t last_key = a.parts == 0 || first_key + kPartKeys > end_key ? end_key : first_key + kPartKeys;
  if (first_key >= last_key) return;

  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int g = lane / 4;
  const int t = lane % 4;
  for (int i = static_cast<int>(threadIdx.x); i < T::kRows * kDim; i += T::kThreadCount) {
    const int row = i / kDim;
    const int d = i % kDim;
    float value = 0.0f;
    if (row < rows && d < dim) {
      value = a.q.row(segment.row + place.token + row / a.group)[(kv_head * a.group + row % a.group) * dim + d];
    }
    tiles.queries[row * T::kPitch + d] = to_bf16(value);
  }

  // A lane has two rows.
  int64_t visible[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + 8 * half + g;
    visible[half] = row < rows ? position + place.token + row / a.group + 1 : 0;
  }
  float merged[kProducts][4];
  float merged_largest[2] = {-INFINITY, -INFINITY};
  float merged_sums[2] = {0.0f, 0.0f};
  float found[kProducts][4];
  float largest[2];
  float sums[2];

  tiles.bring(layer, kv_head, first_key, last_key, 0);
  int stage = 0;
  for (int64_t first = first_key; first < last_key; first += kTileKeys, stage ^= 1) {
    wait_for_copies<0>();
    __syncthreads();  // this stage is complete, and nobody reads the other one any more
    if (first + kTileKeys < last_key) tiles.bring(layer, kv_head, first + kTileKeys, last_key, stage ^ 1);
    if (first % kPartKeys == 0) {
#pragma unroll
      for (int j = 0; j < kProducts; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) found[j][c] = 0.0f;
      }
      largest[0] = largest[1] = -INFINITY;
      sums[0] = sums[1] = 0.0f;
    }

    float scores[kScores][4];
#pragma unroll
    for (int j = 0; j < kScores; ++j) scores[j][0] = scores[j][1] = scores[j][2] = scores[j][3] = 0.0f;
    const auto* q_words = reinterpret_cast<const uint32_t*>(tiles.queries) + (warp * 16 + g) * kPitchWords + t;
    const auto* k_words = reinterpret_cast<const uint32_t*>(tiles.keys(stage)) + g * kPitchWords + t;
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      const uint32_t q[4] = {q_words[step * 8], q_words[8 * kPitchWords + step * 8], q_words[step * 8 + 4],
                             q_words[8 * kPitchWords + step * 8 + 4]};
#pragma unroll
      for (int j = 0; j < kScores; ++j) {
        const uint32_t* at = k_words + j * 8 * kPitchWords + step * 8;
        const uint32_t k[2] = {at[0], at[4]};
        mma<MmaType::kBF16>(scores[j], q, k);
      }
    }

    // Scores of int8 keys are scaled here, others with the exponential.
    const float scale = kKind == KvKind::kI8 ? 1.0f : a.scale;
    float top[2] = {largest[0], largest[1]};
#pragma unroll
    for (int j = 0; j < kScores; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int key = j * 8 + 2 * t + c % 2;
        if constexpr (kKind == KvKind::kI8) scores[j][c] *= a.scale * tiles.key_scales(stage)[key];
        if (first + key >= visible[c / 2]) scores[j][c] = -INFINITY;
        top[c / 2] = fmaxf(top[c / 2], scores[j][c] * scale);
      }
    }
    uint32_t weights[kScores][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(kAllLanes, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(kAllLanes, top[half], 2));
      const AttentionShift shift(top[half]);
      const float factor = fast_exp(largest[half] - shift.natural);
      largest[half] = top[half];
      sums[half] *= factor;
#pragma unroll
      for (int j = 0; j < kProducts; ++j) {
        found[j][2 * half] *= factor;
        found[j][2 * half + 1] *= factor;
      }
#pragma unroll
      for (int j = 0; j < kScores; ++j) {
        float low = attention_weight(scores[j][2 * half], scale * kLog2E, shift);
        float high = attention_weight(scores[j][2 * half + 1], scale * kLog2E, shift);
        sums[half] += low + high;
        if constexpr (kKind == KvKind::kI8) {
          low *= tiles.value_scales(stage)[j * 8 + 2 * t];
          high *= tiles.value_scales(stage)[j * 8 + 2 * t + 1];
        }
        weights[j][half] = round_pair(low, high);
      }
    }
    const uint16_t* v_rows = tiles.values(stage) + (lane / 8 % 2 * 8 + lane % 8) * T::kPitch + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t p[4] = {weights[2 * step][0], weights[2 * step][1], weights[2 * step + 1][0],
                             weights[2 * step + 1][1]};
#pragma unroll
      for (int j = 0; j < kProducts; j += 2) {
        uint32_t v[4];
        load_transposed(v, v_rows + step * 16 * T::kPitch + j * 8);
        mma<MmaType::kBF16>(found[j], p, v);
        mma<MmaType::kBF16>(found[j + 1], p, v + 2);
      }
    }

    if ((first + kTileKeys) % kPartKeys != 0 && first + kTileKeys < last_key) continue;
    // The end of a part.
    const bool is_first_part = first < first_key + kPartKeys;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sums[half] += __shfl_xor_sync(kAllLanes, sums[half], 1);
      sums[half] += __shfl_xor_sync(kAllLanes, sums[half], 2);
      MergeFactors factors{largest[half], 0.0f, 1.0f};
      if (!is_first_part) factors = merge_factors(merged_largest[half], largest[half]);
      merged_sums[half] = is_first_part ? sums[half] : merge(merged_sums[half], sums[half], factors);
      merged_largest[half] = factors.largest;
#pragma unroll
      for (int j = 0; j < kProducts; ++j) {
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
          merged[j][c] = is_first_part ? found[j][c] : merge(merged[j][c], found[j][c], factors);
        }
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + 8 * half + g;
    if (row >= rows || (a.parts != 0 && first_key >= visible[half])) continue;
    const int64_t token = row / a.group;
    const int head = kv_head * a.group + row % a.group;
    float* to = a.y.row(segment.row + place.token + token) + head * dim;
    float factor = 1.0f / merged_sums[half];
    if (a.parts != 0) {
      to = a.partial + partial_at(a, place.pass_token + token, head, static_cast<int>(blockIdx.z), dim) + 2;
      if (t == 0) {
        to[-2] = merged_largest[half];
        to[-1] = merged_sums[half];
      }
      factor = 1.0f;
    }
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int d = j * 8 + 2 * t + c;
        if (d < dim) to[d] = merged[j][2 * half + c] * factor;
      }
    }
  }
}

template <KvKind kKind, int kDim, int kWarps>
void start(const Gpu& gpu, const AttentionView& a) {
  using T = Tiles<kKind, kDim, kWarps>;
  const unsigned kv_heads = static_cast<unsigned>(a.segments.of[0].layer.kv_heads);
  const auto blocks_of = [](const AttentionView& view) {
    const int tokens = tokens_per_block(T::kRows, view.group);
    int64_t blocks = 0;
    for (int i = 0; i < view.segments.count; ++i) blocks += blocks_for(view.segments.of[i].tokens, tokens);
    return blocks;
  };
  const auto start_blocks = [&](const AttentionView& view) {
    launch<Start::kEarly>(gpu, attention_mma_kernel<kKind, kDim, kWarps>,
                          dim3(static_cast<unsigned>(blocks_of(view)), kv_heads,
                               view.parts == 0 ? 1u : static_cast<unsigned>(view.parts)),
                          T::kThreadCount, T::kBytes, view);
  };
  const int64_t parts = blocks_for(longest_row(a.segments), kPartKeys);
  const bool splits =
      parts > 1 && parts <= 65535 && blocks_of(a) * kv_heads < 2 * static_cast<int64_t>(gpu.multiprocessors());
  splits ? split_keys(gpu, a, kPartKeys, start_blocks) : start_blocks(a);
}

template <KvKind kKind, int kDim>
void start_warps(const Gpu& gpu, const AttentionView& a) {
  int64_t most = 0;
  for (int i = 0; i < a.segments.count; ++i) {
    if (a.segments.of[i].tokens > most) most = a.segments.of[i].tokens;
  }
  if (a.group <= 16 && most * a.group <= 16) return start<kKind, kDim, 1>(gpu, a);
  start<kKind, kDim, 4>(gpu, a);
}

template <KvKind kKind>
void start_dim(const Gpu& gpu, const AttentionView& a) {
  if (a.segments.of[0].layer.head_dim <= 64) return start_warps<kKind, 64>(gpu, a);
  start_warps<kKind, 128>(gpu, a);
}

}  // namespace

bool has_attention_mma(KvKind kind, int head_dim, int group) {
  return kind != KvKind::kF32 && head_dim <= 128 && group <= 64;
}

void attention_mma(const Gpu& gpu, const KvSegmentView* segments, int64_t count, Rows q, int heads, float scale,
                   Rows y) {
  std::vector<KvSegmentView> others;
  for (int64_t i = 0; i < count; ++i) {
    if (has_attention_wgmma(gpu, segments[i], heads, scale)) {
      attention_wgmma(gpu, segments[i], q, heads, scale, y);
    } else {
      others.push_back(segments[i]);
    }
  }
  for_each_list(others.data(), static_cast<int64_t>(others.size()), [&](const SegmentList& list) {
    AttentionView a;
    a.segments = list;
    a.q = q;
    a.y = y;
    a.heads = heads;
    a.group = heads / list.of[0].layer.kv_heads;
    a.scale = scale;
    if (list.of[0].layer.kind == KvKind::kBF16) return start_dim<KvKind::kBF16>(gpu, a);
    start_dim<KvKind::kI8>(gpu, a);
  });
}

}  // namespace llama_ext::cuda
