// Gradients of products, and products whose float32 weights are rounded to bfloat16 on the way.
//
// d_x = d_y W is a product with panels of W^T, which are made in a scratch that the L3 cache holds, a range of n at a time, and
// multiplied as any other weights are. d_weight += d_y^T x has its sums in the gradient's own panels: [k][32 n] is a product's
// output whose rows are k, whose columns are n, and whose summed axis are the rows of x, packed transposed into tiles. All threads pack,
// then multiply.
#include <algorithm>

#include "cpu/cpu_backend_internal.h"
#include "cpu/thread_pool.h"

namespace llama_ext {
namespace {

// Bytes of weights made at a time, half of those of packed x, or of packed d_y: well within an L3 cache.
constexpr int64_t kSlabBytes = int64_t{4} << 20;
// Transposed or rounded ranges are whole blocks of k of any product.
constexpr int64_t kRangeMultiple = 768;
// Packed x that a task of d_weight reads once for each of its panels: half of an L2 cache.
constexpr int64_t kTileBytes = 256 * 1024;
constexpr int64_t kMostPanels = 8;
// Tiles of x packed by one task.
constexpr int64_t kPackedTiles = 16;
// Panels of d_y packed by one task, and rows of them at a time.
constexpr int64_t kPackedPanels = 8;
constexpr int64_t kPackedRows = 16;
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kBiasColumns = 32;
constexpr WeightType kF32 = {Encoding::kF32};
constexpr WeightType kBF16 = {Encoding::kBF16};

}  // namespace

/// k in [k0, k0 + 32) of a panel as float32, [32][32]; beyond K undefined.
const float* CpuBackend::widened_block(const PanelMatrix& weight, int64_t panel, int64_t k0, float* scratch) const {
  const int64_t depth = std::min(kPanel, weight.cols() - k0);
  switch (weight.type().encoding) {
    case Encoding::kF32:
      return weight.panel<float>(panel) + k0 * kPanel;
    case Encoding::kF16:
      kernels_.training.widen_f16(weight.panel<uint16_t>(panel) + k0 * kPanel, depth, scratch);
      return scratch;
    case Encoding::kBF16:
      kernels_.training.widen_bf16(weight.panel<uint16_t>(panel) + k0 * kPanel, kPanel, scratch);
      return scratch;
    default:
      kernels_.training.widen_codes[code_index(weight.type().encoding)](weight.panel<uint8_t>(panel), k0, kPanel,
                                                                        weight.type().group, scratch);
      return scratch;
  }
}

/// Panels of W^T, for n in [n0, n0 + count): slab is a matrix (K, count) of float32 or bfloat16.
void CpuBackend::transpose_weight(const PanelMatrix& weight, int64_t n0, int64_t count, PanelMatrix& slab) {
  const bool rounds = slab.type() == kBF16;
  const int64_t blocks = ceil_div(count, kPanel);
  const double microseconds = static_cast<double>(weight.cols() * count) / 2000.0;
  parallel_for(threads_for(microseconds), slab.panels() * ceil_div(blocks, 8), [&](int64_t task, int) {
    const int64_t panel = task % slab.panels();
    const int64_t k0 = panel * kPanel;
    const int64_t columns = std::min(kPanel, weight.cols() - k0);
    alignas(64) float widened[kPanel * kPanel];
    alignas(64) float transposed[kPanel * kPanel] = {};
    const int64_t first = task / slab.panels() * 8;
    for (int64_t block = first; block < std::min(blocks, first + 8); ++block) {
      const int64_t n = block * kPanel;
      const int64_t rows = std::min(kPanel, count - n);
      const float* from = widened_block(weight, (n0 + n) / kPanel, k0, widened);
      float* to = rounds ? transposed : slab.panel<float>(panel) + n * kPanel;
      kernels_.training.transpose(from, kPanel, columns, rows, to, kPanel);
      if (!rounds) {
        for (int64_t row = 0; columns < kPanel && row < rows; ++row) {
          std::fill(to + row * kPanel + columns, to + (row + 1) * kPanel, 0.0f);
        }
        continue;
      }
      kernels_.training.round_panel(transposed, rows, kPanel, slab.panel<uint16_t>(panel) + n * kPanel);
    }
  });
}

void CpuBackend::transpose(Matrix& target, const Matrix& source) {
  check_transpose(target, source);
  transpose_weight(panel_matrix(source), 0, source.rows(), panel_matrix(target));
}

/// A product whose float32 weights become bfloat16 first: a range of panels at a time.
void CpuBackend::multiply_rounded(const Product& product) {
  const PanelMatrix& weight = *product.weight;
  const int64_t panel_bytes = std::max<int64_t>(1, PanelMatrix::nbytes_for(kPanel, weight.cols(), kBF16));
  const int64_t range = std::clamp<int64_t>(kSlabBytes / panel_bytes, 1, std::max<int64_t>(1, weight.panels()));
  for (int64_t first = 0; first < weight.panels(); first += range) {
    const int64_t panels = std::min(range, weight.panels() - first);
    const int64_t n0 = first * kPanel;
    const int64_t rows = std::min(panels * kPanel, weight.rows() - n0);
    const auto bytes = static_cast<size_t>(panels * panel_bytes);
    auto* memory = static_cast<std::byte*>(thread_scratch(Scratch::kWeights, bytes));
    const auto used = static_cast<size_t>(PanelMatrix::nbytes_for(rows, weight.cols(), kBF16));
    PanelMatrix slab(rows, weight.cols(), kBF16, {memory, used}, nullptr);
    const int64_t depth = slab.k_padded();
    parallel_for(threads_for(static_cast<double>(rows * depth) / 1000.0), panels, [&](int64_t panel, int) {
      kernels_.training.round_panel(weight.panel<float>(first + panel), weight.cols(), depth,
                                    slab.panel<uint16_t>(panel));
    });
    Product part = product;
    part.weight = &slab;
    part.compute = Compute::kAuto;
    if (part.bias != nullptr) part.bias += n0;
    const int64_t width = product.epilogue == EpilogueKind::kSwiGlu ? kPanel / 2 : kPanel;
    const int64_t columns = std::min(panels * width, product.y.dim(1) - first * width);
    part.y =
        TensorView(product.y.f32() + first * width, DType::kF32, {product.y.dim(0), columns}, product.y.row_stride());
    multiply(part);
  }
}

void CpuBackend::multiply_transposed(const MatmulBackwardArgs& args) {
  const PanelMatrix& weight = panel_matrix(*args.weight);
  // Weights of 8 bits and fewer are multiplied as float32.
  const bool rounds = args.compute != Compute::kExact &&
                      (weight.type() == kBF16 || (args.compute == Compute::kBF16 && weight.type() == kF32));
  const WeightType type = rounds ? kBF16 : kF32;
  const int64_t outputs = weight.rows();
  const int64_t row_bytes = std::max<int64_t>(1, round_up(weight.cols(), kPanel) * (rounds ? 2 : 4));
  const int64_t range = std::max(kRangeMultiple, kSlabBytes / row_bytes / kRangeMultiple * kRangeMultiple);
  int64_t n0 = 0;
  do {  // once even for N = 0, which gives zeros
    const int64_t count = std::min(range, outputs - n0);
    const auto bytes = static_cast<size_t>(PanelMatrix::nbytes_for(weight.cols(), count, type));
    auto* memory = static_cast<std::byte*>(thread_scratch(Scratch::kWeights, bytes));
    PanelMatrix slab(weight.cols(), count, type, {memory, bytes}, nullptr);
    transpose_weight(weight, n0, count, slab);
    const TensorView d_y(args.d_y.f32() + n0, DType::kF32, {args.d_y.dim(0), count}, args.d_y.row_stride());
    multiply({d_y, &slab, nullptr, args.accumulate || n0 > 0 ? EpilogueKind::kAdd : EpilogueKind::kStore, args.d_x,
              Compute::kAuto});
    n0 += count;
  } while (n0 < outputs);
}

/// d_weight += d_y^T x
void CpuBackend::accumulate_weight(const MatmulBackwardArgs& args) {
  PanelMatrix& target = panel_matrix(*args.d_weight);
  const int64_t rows = args.d_y.rows();
  const int64_t outputs = target.rows();
  const int64_t columns = target.cols();
  if (rows == 0 || outputs == 0 || columns == 0) return;
  // Where the ISA does not multiply bfloat16, nothing is rounded.
  const bool rounds = args.compute == Compute::kBF16 && kernels_.bf16.panel != kernels_.bf16_exact.panel;
  const GemmKernel& kernel = rounds ? kernels_.bf16 : kernels_.f32;
  const int64_t tile = kernel.tile_rows;
  const int64_t tiles = ceil_div(columns, tile);
  const int64_t block = kernel.k_block;
  const auto depth_of = [&](int64_t count) { return rounds ? round_up(count, kPanel) : count; };
  const int64_t row_bytes = kernel.packed_bytes(kPanel, 0) / kPanel * columns;  // of a row of x
  const int64_t chunk = block * std::max<int64_t>(1, 2 * kSlabBytes / (row_bytes * block));
  const int64_t most = depth_of(std::min(chunk, rows));
  // As many panels of d_y at a time, in equal parts.
  const int64_t panel_bytes = most * kPanel * (rounds ? 2 : 4);
  const int64_t slabs = ceil_div(target.panels(), std::max<int64_t>(1, 2 * kSlabBytes / panel_bytes));
  const int64_t panels = ceil_div(target.panels(), slabs);

  const double microseconds = static_cast<double>(rows) * static_cast<double>(outputs * columns) / 50e3;
  const int threads = threads_for(microseconds);
  // Ranges of k whose tiles stay in the L2 cache for all panels of a task; as many tasks as keep all threads busy.
  const int64_t wanted = threads * kTasksPerThread;
  const int64_t ranges = std::min(tiles, std::max(ceil_div(row_bytes * block, kTileBytes), ceil_div(wanted, panels)));
  const int64_t range_tiles = ceil_div(tiles, ranges);
  const int64_t group = std::clamp<int64_t>(panels * ranges / wanted, 1, kMostPanels);

  const int64_t x_bytes = round_up(columns * kernel.packed_bytes(most, 0), 64);
  const int64_t d_y_bytes = panels * panel_bytes;
  // To be rounded: a tile of x transposed, or some rows of a panel of d_y.
  const int64_t worker_floats = rounds ? std::max(tile, kPanel) * depth_of(block) : 0;
  auto* packed = static_cast<std::byte*>(thread_scratch(
      Scratch::kProduct,
      static_cast<size_t>(x_bytes + d_y_bytes + threads * worker_floats * static_cast<int64_t>(sizeof(float)))));
  auto* workers = reinterpret_cast<float*>(packed + x_bytes + d_y_bytes);

  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t count = std::min(chunk, rows - begin);
    const int64_t blocks = ceil_div(count, block);
    const auto rows_of = [&](int64_t index) { return std::min(block, count - index * block); };
    // Block after block of rows, and in each the tiles of all columns of x, or the panels of d_y.
    const auto x_at = [&](int64_t index, int64_t column) {
      return packed + columns * kernel.packed_bytes(index * block, 0) +
             column * kernel.packed_bytes(depth_of(rows_of(index)), 0);
    };
    const auto d_y_at = [&](int64_t index, int64_t panel) {
      const int64_t depths = panels * index * block + panel * depth_of(rows_of(index));
      return packed + x_bytes + depths * (panel_bytes / most);
    };
    const auto pack_x = [&](int64_t index, int64_t first, int64_t last, float* transposed) {
      const float* x = args.x.row<float>(begin + index * block);
      if (!rounds) {
        kernels_.training.pack_columns(x + first, args.x.row_stride(), rows_of(index), last - first,
                                       reinterpret_cast<float*>(x_at(index, first)));
        return;
      }
      const int64_t depth = depth_of(rows_of(index));
      for (int64_t column = first; column < last; column += tile) {
        const int64_t height = std::min(tile, last - column);
        kernels_.training.transpose(x + column, args.x.row_stride(), rows_of(index), height, transposed, depth);
        kernel.pack({transposed, depth, height, rows_of(index), depth, 0, x_at(index, column)});
      }
    };
    for (int64_t slab = 0; slab < target.panels(); slab += panels) {
      const int64_t wide = std::min(panels, target.panels() - slab);
      const auto pack_d_y = [&](int64_t index, int64_t first, int64_t last, float* panel_rows) {
        const TensorView d_y = args.d_y.slice_rows(begin + index * block, rows_of(index));
        const auto pack = [&](int64_t panel, int64_t row, int64_t some, float* to) {
          const int64_t n = (slab + panel) * kPanel;
          kernels_.training.pack_panel(d_y.row<float>(row) + n, d_y.row_stride(), some, std::min(kPanel, outputs - n),
                                       to);
        };
        for (int64_t panel = first; rounds && panel < last; ++panel) {
          pack(panel, 0, d_y.rows(), panel_rows);
          kernels_.training.round_panel(panel_rows, d_y.rows(), depth_of(d_y.rows()),
                                        reinterpret_cast<uint16_t*>(d_y_at(index, panel)));
        }
        // A few rows at a time, of all panels, as rows lie far apart.
        for (int64_t row = 0; !rounds && row < d_y.rows(); row += kPackedRows) {
          for (int64_t panel = first; panel < last; ++panel) {
            pack(panel, row, std::min(kPackedRows, d_y.rows() - row),
                 reinterpret_cast<float*>(d_y_at(index, panel)) + row * kPanel);
          }
        }
      };
      const int64_t x_tasks = slab == 0 ? ceil_div(tiles, kPackedTiles) : 0;
      const int64_t tasks = x_tasks + ceil_div(wide, kPackedPanels);
      parallel_for(threads, blocks * tasks, [&](int64_t task, int worker) {
        float* memory = workers + worker * worker_floats;
        const int64_t part = task % tasks;
        if (part < x_tasks) {
          const int64_t first = part * kPackedTiles * tile;
          pack_x(task / tasks, first, std::min(columns, first + kPackedTiles * tile), memory);
        } else {
          const int64_t first = (part - x_tasks) * kPackedPanels;
          pack_d_y(task / tasks, first, std::min(wide, first + kPackedPanels), memory);
        }
      });

      parallel_for(threads, ceil_div(wide, group) * ranges, [&](int64_t task, int) {
        const int64_t column = task % ranges * range_tiles * tile;
        const int64_t height = std::min(range_tiles * tile, columns - column);
        if (height <= 0) return;
        const int64_t first = task / ranges * group;
        const int64_t last = std::min(wide, first + group);
        for (int64_t index = 0; index < blocks; ++index) {
          const int64_t depth = depth_of(rows_of(index));
          for (int64_t panel = first; panel < last; ++panel) {
            const bool is_last = panel + 1 == last;
            const std::byte* next = !is_last             ? d_y_at(index, panel + 1)
                                    : index + 1 < blocks ? d_y_at(index + 1, first)
                                                         : nullptr;
            const int64_t next_depth = is_last && next != nullptr ? depth_of(rows_of(index + 1)) : depth;
            kernel.panel({height, depth, 0, x_at(index, column), d_y_at(index, panel),
                          target.panel<float>(slab + panel) + column * kPanel, kPanel, true, next,
                          next_depth * (panel_bytes / most)});
          }
        }
      });
    }
  }
}

void CpuBackend::matmul_backward(const MatmulBackwardArgs& args) {
  check(args);
  if (args.d_x) multiply_transposed(args);
  if (args.d_weight != nullptr) accumulate_weight(args);
  if (!args.d_bias) return;
  const int64_t outputs = args.d_y.dim(1);
  const double microseconds = static_cast<double>(args.d_y.size()) / 2000.0;
  parallel_for(threads_for(microseconds), ceil_div(outputs, kBiasColumns), [&](int64_t task, int) {
    const int64_t n = task * kBiasColumns;
    kernels_.training.add_rows(args.d_y.f32() + n, args.d_y.row_stride(), args.d_y.rows(),
                               std::min(kBiasColumns, outputs - n), args.d_bias.f32() + n);
  });
}

}  // namespace llama_ext
