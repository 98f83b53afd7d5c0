// Products: which rows and columns are multiplied when, and by whom. The arithmetic is in kernels/gemm*.h.
//
// Activations are packed once into tiles of rows, normalised on the way where a norm goes before the product. A task is a group of panels by all rows, or a part of them: for each block of
// k, each panel of the group passes over the tiles. The block of activations and the sums of the group stay in the L2 cache, the
// weights come from memory once, a block ahead; the epilogue writes finished sums. Neither blocks nor tasks change an
// output's order of summation.
#include <algorithm>

#include "cpu/cpu_backend_internal.h"
#include "cpu/thread_pool.h"

namespace llama_ext {
namespace {

constexpr int64_t kPackedRows = 512;  // packed at a time, more where k is short
// Rows whose sums are finished together, in the L1 cache.
constexpr int64_t kFinishedRows = 96;
// Panels of a task with few rows: about a megabyte, so that a thread which is held up leaves the rest to the others.
constexpr int64_t kDecodePanels = 4;
// Kernels of up to so many rows ask for what they read by themselves.
constexpr int64_t kStreamedRows = 4;
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
      return (is_exact ? kernels_.codes_exact : kernels_.codes)[code_index(type.encoding)];
  }
}

void CpuBackend::multiply(const Product& product) {
  if (product.compute == Compute::kBF16 && product.weight->type().encoding == Encoding::kF32) {
    multiply_rounded(product);
    return;
  }
  // As many activations as fill a block of k of 512 rows, in equal parts.
  const int64_t rows = product.x.rows();
  const GemmKernel& kernel = kernel_for(product.weight->type(), product.compute);
  const int64_t depth = std::clamp<int64_t>(product.weight->k_padded(), kernel.k_block / 3, kernel.k_block);
  const int64_t parts = ceil_div(rows, kPackedRows * kernel.k_block / depth);
  const int64_t part = parts == 0 ? 0 : round_up(ceil_div(rows, parts), kernel.tile_rows);
  for (int64_t row = 0; row < rows; row += part) multiply_rows(product, row, std::min(part, rows - row));
}

void CpuBackend::multiply_rows(const Product& product, int64_t begin, int64_t count) {
  const PanelMatrix& weight = *product.weight;
  const GemmKernel& kernel = kernel_for(weight.type(), product.compute);
  const int64_t group = weight.type().group;
  const int64_t k = weight.cols();
  const int64_t k_padded = weight.k_padded();
  const int64_t panels = weight.panels();

  // A microsecond of one thread: about 15 KB of weights read, or 50,000 multiply-adds.
  const double reading = static_cast<double>(weight.nbytes()) / 15e3;
  const double computing = static_cast<double>(count) * static_cast<double>(panels * kPanel * k_padded) / 50e3;
  const int threads = threads_for(std::max(reading, computing));

  // Few rows: one block of k, so that a panel is read in one go.
  const int64_t tiles = ceil_div(count, kernel.tile_rows);
  const int64_t k_block = tiles == 1 ? std::max<int64_t>(k_padded, 1) : kernel.k_block;
  // Groups of equal size, as many for each thread.
  const int64_t largest_group = tiles == 1 ? kDecodePanels : kernel.group_panels;
  const int64_t rounds = std::max<int64_t>(1, ceil_div(panels, threads * largest_group));
  const int64_t group_panels = std::max<int64_t>(1, ceil_div(panels, threads * rounds));
  const int64_t groups = ceil_div(panels, group_panels);
  const int64_t wanted_blocks =
      groups >= threads ? 1 : ceil_div(threads * kTasksPerThread, std::max<int64_t>(groups, 1));
  const int64_t block_tiles = std::max<int64_t>(1, ceil_div(tiles, wanted_blocks));
  const int64_t block_rows = block_tiles * kernel.tile_rows;
  const int64_t row_blocks = ceil_div(tiles, block_tiles);

  const int64_t packed_bytes = round_up(count * kernel.packed_bytes(k_padded, group), 64);
  const int64_t sums = std::min(count, block_rows) * kPanel;
  // Sums of a single block of k are finished at once.
  const int64_t kept_panels = k_padded > k_block ? group_panels : 1;
  const int64_t finished_rows = weight.type().is_quantized()
                                    ? block_rows  // some of these kernels widen the panel for all their rows
                                    : std::max<int64_t>(1, kFinishedRows / kernel.tile_rows) * kernel.tile_rows;
  // Rows of a tile must not meet in the same sets of a cache.
  const int64_t normed_stride = round_up(k, kPanel) + kPanel / 2;
  const int64_t normed_size = product.norm ? kernel.tile_rows * normed_stride : 0;
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
    const int64_t row = tile * kernel.tile_rows;
    const int64_t height = std::min(kernel.tile_rows, count - row);
    const float* x = product.x.row<float>(begin + row);
    int64_t stride = product.x.row_stride();
    if (product.norm) {
      float* normed = all_floats + worker * normed_size;
      for (int64_t r = 0; r < height; ++r) {
        kernels_.rms_norm(x + r * stride, product.norm.weight.f32(), k, static_cast<float>(product.norm.eps),
                          normed + r * normed_stride, nullptr);
      }
      x = normed;
      stride = normed_stride;
    }
    for (int64_t k0 = 0; k0 < k_padded; k0 += k_block) {
      kernel.pack({x + k0, stride, height, std::min(k_block, k - k0), std::min(k_block, k_padded - k0), group,
                   packed_at(row, k0)});
    }
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
        const bool has_next = (tiles > 1 || count > kStreamedRows) && (!is_last || k0 + depth < k_padded);
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
          // Each part of the rows asks for its part of what is next.
          const int64_t from = next_bytes * r / rows / 64 * 64;
          const int64_t to = r + height == rows ? next_bytes : next_bytes * (r + height) / rows / 64 * 64;
          float* part_sums = panel_sums + r * kPanel;
          float* y = product.y.row<float>(begin + row + r) + panel * width;
          // What is written after the product: its lines arrive meanwhile.
          for (int64_t i = 0; finishes && rows > kStreamedRows && i < height; ++i) {
            __builtin_prefetch(y + i * product.y.row_stride(), 1);
            __builtin_prefetch(y + i * product.y.row_stride() + 16, 1);
          }
          kernel.panel({height, depth, group, packed_at(row, k0) + r * row_bytes, weight.panel_at(panel, k0), part_sums,
                        kPanel, k0 > 0, next == nullptr ? nullptr : static_cast<const char*>(next) + from, to - from});
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
