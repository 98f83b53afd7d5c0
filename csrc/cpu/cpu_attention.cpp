// Keys and values in their panels, and how attention is shared among threads. The arithmetic is in kernels/attention.h.
#include <algorithm>
#include <cstring>

#include "core/half.h"
#include "cpu/cpu_backend_internal.h"
#include "cpu/thread_pool.h"

namespace llama_ext {
namespace {

/// Rows of queries that share a key/value head: `tokens` consecutive tokens times the heads of the group.
struct Unit {
  const AttentionSegment* segment;
  int64_t kv_head;
  int64_t token;
  int64_t tokens;
};

/// Calls function(position, element of k, element of v) for every element of one head's rows [begin, begin + count), which
/// may be written when the cache is not const.
template <typename T, typename Cache, typename Function>
void visit_head(Cache& cache, int64_t layer, int64_t head, int64_t begin, int64_t count, const Function& function) {
  const int64_t dim = cache.shape().head_dim;
  auto* keys = cache.template keys<T>(layer, head);
  auto* values = cache.template values<T>(layer, head);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t position = begin + t;
    auto* key = keys + position / kPanel * kPanel * dim + position % kPanel;
    auto* value = values + position * kPanel;
    for (int64_t d = 0; d < dim; ++d) {
      function(t, d, key[d * kPanel], value[d / kPanel * cache.v_panel_stride() + d % kPanel]);
    }
  }
}

double copy_microseconds(const TensorView& view) { return static_cast<double>(view.size()) / 250.0; }

}  // namespace

std::unique_ptr<KvCache> CpuBackend::create_kv_cache(const KvCacheShape& shape) {
  require(shape.dtype == DType::kF32 || shape.dtype == DType::kBF16, ErrorKind::kDType,
          "KV cache: kept as float32 or bfloat16, got ", name_of(shape.dtype));
  require(shape.layers >= 0 && shape.kv_heads >= 0 && shape.head_dim >= 0 && shape.capacity >= 0, ErrorKind::kShape,
          "KV cache: no dimension may be negative");
  return std::make_unique<PanelKvCache>(shape);
}

void CpuBackend::copy_kv_cache(KvCache& target, const KvCache& source, int64_t length) {
  PanelKvCache& to = panel_cache(target);
  const PanelKvCache& from = panel_cache(source);
  const KvCacheShape& shape = from.shape();
  require(shape.layers == to.shape().layers && shape.kv_heads == to.shape().kv_heads &&
              shape.head_dim == to.shape().head_dim && shape.dtype == to.shape().dtype,
          ErrorKind::kShape, "KV cache: source and target are of different models or dtypes");
  require(length >= 0 && length <= shape.capacity && length <= to.shape().capacity, ErrorKind::kContextLength,
          "KV cache: cannot copy ", length, " positions between caches of ", shape.capacity, " and ",
          to.shape().capacity);
  if (length == 0) return;
  const size_t element = size_of(shape.dtype);
  const size_t key_bytes = static_cast<size_t>(round_up(length, kPanel) * shape.head_dim) * element;
  const size_t value_bytes = static_cast<size_t>(length * kPanel) * element;
  parallel_for(threads_, shape.layers * shape.kv_heads, [&](int64_t task, int) {
    const int64_t layer = task / shape.kv_heads;
    const int64_t head = task % shape.kv_heads;
    const auto copy = [&]<typename T>(T) {
      std::memcpy(to.keys<T>(layer, head), from.keys<T>(layer, head), key_bytes);
      for (int64_t panel = 0; panel < from.v_panels(); ++panel) {
        std::memcpy(to.values<T>(layer, head) + panel * to.v_panel_stride(),
                    from.values<T>(layer, head) + panel * from.v_panel_stride(), value_bytes);
      }
    };
    if (shape.dtype == DType::kBF16) {
      copy(uint16_t{});
    } else {
      copy(float{});
    }
  });
}

void CpuBackend::kv_store(const KvStoreArgs& args) {
  check(args);
  PanelKvCache& cache = panel_cache(*args.cache);
  const int64_t dim = cache.shape().head_dim;
  parallel_for(threads_for(copy_microseconds(args.k)), cache.shape().kv_heads, [&](int64_t head, int) {
    const auto k_at = [&](int64_t t, int64_t d) { return args.k.row<float>(t)[head * dim + d]; };
    const auto v_at = [&](int64_t t, int64_t d) { return args.v.row<float>(t)[head * dim + d]; };
    if (cache.shape().dtype == DType::kBF16) {
      visit_head<uint16_t>(cache, args.layer, head, args.position, args.k.rows(),
                           [&](int64_t t, int64_t d, uint16_t& key, uint16_t& value) {
                             key = f32_to_bf16(k_at(t, d));
                             value = f32_to_bf16(v_at(t, d));
                           });
    } else {
      visit_head<float>(cache, args.layer, head, args.position, args.k.rows(),
                        [&](int64_t t, int64_t d, float& key, float& value) {
                          key = k_at(t, d);
                          value = v_at(t, d);
                        });
    }
  });
}

void CpuBackend::kv_load(const KvLoadArgs& args) {
  check(args);
  const PanelKvCache& cache = panel_cache(*args.cache);
  const int64_t dim = cache.shape().head_dim;
  parallel_for(threads_for(copy_microseconds(args.k)), cache.shape().kv_heads, [&](int64_t head, int) {
    const auto load = [&](int64_t t, int64_t d, float key, float value) {
      args.k.row<float>(t)[head * dim + d] = key;
      args.v.row<float>(t)[head * dim + d] = value;
    };
    if (cache.shape().dtype == DType::kBF16) {
      visit_head<uint16_t>(cache, args.layer, head, args.position, args.k.rows(),
                           [&](int64_t t, int64_t d, uint16_t key, uint16_t value) {
                             load(t, d, bf16_to_f32(key), bf16_to_f32(value));
                           });
    } else {
      visit_head<float>(cache, args.layer, head, args.position, args.k.rows(), load);
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
  // Four tiles of rows share each read of keys and values, when there are so many.
  int64_t most_tokens = 1;
  for (const AttentionSegment& segment : args.segments) most_tokens = std::max(most_tokens, segment.tokens);
  const int64_t unit_tokens = std::clamp<int64_t>(4 * kernels_.f32.tile_rows / group, 1, most_tokens);
  const int64_t unit_rows = unit_tokens * group;

  std::vector<Unit> units;
  int64_t longest = 0;  // in tiles of keys
  double multiply_adds = 0;
  for (const AttentionSegment& segment : args.segments) {
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
  const int64_t row_floats = round_up(unit_rows * dim, 16);
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
      const float* sums = o + row * padded;
      for (int64_t d = 0; d < dim; ++d) y[d] = sums[d] / l[row];
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
      for (int64_t d = 0; d < dim; ++d) scaled[row * dim + d] = q[d] * static_cast<float>(args.scale);
      limits[row] = first_position + row / group + 1;
    }
    for (int64_t row = 0; row < rows; row += kernels_.f32.tile_rows) {
      kernels_.f32.pack(
          {scaled + row * dim, dim, std::min(kernels_.f32.tile_rows, rows - row), dim, dim, 0, packed + row * dim});
    }

    float* o = result(task / parts, part);
    float* m = o + unit_rows * padded;
    float* l = m + unit_rows;
    std::fill(o, o + rows * padded, 0.0f);
    std::fill(m, m + rows, -__builtin_inff());
    std::fill(l, l + rows, 0.0f);
    const PanelKvCache& cache = panel_cache(*unit.segment->cache);
    const bool is_bf16 = shape.dtype == DType::kBF16;
    const void* keys = is_bf16 ? static_cast<const void*>(cache.keys<uint16_t>(args.layer, unit.kv_head))
                               : cache.keys<float>(args.layer, unit.kv_head);
    const void* values = is_bf16 ? static_cast<const void*>(cache.values<uint16_t>(args.layer, unit.kv_head))
                                 : cache.values<float>(args.layer, unit.kv_head);
    kernels_.attention({keys, values, cache.v_panel_stride(), is_bf16, dim, rows, packed, limits, splits ? part : 0,
                        splits ? part + 1 : tiles, o, m, l, scratch});
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
