// Keys and values in their panels, and how attention is shared among threads. The arithmetic is in kernels/attention.h.
#include <algorithm>
#include <cstring>

#include "core/half.h"
#include "cpu/cpu_backend_internal.h"
#include "cpu/thread_pool.h"
#include "quant/kv_row.h"

namespace llama_ext {
namespace {

/// Rows of queries that share a key/value head: `tokens` consecutive tokens times the heads of the group.
struct Unit {
  const KvSegment* segment;
  int64_t kv_head;
  int64_t token;
  int64_t tokens;
};

double copy_microseconds(const TensorView& view) { return static_cast<double>(view.size()) / 250.0; }

}  // namespace

std::unique_ptr<KvCache> CpuBackend::create_kv_cache(const KvCacheShape& shape) {
  require(shape.dtype == DType::kF32 || shape.dtype == DType::kBF16 || shape.dtype == DType::kI8, ErrorKind::kDType,
          "KV cache: kept as float32, bfloat16 or int8, got ", name_of(shape.dtype));
  require(shape.layers >= 0 && shape.kv_heads >= 0 && shape.head_dim >= 0 && shape.capacity >= 0, ErrorKind::kShape,
          "KV cache: no dimension may be negative");
  return std::make_unique<PanelKvCache>(shape);
}

void CpuBackend::copy_kv_cache(KvCache& target, const KvCache& source, int64_t length) {
  PanelKvCache& to = panel_cache(target);
  const PanelKvCache& from = panel_cache(source);
  const KvCacheShape& shape = from.shape();
  check_copy(target, source, length);
  if (length == 0) return;
  const size_t element = size_of(shape.dtype);
  const size_t key_bytes = static_cast<size_t>(round_up(length, kPanel) * from.key_dim()) * element;
  // Whole pairs: what lies beside the last position is as finite there as here.
  const size_t value_bytes = static_cast<size_t>((from.has_pairs() ? round_up(length, 2) : length) * kPanel) * element;
  parallel_for(threads_, shape.layers * shape.kv_heads, [&](int64_t task, int) {
    const int64_t layer = task / shape.kv_heads;
    const int64_t head = task % shape.kv_heads;
    std::memcpy(to.keys<char>(layer, head), from.keys<char>(layer, head), key_bytes);
    const auto values = [element](auto& cache, int64_t l, int64_t h, int64_t panel) {
      return cache.template keys<char>(l, h) +
             static_cast<size_t>(cache.positions() * cache.key_dim() + panel * cache.v_panel_stride()) * element;
    };
    for (int64_t panel = 0; panel < from.v_panels(); ++panel) {
      std::memcpy(values(to, layer, head, panel), values(from, layer, head, panel), value_bytes);
    }
    if (shape.dtype != DType::kI8) return;
    for (int64_t of = 0; of < 2; ++of) {  // of the keys, of the values
      std::memcpy(to.scales(layer, head) + of * to.positions(), from.scales(layer, head) + of * from.positions(),
                  static_cast<size_t>(length) * sizeof(float));
    }
  });
}

namespace {

/// One position of one head into a cache of f32 or bf16.
template <typename T, typename Round>
void store_position(PanelKvCache& cache, int64_t layer, int64_t head, int64_t position, const float* k, const float* v,
                    const Round& round) {
  T* keys = cache.keys<T>(layer, head);
  T* values = cache.values<T>(layer, head);
  for (int64_t d = 0; d < cache.shape().head_dim; ++d) {
    keys[cache.key_offset(position, d)] = round(k[d]);
    values[cache.value_offset(position, d)] = round(v[d]);
  }
}

/// The same as int8. codes: room for a head.
void store_position_int8(PanelKvCache& cache, int64_t layer, int64_t head, int64_t position, const float* k,
                         const float* v, int8_t* codes) {
  const int64_t dim = cache.shape().head_dim;
  float* scales = cache.scales(layer, head);
  scales[position] = quantize_kv(k, dim, codes);
  int8_t* keys = cache.keys<int8_t>(layer, head);
  for (int64_t d = 0; d < dim; ++d) keys[cache.key_offset(position, d)] = codes[d];
  scales[cache.positions() + position] = quantize_kv(v, dim, codes);
  int8_t* values = cache.values<int8_t>(layer, head);
  for (int64_t d = 0; d < dim; ++d) values[cache.value_offset(position, d)] = codes[d];
}

}  // namespace

void CpuBackend::kv_store(const KvStoreArgs& args) {
  check(args);
  const int64_t dim = args.k.dim(2);
  const int64_t kv_heads = args.k.dim(1);
  const int64_t group = args.q && kv_heads > 0 ? args.q.dim(1) / kv_heads : 0;
  // Tasks of one head and a panel of positions: no two write the same cache line of keys.
  struct Task {
    const KvSegment* segment;
    int64_t begin;
    int64_t end;
    int64_t head;
  };
  std::vector<Task> tasks;
  for (const KvSegment& segment : args.segments) {
    for (int64_t begin = 0; begin < segment.tokens;) {
      const int64_t end = std::min(segment.tokens, begin + kPanel - (segment.position + begin) % kPanel);
      for (int64_t head = 0; head < kv_heads; ++head) tasks.push_back({&segment, begin, end, head});
      begin = end;
    }
  }
  const double microseconds = copy_microseconds(args.k) + static_cast<double>(args.q.size()) / 2000.0;
  parallel_for(threads_for(microseconds), static_cast<int64_t>(tasks.size()), [&](int64_t index, int) {
    const auto& [segment, begin, last, head] = tasks[static_cast<size_t>(index)];
    PanelKvCache& cache = panel_cache(*segment->cache);
    const DType dtype = cache.shape().dtype;
    std::vector<int8_t> codes(dtype == DType::kI8 ? static_cast<size_t>(dim) : 0);
    for (int64_t t = begin; t < last; ++t) {
      const int64_t row = segment->row + t;
      float* k = args.k.row<float>(row) + head * dim;
      const float* v = args.v.row<float>(row) + head * dim;
      if (args.cos) {
        const auto rotate = [&](float* x) {
          kernels_.rope(x, dim / 2, args.cos.row<float>(row), args.sin.row<float>(row));
        };
        rotate(k);
        for (int64_t h = head * group; h < (head + 1) * group; ++h) rotate(args.q.row<float>(row) + h * dim);
      }
      const int64_t position = segment->position + t;
      if (dtype == DType::kI8) {
        store_position_int8(cache, args.layer, head, position, k, v, codes.data());
      } else if (dtype == DType::kBF16) {
        store_position<uint16_t>(cache, args.layer, head, position, k, v, f32_to_bf16);
      } else {
        store_position<float>(cache, args.layer, head, position, k, v, [](float x) { return x; });
      }
    }
    // The other half of the last pair is read with weight 0: what an earlier text left there must not be infinite.
    const int64_t end = segment->position + segment->tokens;
    if (last < segment->tokens || dtype != DType::kBF16 || end % 2 == 0) return;
    for (int64_t d = 0; d < dim; ++d) cache.values<uint16_t>(args.layer, head)[cache.value_offset(end, d)] = 0;
  });
}

void CpuBackend::kv_load(const KvLoadArgs& args) {
  check(args);
  const PanelKvCache& cache = panel_cache(*args.cache);
  const int64_t dim = cache.shape().head_dim;
  parallel_for(threads_for(copy_microseconds(args.k)), cache.shape().kv_heads, [&](int64_t head, int) {
    const auto widen = [&](const auto* all, int64_t offset, const float* scale) {
      if constexpr (sizeof(*all) == 1) {
        return static_cast<float>(all[offset]) * *scale;
      } else if constexpr (sizeof(*all) == 2) {
        return bf16_to_f32(all[offset]);
      } else {
        return all[offset];
      }
    };
    const auto load = [&](const auto* keys, const auto* values) {
      const float* scales = cache.scales(args.layer, head);
      for (int64_t t = 0; t < args.k.rows(); ++t) {
        const int64_t position = args.position + t;
        for (int64_t d = 0; d < dim; ++d) {
          args.k.row<float>(t)[head * dim + d] = widen(keys, cache.key_offset(position, d), scales + position);
          args.v.row<float>(t)[head * dim + d] =
              widen(values, cache.value_offset(position, d), scales + cache.positions() + position);
        }
      }
    };
    if (cache.shape().dtype == DType::kI8) {
      load(cache.keys<int8_t>(args.layer, head), cache.values<int8_t>(args.layer, head));
    } else if (cache.shape().dtype == DType::kBF16) {
      load(cache.keys<uint16_t>(args.layer, head), cache.values<uint16_t>(args.layer, head));
    } else {
      load(cache.keys<float>(args.layer, head), cache.values<float>(args.layer, head));
    }
  });
}

void CpuBackend::attention(const AttentionArgs& args) {
  check(args);
  if (args.segments.empty() || args.q.size() == 0) return;
  const KvCacheShape& shape = args.segments.front().cache->shape();
  const int64_t dim = shape.head_dim;
  const int64_t padded = round_up(dim, kPanel);
  const int64_t group = args.q.dim(1) / shape.kv_heads;
  const AttentionKernel& kernel = shape.dtype == DType::kF32        ? kernels_.attention_f32
                                  : args.compute == Compute::kExact ? kernels_.attention_bf16_exact
                                                                    : kernels_.attention_bf16;
  const int64_t q_depth = round_up(dim, kernel.depth_multiple);
  // Four tiles of rows share each read of keys and values, when there are so many.
  int64_t most_tokens = 1;
  for (const KvSegment& segment : args.segments) most_tokens = std::max(most_tokens, segment.tokens);
  const int64_t unit_tokens = std::clamp<int64_t>(4 * kernel.tile_rows / group, 1, most_tokens);
  const int64_t unit_rows = unit_tokens * group;

  std::vector<Unit> units;
  int64_t longest = 0;  // in tiles of keys
  double multiply_adds = 0;
  for (const KvSegment& segment : args.segments) {
    for (int64_t head = 0; head < shape.kv_heads; ++head) {
      for (int64_t token = 0; token < segment.tokens; token += unit_tokens) {
        units.push_back({&segment, head, token, std::min(unit_tokens, segment.tokens - token)});
        const int64_t keys = segment.position + token + units.back().tokens;
        longest = std::max(longest, ceil_div(keys, kKeyTile));
        multiply_adds += 2.0 * static_cast<double>(units.back().tokens * group * keys * dim);
      }
    }
  }
  const int threads = threads_for(multiply_adds / 20e3);
  // Few units with many keys: threads share the key axis, and the partial results are merged in its order.
  const bool splits = threads > 1 && longest > 1 && static_cast<int64_t>(units.size()) < 2 * threads;
  const int64_t parts = splits ? longest : 1;

  // Rounded up so that everything starts on a cache line; the limits are 64-bit.
  const int64_t result_floats = round_up(unit_rows * (padded + 2), 16);
  const int64_t row_floats = round_up(unit_rows * q_depth, 16);
  const int64_t limit_floats = round_up(2 * unit_rows, 16);
  const int64_t worker_floats = 2 * row_floats + limit_floats + round_up(attention_scratch(unit_rows, dim), 16);
  const int64_t total = static_cast<int64_t>(units.size()) * parts * result_floats + threads * worker_floats;
  auto* memory = static_cast<float*>(thread_scratch(Scratch::kAttention, static_cast<size_t>(total) * sizeof(float)));
  float* workers = memory + static_cast<int64_t>(units.size()) * parts * result_floats;

  const auto result = [&](int64_t unit, int64_t part) { return memory + (unit * parts + part) * result_floats; };
  // Normalises a unit's finished sums and writes them out.
  const auto write = [&](const Unit& unit, const float* o, const float* l) {
    for (int64_t row = 0; row < unit.tokens * group; ++row) {
      float* y =
          args.y.row<float>(unit.segment->row + unit.token + row / group) + (unit.kv_head * group + row % group) * dim;
      kernels_.divide_row(o + row * padded, dim, l[row], y);
    }
  };

  parallel_for(threads, static_cast<int64_t>(units.size()) * parts, [&](int64_t task, int worker) {
    const Unit& unit = units[static_cast<size_t>(task / parts)];
    const int64_t rows = unit.tokens * group;
    const int64_t first_position = unit.segment->position + unit.token;
    const int64_t tiles = ceil_div(first_position + unit.tokens, kKeyTile);
    const int64_t part = task % parts;
    if (part >= tiles) return;

    float* scaled = workers + worker * worker_floats;
    float* packed = scaled + row_floats;
    auto* limits = reinterpret_cast<int64_t*>(packed + row_floats);
    float* scratch = packed + row_floats + limit_floats;
    for (int64_t row = 0; row < rows; ++row) {
      const float* q =
          args.q.row<float>(unit.segment->row + unit.token + row / group) + (unit.kv_head * group + row % group) * dim;
      kernels_.multiply_row(q, dim, static_cast<float>(args.scale), scaled + row * dim);
      limits[row] = first_position + row / group + 1;
    }
    for (int64_t row = 0; row < rows; row += kernel.tile_rows) {
      kernel.pack({scaled + row * dim, dim, std::min(kernel.tile_rows, rows - row), dim, q_depth, 0,
                   reinterpret_cast<char*>(packed) + row * q_depth * kernel.q_bytes});
    }

    float* o = result(task / parts, part);
    float* m = o + unit_rows * padded;
    float* l = m + unit_rows;
    std::fill(o, o + rows * padded, 0.0f);
    std::fill(m, m + rows, -__builtin_inff());
    std::fill(l, l + rows, 0.0f);
    const PanelKvCache& cache = panel_cache(*unit.segment->cache);
    const bool is_int8 = shape.dtype == DType::kI8;
    const char* keys = cache.keys<char>(args.layer, unit.kv_head);
    const float* scales = is_int8 ? cache.scales(args.layer, unit.kv_head) : nullptr;
    kernel.run({keys, keys + cache.positions() * cache.key_dim() * static_cast<int64_t>(size_of(shape.dtype)),
                cache.v_panel_stride(), scales, is_int8 ? scales + cache.positions() : nullptr, dim, rows, packed,
                limits, splits ? part : 0, splits ? part + 1 : tiles, o, m, l, scratch});
    if (!splits) write(unit, o, l);
  });
  if (!splits) return;

  parallel_for(threads, static_cast<int64_t>(units.size()), [&](int64_t index, int) {
    const Unit& unit = units[static_cast<size_t>(index)];
    const int64_t tiles = ceil_div(unit.segment->position + unit.token + unit.tokens, kKeyTile);
    float* o = result(index, 0);
    float* m = o + unit_rows * padded;
    float* l = m + unit_rows;
    for (int64_t part = 1; part < tiles; ++part) {
      const float* o2 = result(index, part);
      kernels_.attention_merge(unit.tokens * group, padded, o, m, l, o2, o2 + unit_rows * padded,
                               o2 + unit_rows * (padded + 1));
    }
    write(unit, o, l);
  });
}

}  // namespace llama_ext
