// Products: which rows and columns are multiplied when, and by whom. The arithmetic is in kernels/gemm*.h.
//
// Activations are packed into tiles of rows, normalised on the way where a norm goes before the product. Where weights are small and
// rows many, a task is a block of rows by all panels. Otherwise rows are packed once, and a task is a group of panels by all rows, or a
// part of them: for each block of k, each panel of the group passes over the tiles. The block of activations and the sums of the
// group stay in the L2 cache, the weights come from memory once, a block ahead; the epilogue writes finished sums. Neither blocks
// nor tasks change an output's order of summation.
#include <algorithm>

#include "cpu/cpu_backend_internal.h"
#include "cpu/thread_pool.h"

namespace llama_ext {
namespace {

constexpr int64_t kPackedRows = 512;  // packed at a time, more where k is short
// Rows whose sums are finished together, in the L1 cache.
constexpr int64_t kFinishedRows = 96;
// Tasks of rows: weights that all threads read lie in the L3 cache, the packed rows of a task in half of an L2 cache.
constexpr int64_t kSharedBytes = int64_t{4} << 20;
constexpr int64_t kBlockBytes = 224 * 1024;
constexpr int64_t kLeastRows = 42;
constexpr int64_t kAliasedFloats = 512;  // rows so far apart lie in a few sets of a cache
// Panels of a task with few rows: about a megabyte, so that a thread which is held up leaves the rest to the others.
constexpr int64_t kDecodePanels = 4;
// So few rows of outputs are not asked for before they are written.
constexpr int64_t kFewRows = 4;
// When there are fewer groups of panels than threads, rows are split, too, into this many tasks for each thread.
constexpr int64_t kTasksPerThread = 2;

}  // namespace

const GemmKernel& CpuBackend::kernel_for(const WeightType& type, Compute compute) const {
  const bool is_exact = compute == Compute::kExact;
  switch (type.encoding) {
    case Encoding::kF32:
      return kernels_.f32;
    case Encoding::kF16:
      return kernels_.f16;
    case Encoding::kBF16:
      return is_exact ? kernels_.bf16_exact : kernels_.bf16;
    default:
      // Only kAuto rounds activations to int8: training's gradients are those of the numbers that codes stand for.
      return (compute == Compute::kAuto ? kernels_.codes : kernels_.codes_exact)[code_index(type.encoding)];
  }
}

void CpuBackend::multiply(const Product& product) {
  if (product.compute == Compute::kBF16 && product.weight->type().encoding == Encoding::kF32) {
    multiply_rounded(product);
    return;
  }
  const int64_t rows = product.x.rows();
  const GemmKernel& kernel = kernel_for(product.weight->type(), product.compute);
  if (const int64_t block = rows_per_task(product, kernel); block > 0) {
    multiply_blocks(product, block);
    return;
  }
  // As many activations as fill a block of k of 512 rows, in equal parts.
  const int64_t depth = std::clamp<int64_t>(product.weight->k_padded(), kernel.k_block / 3, kernel.k_block);
  const int64_t parts = ceil_div(rows, kPackedRows * kernel.k_block / depth);
  const int64_t part = parts == 0 ? 0 : round_up(ceil_div(rows, parts), kernel.tile_rows);
  for (int64_t row = 0; row < rows; row += part) multiply_rows(product, row, std::min(part, rows - row));
}

namespace {

/// Rows of a tile must not meet in the same sets of a cache.
int64_t normed_stride(int64_t k) { return round_up(k, kPanel) + kPanel / 2; }

}  // namespace

/// Floats that a tile's normalised rows take.
int64_t CpuBackend::normed_floats(const Product& product, const GemmKernel& kernel) {
  return product.norm ? std::max(kernel.tile_rows, kernel.rows_of_one_tile) * normed_stride(product.weight->cols()) : 0;
}

/// Rows of a task that multiplies them by all panels; 0: weights or rows are too large for that, or rows too few.
int64_t CpuBackend::rows_per_task(const Product& product, const GemmKernel& kernel) const {
  const PanelMatrix& weight = *product.weight;
  if (weight.type().is_quantized() || weight.nbytes() > kSharedBytes) return 0;
  const int64_t row_bytes = std::max<int64_t>(1, kernel.packed_bytes(weight.k_padded(), 0));
  const int64_t most = std::min(kFinishedRows, kBlockBytes / row_bytes) / kernel.tile_rows * kernel.tile_rows;
  const int threads = available_threads();
  const int64_t tasks = ceil_div(ceil_div(product.x.rows(), std::max<int64_t>(most, 1)), threads) * threads;
  return most < kLeastRows || product.x.rows() < kLeastRows * threads
             ? 0
             : round_up(ceil_div(product.x.rows(), tasks), kernel.tile_rows);
}

/// Packs a tile's rows of x, normalised in `normed` where a norm goes before the product: block after block of k, to(k0).
template <typename To>
void CpuBackend::pack_tile(const Product& product, const GemmKernel& kernel, int64_t row, int64_t rows, int64_t k_block,
                           float* normed, const To& to) const {
  const int64_t k = product.weight->cols();
  const int64_t k_padded = product.weight->k_padded();
  const float* x = product.x.row<float>(row);
  int64_t stride = product.x.row_stride();
  if (product.norm) {
    for (int64_t r = 0; r < rows; ++r) {
      kernels_.rms_norm(x + r * stride, product.norm.weight.f32(), k, static_cast<float>(product.norm.eps),
                        normed + r * normed_stride(k), nullptr);
    }
    x = normed;
    stride = normed_stride(k);
  }
  for (int64_t k0 = 0; k0 < k_padded; k0 += k_block) {
    kernel.pack({x + k0, stride, rows, std::min(k_block, k - k0), std::min(k_block, k_padded - k0),
                 product.weight->type().group, to(k0)});
  }
}

/// Each task multiplies its own rows by all panels: a row stays with one thread, from the operation that made it.
void CpuBackend::multiply_blocks(const Product& product, int64_t block_rows) {
  const PanelMatrix& weight = *product.weight;
  const GemmKernel& kernel = kernel_for(weight.type(), product.compute);
  const int64_t rows = product.x.rows();
  const int64_t k_padded = weight.k_padded();
  const int64_t panels = weight.panels();
  const int64_t width = product.epilogue == EpilogueKind::kSwiGlu ? kPanel / 2 : kPanel;
  // Rows are read for each panel as they are, unless they all lie in the same sets of a cache.
  const bool in_place = kernel.panel_in_place != nullptr && k_padded == weight.cols() && !product.norm &&
                        product.x.row_stride() % kAliasedFloats != 0;
  const auto multiply_panel = in_place ? kernel.panel_in_place : kernel.panel;
  const int64_t packed_bytes = in_place ? 0 : round_up(block_rows * kernel.packed_bytes(k_padded, 0), 64);
  const int64_t floats = std::max(block_rows * kPanel, normed_floats(product, kernel));
  const int64_t worker_bytes = packed_bytes + floats * static_cast<int64_t>(sizeof(float));
  const int threads = threads_for(static_cast<double>(rows) * static_cast<double>(panels * kPanel * k_padded) / 50e3);
  auto* workers = static_cast<char*>(thread_scratch(Scratch::kProduct, static_cast<size_t>(threads * worker_bytes)));
  parallel_for(threads, ceil_div(rows, block_rows), [&](int64_t task, int worker) {
    const int64_t begin = task * block_rows;
    const int64_t count = std::min(block_rows, rows - begin);
    char* packed = workers + worker * worker_bytes;
    auto* sums = reinterpret_cast<float*>(packed + packed_bytes);  // before that, normalised rows
    const auto packed_at = [&](int64_t row, int64_t k0) {
      const int64_t depth = std::min(kernel.k_block, k_padded - k0);
      return packed + count * kernel.packed_bytes(k0, 0) + row * kernel.packed_bytes(depth, 0);
    };
    for (int64_t row = 0; !in_place && row < count; row += kernel.tile_rows) {
      pack_tile(product, kernel, begin + row, std::min(kernel.tile_rows, count - row), kernel.k_block, sums,
                [&](int64_t k0) { return packed_at(row, k0); });
    }
    const auto x_at = [&](int64_t k0) -> const void* {
      if (!in_place) return packed_at(0, k0);
      return product.x.row<float>(begin) + k0;
    };
    for (int64_t panel = 0; panel < panels; ++panel) {
      float* y = product.y.row<float>(begin) + panel * width;
      // What nothing is added to is summed where it belongs.
      const bool finishes_itself = product.epilogue == EpilogueKind::kStore && product.bias == nullptr &&
                                   product.y.dim(1) - panel * width >= kPanel;
      float* c = finishes_itself ? y : sums;
      const int64_t ldc = finishes_itself ? product.y.row_stride() : kPanel;
      for (int64_t i = 0; i < count; ++i) {
        __builtin_prefetch(y + i * product.y.row_stride(), 1);
        __builtin_prefetch(y + i * product.y.row_stride() + 16, 1);
      }
      int64_t k0 = 0;
      do {  // once even for k = 0, which zeroes the sums
        const int64_t depth = std::min(kernel.k_block, k_padded - k0);
        const bool is_last = k0 + depth >= k_padded;
        const bool has_next = !is_last || panel + 1 < panels;
        const void* next = !has_next ? nullptr
                           : is_last ? weight.panel_at(panel + 1, 0)
                                     : weight.panel_at(panel, k0 + depth);
        const int64_t next_depth = std::min(kernel.k_block, is_last ? k_padded : k_padded - k0 - depth);
        multiply_panel({count, depth, 0, x_at(k0), weight.panel_at(panel, k0), c, ldc, k0 > 0, next,
                        has_next ? weight.bytes_of(next_depth) : 0, in_place ? product.x.row_stride() : 0});
        k0 += kernel.k_block;
      } while (k0 < k_padded);
      if (finishes_itself) continue;
      kernels_.epilogue({product.epilogue, product.bias == nullptr ? nullptr : product.bias + panel * kPanel, y,
                         product.y.row_stride(), std::min(width, product.y.dim(1) - panel * width)},
                        count, sums, kPanel);
    }
  });
}

void CpuBackend::multiply_rows(const Product& product, int64_t begin, int64_t count) {
  const PanelMatrix& weight = *product.weight;
  const GemmKernel& kernel = kernel_for(weight.type(), product.compute);
  const int64_t group = weight.type().group;
  const int64_t k_padded = weight.k_padded();
  const int64_t panels = weight.panels();

  // A microsecond of one thread: about 15 KB of weights read, or 50,000 multiply-adds.
  const double reading = static_cast<double>(weight.nbytes()) / 15e3;
  const double computing = static_cast<double>(count) * static_cast<double>(panels * kPanel * k_padded) / 50e3;
  const int threads = threads_for(std::max(reading, computing));

  // Few rows: one block of k, so that a panel is read in one go.
  const int64_t tiles = count <= kernel.rows_of_one_tile ? 1 : ceil_div(count, kernel.tile_rows);
  // The only tile has all rows, which tells the kernel that there is one. Where heights are free they are equal: a tile of a row or two
  // takes as long as one of more, its sums waiting for each other.
  const int64_t tile_rows =
      kernel.can_stream || tiles == 1 ? ceil_div(count, std::max<int64_t>(tiles, 1)) : kernel.tile_rows;
  const int64_t k_block = tiles == 1 ? std::max<int64_t>(k_padded, 1) : kernel.k_block;
  // Groups of equal size, as many for each thread.
  const int64_t largest_group = tiles == 1 ? kDecodePanels : kernel.group_panels;
  const int64_t rounds = std::max<int64_t>(1, ceil_div(panels, threads * largest_group));
  const int64_t group_panels = std::max<int64_t>(1, ceil_div(panels, threads * rounds));
  const int64_t groups = ceil_div(panels, group_panels);
  const int64_t wanted_blocks =
      groups >= threads ? 1 : ceil_div(threads * kTasksPerThread, std::max<int64_t>(groups, 1));
  const int64_t block_tiles = std::max<int64_t>(1, ceil_div(tiles, wanted_blocks));
  const int64_t block_rows = block_tiles * tile_rows;
  const int64_t row_blocks = ceil_div(tiles, block_tiles);

  const int64_t packed_bytes = round_up(count * kernel.packed_bytes(k_padded, group), 64);
  const int64_t sums = std::min(count, block_rows) * kPanel;
  // Sums of a single block of k are finished at once.
  const int64_t kept_panels = k_padded > k_block ? group_panels : 1;
  const int64_t finished_rows = weight.type().is_quantized() && product.compute != Compute::kAuto
                                    ? block_rows  // some of these kernels widen the panel for all their rows
                                    : std::max<int64_t>(1, kFinishedRows / tile_rows) * tile_rows;
  const int64_t normed_size = normed_floats(product, kernel);
  const int64_t floats = threads * std::max(kept_panels * sums, normed_size);
  auto* packed = static_cast<char*>(thread_scratch(
      Scratch::kProduct, static_cast<size_t>(packed_bytes + floats * static_cast<int64_t>(sizeof(float)))));
  // Of each thread: a tile's normalised rows, then, once all are packed, its sums.
  auto* all_floats = reinterpret_cast<float*>(packed + packed_bytes);

  // Block after block of k, and in each the tiles of all rows.
  const auto packed_at = [&](int64_t row, int64_t k0) {
    const int64_t depth = std::min(k_block, k_padded - k0);
    return packed + count * kernel.packed_bytes(k0, group) + row * kernel.packed_bytes(depth, group);
  };
  parallel_for(tiles > 1 ? threads : 1, tiles, [&](int64_t tile, int worker) {
    const int64_t row = tile * tile_rows;
    pack_tile(product, kernel, begin + row, std::min(tile_rows, count - row), k_block,
              all_floats + worker * normed_size, [&](int64_t k0) { return packed_at(row, k0); });
  });

  const int64_t width = product.epilogue == EpilogueKind::kSwiGlu ? kPanel / 2 : kPanel;
  const int64_t y_columns = product.y.dim(1);
  parallel_for(threads, groups * row_blocks, [&](int64_t task, int worker) {
    const int64_t row = task % row_blocks * block_rows;
    const int64_t rows = std::min(block_rows, count - row);
    const int64_t first = task / row_blocks * group_panels;
    const int64_t last = std::min(panels, first + group_panels);
    float* c = all_floats + worker * kept_panels * sums;
    int64_t k0 = 0;
    do {  // once even for k = 0, which zeroes the sums
      const int64_t depth = std::min(k_block, k_padded - k0);
      for (int64_t panel = first; panel < last; ++panel) {
        // What is read next: the same k of the next panel, or the next k of the first one.
        const bool is_last = panel + 1 == last;
        const bool has_next = count > kernel.rows_without_next && (!is_last || k0 + depth < k_padded);
        const void* next = !has_next ? nullptr
                           : is_last ? weight.panel_at(first, k0 + depth)
                                     : weight.panel_at(panel + 1, k0);
        float* panel_sums = c + (kept_panels == 1 ? 0 : panel - first) * sums;
        const bool finishes = k0 + depth >= k_padded;
        const int64_t step = finishes ? finished_rows : rows;
        const int64_t row_bytes = kernel.packed_bytes(depth, group);
        const int64_t next_bytes = weight.bytes_of(depth);
        for (int64_t r = 0; r < rows; r += step) {
          const int64_t height = std::min(step, rows - r);
          // Each part of the rows asks for its part of what is next; where tiles stream, the first for all.
          const char* ahead = static_cast<const char*>(next);
          int64_t ahead_bytes = next_bytes;
          if (kernel.can_stream) {
            if (r > 0) ahead = nullptr;
          } else if (next != nullptr) {
            const int64_t from = next_bytes * r / rows / 64 * 64;
            const int64_t to = r + height == rows ? next_bytes : next_bytes * (r + height) / rows / 64 * 64;
            ahead += from;
            ahead_bytes = to - from;
          }
          float* part_sums = panel_sums + r * kPanel;
          float* y = product.y.row<float>(begin + row + r) + panel * width;
          // What is written after the product: its lines arrive meanwhile.
          for (int64_t i = 0; finishes && rows > kFewRows && i < height; ++i) {
            __builtin_prefetch(y + i * product.y.row_stride(), 1);
            __builtin_prefetch(y + i * product.y.row_stride() + 16, 1);
          }
          kernel.panel({height, depth, group, packed_at(row, k0) + r * row_bytes, weight.panel_at(panel, k0), part_sums,
                        kPanel, k0 > 0, ahead, ahead_bytes, 0, tile_rows, kernel.can_stream && r == 0});
          if (!finishes) continue;
          kernels_.epilogue({product.epilogue, product.bias == nullptr ? nullptr : product.bias + panel * kPanel, y,
                             product.y.row_stride(), std::min(width, y_columns - panel * width)},
                            height, part_sums, kPanel);
        }
      }
      k0 += k_block;
    } while (k0 < k_padded);
  });
}

void CpuBackend::matmul(const MatmulArgs& args) {
  check(args);
  multiply({args.x, &panel_matrix(*args.weight), args.bias ? args.bias.f32() : nullptr,
            args.accumulate ? EpilogueKind::kAdd : EpilogueKind::kStore, args.y, args.compute, args.norm});
}

void CpuBackend::feed_forward(const FeedForwardArgs& args) {
  check(args);
  const PanelMatrix& down = panel_matrix(*args.down);
  const int64_t width = down.cols();
  const auto bias = [](const TensorView& view) { return view ? view.f32() : nullptr; };
  for (int64_t row = 0; row < args.x.rows(); row += kPackedRows) {
    const int64_t rows = std::min(kPackedRows, args.x.rows() - row);
    const TensorView x = args.x.slice_rows(row, rows);
    void* memory = thread_scratch(Scratch::kActivation, static_cast<size_t>(rows * width) * sizeof(float));
    const TensorView activation(memory, DType::kF32, {rows, width});
    if (args.gate_up != nullptr) {
      multiply({x, &panel_matrix(*args.gate_up), bias(args.gate_up_bias), EpilogueKind::kSwiGlu, activation,
                args.compute, args.norm});
    } else {
      multiply({x, &panel_matrix(*args.gate), bias(args.gate_bias), EpilogueKind::kStore, activation, args.compute,
                args.norm});
      multiply({x, &panel_matrix(*args.up), bias(args.up_bias), EpilogueKind::kSiluGate, activation, args.compute,
                args.norm});
    }
    multiply({activation, &down, bias(args.down_bias), args.accumulate ? EpilogueKind::kAdd : EpilogueKind::kStore,
              args.y.slice_rows(row, rows), args.compute});
  }
}

}  // namespace llama_ext
