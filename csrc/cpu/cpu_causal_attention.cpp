// Attention of whole sequences and its gradient, for training: which rows meet which keys when. The arithmetic is the float32
// product (kernels/gemm.h) and kernels/softmax_gradients.h.
//
// A unit is a key/value head of a sequence with the query heads that share it, so that sums over rows need no other thread.
// Its keys and values are packed once as panels. A block of rows of a head then meets the keys it sees: scores for all of them
// in a scratch, their softmax, their weighted values. Whatever the mask hides is skipped tile by tile of rows. The gradient
// goes by blocks of rows and of keys, whose scores are computed once more from the saved log_sums.
#include <algorithm>
#include <cstring>

#include "core/interrupt.h"
#include "cpu/cpu_backend_internal.h"
#include "cpu/thread_pool.h"

namespace llama_ext {
namespace {

// Rows of a block, about; of the gradient, whose sums over rows are longer for it.
constexpr int64_t kForwardRows = 64;
constexpr int64_t kBackwardRows = 96;
// Keys of a product with values, or with scores' gradients: their panel lies in the L1 cache.
constexpr int64_t kKeys = 128;
// A unit of so many tokens takes long enough to ask whether to go on.
constexpr int64_t kLongSequence = 1024;
// Rows of scores must not meet in the same sets of a cache.
constexpr int64_t kSkew = 16;

/// Sizes that both directions share.
struct Sizes {
  int64_t heads;
  int64_t kv_heads;
  int64_t group;
  int64_t dim;
  int64_t padded;  // dim in whole panels
  int64_t tile;    // rows

  int64_t panels() const { return padded / kPanel; }
};

template <typename Args>
Sizes sizes_of(const Args& args, const GemmKernel& kernel) {
  const int64_t heads = args.q.dim(1);
  const int64_t kv_heads = args.k.dim(1);
  return {heads, kv_heads, heads / kv_heads, args.q.dim(2), round_up(args.q.dim(2), kPanel), kernel.tile_rows};
}

/// Rows of a block: of equal blocks of a sequence, whole tiles.
int64_t block_rows(int64_t tokens, int64_t about, int64_t tile) {
  return round_up(ceil_div(tokens, std::max<int64_t>(1, ceil_div(tokens, about))), tile);
}

int64_t longest_of(const std::vector<RowRange>& sequences) {
  int64_t longest = 0;
  for (const RowRange& sequence : sequences) longest = std::max(longest, sequence.tokens);
  return longest;
}

/// Multiply-adds of one product of all queries with the keys they see.
double multiply_adds_of(const std::vector<RowRange>& sequences, const Sizes& sizes) {
  double pairs = 0;
  for (const RowRange& sequence : sequences) {
    pairs += 0.5 * static_cast<double>(sequence.tokens) * static_cast<double>(sequence.tokens + 1);
  }
  return pairs * static_cast<double>(sizes.heads * sizes.dim);
}

/// Hands out floats of a worker's memory, each piece from a cache line on.
class Pieces {
 public:
  explicit Pieces(float* memory) : memory_(memory) {}
  float* take(int64_t floats) {
    float* piece = memory_ + used_;
    used_ += round_up(floats, 16);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

DropoutRow dropout_of(double p, uint64_t seed) {
  return {.seed = seed, .threshold = dropout_threshold(p), .factor = static_cast<float>(1.0 / (1.0 - p))};
}

/// The first row of a block, in whole tiles, that sees `key`. begin: the block's first token.
int64_t first_row(int64_t key, int64_t begin, int64_t tile) { return key <= begin ? 0 : (key - begin) / tile * tile; }

/// One head's rows [row, row + count) of a tensor (M, heads, D).
struct HeadRows {
  float* data;
  int64_t stride;

  HeadRows(const TensorView& view, int64_t head, int64_t row)
      : data(view.row<float>(row) + head * view.dim(2)), stride(view.row_stride()) {}
  float* at(int64_t row) const { return data + row * stride; }
};

}  // namespace

// The pieces of a unit's work that both directions have.
struct CpuBackend::AttentionOperands {
  const KernelTable& kernels;
  const Sizes sizes;

  /// Keys, or values, as columns: [count / 32][D][32].
  void pack_as_columns(const HeadRows& rows, int64_t count, float* panels) const {
    for (int64_t row = 0; row < count; row += kPanel) {
      const int64_t width = std::min(kPanel, count - row);
      float* to = panels + row * sizes.dim;
      if (width < kPanel) std::fill(to, to + kPanel * sizes.dim, 0.0f);
      kernels.training.transpose(rows.at(row), rows.stride, width, sizes.dim, to, kPanel);
    }
  }
  /// The same as rows: [D / 32][stride][32].
  void pack_as_rows(const HeadRows& rows, int64_t count, int64_t stride, float* panels) const {
    for (int64_t column = 0; column < sizes.dim; column += kPanel) {
      kernels.training.pack_panel(rows.data + column, rows.stride, count, std::min(kPanel, sizes.dim - column),
                                  panels + column * stride);
    }
  }
  /// Tiles of rows, to be multiplied by columns.
  void pack_tiles(const HeadRows& rows, int64_t count, float* tiles) const {
    for (int64_t row = 0; row < count; row += sizes.tile) {
      kernels.f32.pack({rows.at(row), rows.stride, std::min(sizes.tile, count - row), sizes.dim, sizes.dim, 0,
                        tiles + row * sizes.dim});
    }
  }
  /// Products of a block of rows, from token `begin` on, with the keys [first, last) that some of them see; row 0, key `first`
  /// at out. columns: from key 0 on; first: a multiple of 32.
  void multiply_seen(const float* tiles, int64_t begin, int64_t rows, const float* columns, int64_t first, int64_t last,
                     float* out, int64_t stride) const {
    for (int64_t key = first; key < last; key += kPanel) {
      const int64_t row = first_row(key, begin, sizes.tile);
      kernels.f32.panel({rows - row, sizes.dim, 0, tiles + row * sizes.dim, columns + key * sizes.dim,
                         out + row * stride + key - first, stride, false, nullptr, 0});
    }
  }
};

void CpuBackend::causal_attention(const CausalAttentionArgs& args) {
  check(args);
  const GemmKernel& kernel = kernels_.f32;
  const AttentionOperands operands{kernels_, sizes_of(args, kernel)};
  const Sizes& sizes = operands.sizes;
  const int64_t longest = longest_of(args.sequences);
  if (longest == 0 || sizes.heads == 0) return;
  const int threads = threads_for(2.0 * multiply_adds_of(args.sequences, sizes) / 20e3);
  const int64_t units = static_cast<int64_t>(args.sequences.size()) * sizes.kv_heads;
  // Few units are split into every parts-th block of rows; a row does not notice.
  const int64_t parts = threads == 1 || units >= 2 * threads ? 1 : ceil_div(4 * threads, units);

  const int64_t padded_keys = round_up(longest, kPanel);
  const int64_t most_rows = round_up(kForwardRows, sizes.tile) + sizes.tile;
  const int64_t stride = padded_keys + kSkew;
  struct Memory {
    float *keys, *values, *q, *scores, *weights, *sums, *factors;
  };
  const auto divide = [&](Pieces& pieces) {
    Memory memory;
    memory.keys = pieces.take(padded_keys * sizes.dim);
    memory.values = pieces.take(padded_keys * sizes.padded);
    memory.q = pieces.take(most_rows * sizes.dim);
    memory.scores = pieces.take(most_rows * stride);
    memory.weights = pieces.take(most_rows * padded_keys);
    memory.sums = pieces.take(most_rows * sizes.padded);
    memory.factors = pieces.take(most_rows);
    return memory;
  };
  Pieces measured(nullptr);
  divide(measured);
  const int64_t worker_floats = measured.used();
  auto* workers = static_cast<float*>(
      thread_scratch(Scratch::kAttention, static_cast<size_t>(threads * worker_floats) * sizeof(float)));
  const DropoutRow dropout = dropout_of(args.dropout, args.seed);
  const auto scale = static_cast<float>(args.scale);

  parallel_for(threads, units * parts, [&](int64_t task, int worker) {
    const int64_t unit = task / parts;
    const RowRange& sequence = args.sequences[static_cast<size_t>(unit / sizes.kv_heads)];
    const int64_t kv_head = unit % sizes.kv_heads;
    const int64_t block = block_rows(sequence.tokens, kForwardRows, sizes.tile);
    const int64_t blocks = sequence.tokens == 0 ? 0 : ceil_div(sequence.tokens, block);
    const int64_t part = task % parts;
    if (part >= blocks) return;
    Pieces pieces(workers + worker * worker_floats);
    const Memory memory = divide(pieces);
    const int64_t last_block = part + (blocks - 1 - part) / parts * parts;
    const int64_t all_keys = std::min(sequence.tokens, (last_block + 1) * block);
    operands.pack_as_columns(HeadRows(args.k, kv_head, sequence.row), all_keys, memory.keys);
    operands.pack_as_rows(HeadRows(args.v, kv_head, sequence.row), all_keys, padded_keys, memory.values);

    for (int64_t head = kv_head * sizes.group; head < (kv_head + 1) * sizes.group; ++head) {
      for (int64_t index = part; index < blocks; index += parts) {
        if (sequence.tokens > kLongSequence) throw_if_interrupted();
        const int64_t begin = index * block;
        const int64_t rows = std::min(block, sequence.tokens - begin);
        const int64_t first = sequence.row + begin;
        operands.pack_tiles(HeadRows(args.q, head, first), rows, memory.q);
        operands.multiply_seen(memory.q, begin, rows, memory.keys, 0, begin + rows, memory.scores, stride);
        for (int64_t row = 0; row < rows; row += sizes.tile) {
          const int64_t height = std::min(sizes.tile, rows - row);
          const int64_t depth = begin + row + height;
          for (int64_t r = row; r < row + height; ++r) {
            DropoutRow of_row = dropout;
            of_row.index = static_cast<uint64_t>((first + r) * sizes.heads + head) * kMostAttentionTokens;
            memory.factors[r] =
                kernels_.training.attention_softmax({memory.scores + r * stride, begin + r + 1, depth, scale, of_row,
                                                     args.log_sums.f32() + (first + r) * sizes.heads + head});
          }
          kernel.pack(
              {memory.scores + row * stride, stride, height, depth, depth, 0, memory.weights + row * padded_keys});
        }
        for (int64_t key = 0; key < begin + rows; key += kKeys) {
          for (int64_t panel = 0; panel < sizes.panels(); ++panel) {
            const float* values = memory.values + (panel * padded_keys + key) * kPanel;
            for (int64_t row = first_row(key, begin, sizes.tile); row < rows; row += sizes.tile) {
              const int64_t height = std::min(sizes.tile, rows - row);
              const int64_t depth = std::min(kKeys, begin + row + height - key);
              kernel.panel({height, depth, 0, memory.weights + row * padded_keys + key * height, values,
                            memory.sums + row * sizes.padded + panel * kPanel, sizes.padded, key > 0, nullptr, 0});
            }
          }
        }
        const HeadRows y(args.y, head, first);
        for (int64_t row = 0; row < rows; ++row) {
          kernels_.training.scale(memory.sums + row * sizes.padded, sizes.dim, memory.factors[row], y.at(row));
        }
      }
    }
  });
}

/// Which gradients a task computes: those of every `parts`-th block of rows, or of keys, from `part` on.
struct CpuBackend::AttentionShare {
  bool wants_q;
  bool wants_kv;
  int64_t part;
  int64_t parts;
};

void CpuBackend::attention_gradients(const CausalAttentionBackwardArgs& args, const RowRange& sequence, int64_t kv_head,
                                     const AttentionShare& share, float* memory) const {
  const GemmKernel& kernel = kernels_.f32;
  const AttentionOperands operands{kernels_, sizes_of(args, kernel)};
  const Sizes& sizes = operands.sizes;
  const int64_t tokens = sequence.tokens;
  const int64_t padded_keys = round_up(tokens, kPanel);
  const int64_t block = block_rows(tokens, kBackwardRows, sizes.tile);
  constexpr int64_t kStride = kKeys + kSkew;
  Pieces pieces(memory);
  float* keys = pieces.take(padded_keys * sizes.dim);
  float* values = pieces.take(padded_keys * sizes.dim);
  float* key_rows = pieces.take(padded_keys * sizes.padded);
  float* d_k = pieces.take(padded_keys * sizes.padded);
  float* d_v = pieces.take(padded_keys * sizes.padded);
  float* q_tiles = pieces.take(block * sizes.dim);
  float* d_y_tiles = pieces.take(block * sizes.dim);
  float* q_rows = pieces.take(block * sizes.padded);
  float* d_y_rows = pieces.take(block * sizes.padded);
  float* scores = pieces.take(block * kStride);
  float* d_scores = pieces.take(block * kStride);
  float* tile = pieces.take(sizes.tile * std::max(block, kKeys));
  float* d_q = pieces.take(block * sizes.padded);
  float* deltas = pieces.take(block);

  operands.pack_as_columns(HeadRows(args.k, kv_head, sequence.row), tokens, keys);
  operands.pack_as_columns(HeadRows(args.v, kv_head, sequence.row), tokens, values);
  if (share.wants_q) {
    operands.pack_as_rows(HeadRows(args.k, kv_head, sequence.row), tokens, padded_keys, key_rows);
  }
  if (share.wants_kv) {
    std::fill(d_k, d_k + tokens * sizes.padded, 0.0f);
    std::fill(d_v, d_v + tokens * sizes.padded, 0.0f);
  }
  const DropoutRow dropout = dropout_of(args.dropout, args.seed);
  const auto scale = static_cast<float>(args.scale);
  const bool by_keys = share.wants_kv && !share.wants_q;
  const int64_t row_step = by_keys ? 1 : share.parts;
  const int64_t key_step = by_keys ? share.parts * kKeys : kKeys;
  const int64_t first_key = by_keys ? share.part * kKeys : 0;

  // c[row of the tile][panel] (+)= tile x panel of `rows_of_panel` rows.
  const auto multiply_tile = [&](int64_t height, int64_t depth, const float* panels, int64_t panel_rows, float* c,
                                 bool accumulate) {
    for (int64_t panel = 0; panel < sizes.panels(); ++panel) {
      kernel.panel({height, depth, 0, tile, panels + panel * panel_rows * kPanel, c + panel * kPanel, sizes.padded,
                    accumulate, nullptr, 0});
    }
  };

  for (int64_t head = kv_head * sizes.group; head < (kv_head + 1) * sizes.group; ++head) {
    for (int64_t begin = by_keys ? 0 : share.part * block; begin < tokens; begin += row_step * block) {
      if (tokens > kLongSequence) throw_if_interrupted();
      const int64_t rows = std::min(block, tokens - begin);
      const int64_t first = sequence.row + begin;
      if (first_key >= begin + rows) continue;
      const HeadRows q(args.q, head, first);
      const HeadRows y(args.y, head, first);
      const HeadRows d_y(args.d_y, head, first);
      operands.pack_tiles(q, rows, q_tiles);
      operands.pack_tiles(d_y, rows, d_y_tiles);
      if (share.wants_kv) {
        operands.pack_as_rows(q, rows, block, q_rows);
        operands.pack_as_rows(d_y, rows, block, d_y_rows);
      }
      for (int64_t row = 0; row < rows; ++row) {
        deltas[row] = kernels_.training.dot(d_y.at(row), y.at(row), sizes.dim);
      }
      for (int64_t key0 = first_key; key0 < begin + rows; key0 += key_step) {
        const int64_t count = std::min(kKeys, begin + rows - key0);  // keys that some row sees
        operands.multiply_seen(q_tiles, begin, rows, keys, key0, key0 + count, scores, kStride);
        operands.multiply_seen(d_y_tiles, begin, rows, values, key0, key0 + count, d_scores, kStride);
        for (int64_t row = first_row(key0, begin, sizes.tile); row < rows; ++row) {
          DropoutRow of_row = dropout;
          of_row.index = static_cast<uint64_t>((first + row) * sizes.heads + head) * kMostAttentionTokens +
                         static_cast<uint64_t>(key0);
          kernels_.training.attention_gradient(
              {scores + row * kStride, d_scores + row * kStride, std::clamp<int64_t>(begin + row + 1 - key0, 0, count),
               count, scale, args.log_sums.f32()[(first + row) * sizes.heads + head], deltas[row], of_row});
        }
        for (int64_t row = first_row(key0, begin, sizes.tile); share.wants_q && row < rows; row += sizes.tile) {
          const int64_t height = std::min(sizes.tile, rows - row);
          const int64_t depth = std::min(count, begin + row + height - key0);
          kernel.pack({scores + row * kStride, kStride, height, depth, depth, 0, tile});
          multiply_tile(height, depth, key_rows + key0 * kPanel, padded_keys, d_q + row * sizes.padded, key0 > 0);
        }
        for (int64_t key = 0; share.wants_kv && key < count; key += sizes.tile) {
          const int64_t height = std::min(sizes.tile, count - key);
          const int64_t row = std::max<int64_t>(0, key0 + key - begin);  // the first that sees one of these keys
          const int64_t depth = rows - row;
          float* sums = d_k + (key0 + key) * sizes.padded;
          kernels_.training.pack_columns(scores + row * kStride + key, kStride, depth, height, tile);
          multiply_tile(height, depth, q_rows + row * kPanel, block, sums, true);
          sums = d_v + (key0 + key) * sizes.padded;
          kernels_.training.pack_columns(d_scores + row * kStride + key, kStride, depth, height, tile);
          multiply_tile(height, depth, d_y_rows + row * kPanel, block, sums, true);
        }
      }
      if (!share.wants_q) continue;
      const HeadRows target(args.d_q, head, first);
      for (int64_t row = 0; row < rows; ++row) {
        std::memcpy(target.at(row), d_q + row * sizes.padded, static_cast<size_t>(sizes.dim) * sizeof(float));
      }
    }
  }
  if (!share.wants_kv) return;
  const HeadRows to_k(args.d_k, kv_head, sequence.row);
  const HeadRows to_v(args.d_v, kv_head, sequence.row);
  for (int64_t key0 = first_key; key0 < tokens; key0 += key_step) {
    for (int64_t key = key0; key < std::min(tokens, key0 + kKeys); ++key) {
      const size_t bytes = static_cast<size_t>(sizes.dim) * sizeof(float);
      std::memcpy(to_k.at(key), d_k + key * sizes.padded, bytes);
      std::memcpy(to_v.at(key), d_v + key * sizes.padded, bytes);
    }
  }
}

void CpuBackend::causal_attention_backward(const CausalAttentionBackwardArgs& args) {
  check(args);
  const Sizes sizes = sizes_of(args, kernels_.f32);
  const int64_t longest = longest_of(args.sequences);
  if (longest == 0 || sizes.dim == 0) return;
  if (sizes.heads == 0) {  // nobody asked the keys anything
    for (const RowRange& sequence : args.sequences) {
      zero(args.d_k.slice_rows(sequence.row, sequence.tokens));
      zero(args.d_v.slice_rows(sequence.row, sequence.tokens));
    }
    return;
  }
  const int threads = threads_for(5.0 * multiply_adds_of(args.sequences, sizes) / 20e3);
  const int64_t units = static_cast<int64_t>(args.sequences.size()) * sizes.kv_heads;
  const int64_t padded_keys = round_up(longest, kPanel);
  const int64_t most_rows = round_up(kBackwardRows, sizes.tile) + sizes.tile;
  // What attention_gradients takes, at most, with room for its rounding to cache lines.
  const int64_t worker_floats = padded_keys * (2 * sizes.dim + 3 * sizes.padded) +
                                most_rows * (2 * sizes.dim + 3 * sizes.padded + 2 * (kKeys + kSkew) + 1) +
                                sizes.tile * std::max(most_rows, kKeys) + 14 * 16;
  const int64_t all_workers = threads * worker_floats;
  const bool splits = threads > 1 && units < 2 * threads;
  // Tasks that share a unit read what others would overwrite, where gradients replace q, k and v.
  const int64_t rows = args.q.dim(0);
  const int64_t q_floats = round_up(rows * sizes.heads * sizes.dim, 16);
  const int64_t k_floats = round_up(rows * sizes.kv_heads * sizes.dim, 16);
  const int64_t results = splits ? q_floats + 2 * k_floats : 0;
  auto* workers = static_cast<float*>(
      thread_scratch(Scratch::kAttention, static_cast<size_t>(all_workers + results) * sizeof(float)));
  const auto sequence_of = [&](int64_t unit) -> const RowRange& {
    return args.sequences[static_cast<size_t>(unit / sizes.kv_heads)];
  };
  if (!splits) {
    parallel_for(threads, units, [&](int64_t unit, int worker) {
      attention_gradients(args, sequence_of(unit), unit % sizes.kv_heads, {true, true, 0, 1},
                          workers + worker * worker_floats);
    });
    return;
  }
  // Few units: tasks of blocks of rows for d_q, and of blocks of keys for d_k and d_v, whose sums are the same chains.
  CausalAttentionBackwardArgs apart = args;
  float* memory = workers + all_workers;
  apart.d_q = TensorView(memory, DType::kF32, {rows, sizes.heads, sizes.dim});
  apart.d_k = TensorView(memory + q_floats, DType::kF32, {rows, sizes.kv_heads, sizes.dim});
  apart.d_v = TensorView(memory + q_floats + k_floats, DType::kF32, {rows, sizes.kv_heads, sizes.dim});
  const int64_t parts = ceil_div(4 * threads, units);
  parallel_for(threads, units * parts * 2, [&](int64_t task, int worker) {
    const int64_t unit = task / (2 * parts);
    const bool wants_q = task % 2 == 0;
    attention_gradients(apart, sequence_of(unit), unit % sizes.kv_heads, {wants_q, !wants_q, task / 2 % parts, parts},
                        workers + worker * worker_floats);
  });
  const auto copy = [](const TensorView& from, const TensorView& to, const RowRange& range) {
    for (int64_t row = range.row; row < range.row + range.tokens; ++row) {
      std::memcpy(to.row<float>(row), from.row<float>(row), static_cast<size_t>(from.inner_size()) * sizeof(float));
    }
  };
  parallel_for(threads, static_cast<int64_t>(args.sequences.size()), [&](int64_t index, int) {
    const RowRange& sequence = args.sequences[static_cast<size_t>(index)];
    copy(apart.d_q, args.d_q, sequence);
    copy(apart.d_k, args.d_k, sequence);
    copy(apart.d_v, args.d_v, sequence);
  });
}

}  // namespace llama_ext
