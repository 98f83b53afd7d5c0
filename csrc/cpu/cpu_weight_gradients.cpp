// Gradients of weights and biases, of several products at once.
//
// d_weight += d_y^T x has its sums in the gradient's own panels: [k][32 n] is a product's output whose rows are k, whose columns are n, and
// whose summed axis are the rows of x, packed transposed into tiles. All threads pack, then multiply: what several products need is
// packed together where it is little, so that threads wait for each other twice, not twice for each.
#include <algorithm>
#include <functional>
#include <span>
#include <vector>

#include "cpu/cpu_backend_internal.h"
#include "cpu/thread_pool.h"

namespace llama_ext {
namespace {

// Of x packed at a time, of d_y packed at a time, and of both where several products are packed together: well within an L3 cache.
constexpr int64_t kPackedBytes = int64_t{8} << 20;
// Packed x that a task reads once for each of its panels: half of an L2 cache.
constexpr int64_t kTileBytes = 256 * 1024;
constexpr int64_t kMostPanels = 8;
// Tiles of x packed by one task.
constexpr int64_t kPackedTiles = 16;
// Panels of d_y packed by one task, and rows of them at a time.
constexpr int64_t kPackedPanels = 8;
constexpr int64_t kPackedRows = 16;
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kBiasColumns = 32;

/// d_weight += d_y^T x by a chunk of rows and a slab of the gradient's panels at a time: tasks that pack, then tasks that multiply.
class WeightGradient {
 public:
  WeightGradient(const KernelTable& kernels, const MatmulBackwardArgs& args, PanelMatrix& target, int threads)
      : kernels_(kernels),
        args_(args),
        target_(target),
        // Where the ISA does not multiply bfloat16, nothing is rounded.
        rounds_(args.compute == Compute::kBF16 && kernels.bf16.panel != kernels.bf16_exact.panel),
        kernel_(rounds_ ? kernels.bf16 : kernels.f32) {
    const int64_t row_bytes = kernel_.packed_bytes(kPanel, 0) / kPanel * columns();  // of a row of x
    const int64_t block = kernel_.k_block;
    chunk_ = block * std::max<int64_t>(1, kPackedBytes / (row_bytes * block));
    most_ = depth_of(std::min(chunk_, rows()));
    // As many panels of d_y at a time, in equal parts.
    const int64_t slabs = ceil_div(target.panels(), std::max<int64_t>(1, kPackedBytes / (most_ * panel_row_bytes())));
    panels_ = ceil_div(target.panels(), slabs);
    // Ranges of k whose tiles stay in the L2 cache for all panels of a task; as many tasks as keep all threads busy.
    const int64_t wanted = threads * kTasksPerThread;
    const int64_t ranges =
        std::min(tiles(), std::max(ceil_div(row_bytes * block, kTileBytes), ceil_div(wanted, panels_)));
    range_tiles_ = ceil_div(tiles(), ranges);
    ranges_ = ceil_div(tiles(), range_tiles_);
    group_ = std::clamp<int64_t>(panels_ * ranges_ / wanted, 1, kMostPanels);
  }

  int64_t rows() const { return args_.d_y.rows(); }
  bool is_whole() const { return chunk_ >= rows() && panels_ == target_.panels(); }
  int64_t x_bytes() const { return round_up(columns() * kernel_.packed_bytes(most_, 0), 64); }
  int64_t d_y_bytes() const { return round_up(panels_ * most_ * panel_row_bytes(), 64); }
  /// Memory of a worker, in floats: for what is rounded, a tile of x transposed or some rows of a panel of d_y.
  int64_t worker_floats() const {
    return rounds_ ? std::max(kernel_.tile_rows, kPanel) * depth_of(kernel_.k_block) : 0;
  }
  bool shares_x(const WeightGradient& other) const {
    return &kernel_ == &other.kernel_ && args_.x.data() == other.args_.x.data() &&
           args_.x.row_stride() == other.args_.x.row_stride() && columns() == other.columns() && most_ == other.most_ &&
           rows() == other.rows();
  }

  /// Memory for both operands. With `packs_x` false, x is there already.
  void place(std::byte* x, std::byte* d_y, bool packs_x) {
    x_ = x;
    d_y_ = d_y;
    packs_x_ = packs_x;
  }

  /// Calls step() for each chunk and slab, which is then the one that the tasks are of.
  template <typename Step>
  void for_each_part(const Step& step) {
    const bool packs_x = packs_x_;
    for (begin_ = 0; begin_ < rows(); begin_ += chunk_) {
      for (slab_ = 0; slab_ < target_.panels(); slab_ += panels_) {
        packs_x_ = packs_x && slab_ == 0;
        step();
      }
    }
    begin_ = 0;
    slab_ = 0;
    packs_x_ = packs_x;
  }

  int64_t pack_tasks() const { return blocks() * (x_tasks() + ceil_div(wide(), kPackedPanels)); }

  void pack(int64_t task, float* memory) const {
    const int64_t tasks = x_tasks() + ceil_div(wide(), kPackedPanels);
    const int64_t index = task / tasks;
    const int64_t part = task % tasks;
    if (part < x_tasks()) {
      const int64_t first = part * kPackedTiles * kernel_.tile_rows;
      pack_x(index, first, std::min(columns(), first + kPackedTiles * kernel_.tile_rows), memory);
    } else {
      const int64_t first = (part - x_tasks()) * kPackedPanels;
      pack_d_y(index, first, std::min(wide(), first + kPackedPanels), memory);
    }
  }

  int64_t multiply_tasks() const { return ceil_div(wide(), group_) * ranges_; }

  void multiply(int64_t task) const {
    const int64_t column = task % ranges_ * range_tiles_ * kernel_.tile_rows;
    const int64_t height = std::min(range_tiles_ * kernel_.tile_rows, columns() - column);
    const int64_t first = task / ranges_ * group_;
    const int64_t last = std::min(wide(), first + group_);
    for (int64_t index = 0; index < blocks(); ++index) {
      const int64_t depth = depth_of(rows_of(index));
      for (int64_t panel = first; panel < last; ++panel) {
        const bool is_last = panel + 1 == last;
        const std::byte* next = !is_last               ? d_y_at(index, panel + 1)
                                : index + 1 < blocks() ? d_y_at(index + 1, first)
                                                       : nullptr;
        const int64_t next_depth = is_last && next != nullptr ? depth_of(rows_of(index + 1)) : depth;
        kernel_.panel({height, depth, 0, x_at(index, column), d_y_at(index, panel),
                       target_.panel<float>(slab_ + panel) + column * kPanel, kPanel, true, next,
                       next_depth * panel_row_bytes()});
      }
    }
  }

 private:
  int64_t columns() const { return target_.cols(); }
  int64_t tiles() const { return ceil_div(columns(), kernel_.tile_rows); }
  int64_t depth_of(int64_t count) const { return rounds_ ? round_up(count, kPanel) : count; }
  int64_t panel_row_bytes() const { return kPanel * (rounds_ ? 2 : 4); }
  int64_t wide() const { return std::min(panels_, target_.panels() - slab_); }
  int64_t x_tasks() const { return packs_x_ ? ceil_div(tiles(), kPackedTiles) : 0; }
  int64_t count() const { return std::min(chunk_, rows() - begin_); }
  int64_t blocks() const { return ceil_div(count(), kernel_.k_block); }
  int64_t rows_of(int64_t index) const { return std::min(kernel_.k_block, count() - index * kernel_.k_block); }
  // Block after block of rows, and in each the tiles of all columns of x, or the panels of d_y.
  std::byte* x_at(int64_t index, int64_t column) const {
    return x_ + columns() * kernel_.packed_bytes(index * kernel_.k_block, 0) +
           column * kernel_.packed_bytes(depth_of(rows_of(index)), 0);
  }
  std::byte* d_y_at(int64_t index, int64_t panel) const {
    return d_y_ + (panels_ * index * kernel_.k_block + panel * depth_of(rows_of(index))) * panel_row_bytes();
  }

  void pack_x(int64_t index, int64_t first, int64_t last, float* transposed) const {
    const float* x = args_.x.row<float>(begin_ + index * kernel_.k_block);
    const int64_t stride = args_.x.row_stride();
    if (!rounds_) {
      kernels_.training.pack_columns(x + first, stride, rows_of(index), last - first,
                                     reinterpret_cast<float*>(x_at(index, first)));
      return;
    }
    const int64_t depth = depth_of(rows_of(index));
    for (int64_t column = first; column < last; column += kernel_.tile_rows) {
      const int64_t height = std::min(kernel_.tile_rows, last - column);
      kernels_.training.transpose(x + column, stride, rows_of(index), height, transposed, depth);
      kernel_.pack({transposed, depth, height, rows_of(index), depth, 0, x_at(index, column)});
    }
  }

  void pack_d_y(int64_t index, int64_t first, int64_t last, float* panel_rows) const {
    const TensorView d_y = args_.d_y.slice_rows(begin_ + index * kernel_.k_block, rows_of(index));
    const auto pack = [&](int64_t panel, int64_t row, int64_t some, float* to) {
      const int64_t n = (slab_ + panel) * kPanel;
      kernels_.training.pack_panel(d_y.row<float>(row) + n, d_y.row_stride(), some,
                                   std::min(kPanel, target_.rows() - n), to);
    };
    for (int64_t panel = first; rounds_ && panel < last; ++panel) {
      pack(panel, 0, d_y.rows(), panel_rows);
      kernels_.training.round_panel(panel_rows, d_y.rows(), depth_of(d_y.rows()),
                                    reinterpret_cast<uint16_t*>(d_y_at(index, panel)));
    }
    // A few rows at a time, of all panels, as rows lie far apart.
    for (int64_t row = 0; !rounds_ && row < d_y.rows(); row += kPackedRows) {
      for (int64_t panel = first; panel < last; ++panel) {
        pack(panel, row, std::min(kPackedRows, d_y.rows() - row),
             reinterpret_cast<float*>(d_y_at(index, panel)) + row * kPanel);
      }
    }
  }

  const KernelTable& kernels_;
  const MatmulBackwardArgs& args_;
  PanelMatrix& target_;
  bool rounds_;
  const GemmKernel& kernel_;
  int64_t chunk_ = 0;   // rows at a time
  int64_t most_ = 0;    // of them, as they are packed
  int64_t panels_ = 0;  // at a time
  int64_t range_tiles_ = 0;
  int64_t ranges_ = 0;
  int64_t group_ = 0;  // panels of a task
  std::byte* x_ = nullptr;
  std::byte* d_y_ = nullptr;
  bool packs_x_ = true;
  // The part that is worked on.
  int64_t begin_ = 0;
  int64_t slab_ = 0;
};

double microseconds_of(const MatmulBackwardArgs& args) {
  const int64_t columns = args.d_weight == nullptr ? 0 : args.d_weight->cols();
  return static_cast<double>(args.d_y.size()) * static_cast<double>(columns) / 50e3;
}

/// Where the operands of a group of gradients go, in bytes.
struct PackedTogether {
  struct Place {
    int64_t x = 0;
    int64_t d_y = 0;
    bool packs_x = true;  // an earlier gradient of the group may have packed the same x
  };
  std::vector<Place> places;
  int64_t bytes = 0;
  int64_t worker_bytes = 0;  // besides, of each worker
};

/// As many of the first gradients as fit; at least one, and no other beside one that goes in parts.
PackedTogether packed_together(std::span<const WeightGradient> gradients) {
  PackedTogether group;
  for (const WeightGradient& gradient : gradients) {
    PackedTogether::Place place{.x = group.bytes, .d_y = group.bytes, .packs_x = true};
    for (size_t i = 0; i < group.places.size() && place.packs_x; ++i) {
      if (gradient.shares_x(gradients[i])) place = {.x = group.places[i].x, .d_y = group.bytes, .packs_x = false};
    }
    if (place.packs_x) place.d_y += gradient.x_bytes();
    const int64_t end = place.d_y + gradient.d_y_bytes();
    const bool fits = gradient.is_whole() && gradients[0].is_whole() && end <= kPackedBytes;
    if (!group.places.empty() && !fits) break;
    group.places.push_back(place);
    group.bytes = end;
    group.worker_bytes = std::max(group.worker_bytes, gradient.worker_floats() * int64_t{sizeof(float)});
  }
  return group;
}

/// Calls function(each, task, worker) for the tasks of each of `all`, which has count(each) of them.
template <typename Each, typename Count, typename Function>
void run_tasks(int threads, std::span<Each> all, const Count& count, const Function& function) {
  std::vector<int64_t> ends;
  for (const Each& each : all) ends.push_back((ends.empty() ? 0 : ends.back()) + std::invoke(count, each));
  parallel_for(threads, ends.empty() ? 0 : ends.back(), [&](int64_t task, int worker) {
    size_t i = 0;
    while (task >= ends[i]) ++i;
    function(all[i], i == 0 ? task : task - ends[i - 1], worker);
  });
}

}  // namespace

void CpuBackend::add_biases(std::span<const MatmulBackwardArgs> all) {
  double microseconds = 0.0;
  for (const MatmulBackwardArgs& args : all) {
    if (args.d_bias) microseconds += static_cast<double>(args.d_y.size()) / 2000.0;
  }
  const auto tasks = [](const MatmulBackwardArgs& args) {
    return args.d_bias ? ceil_div(args.d_y.dim(1), kBiasColumns) : 0;
  };
  run_tasks(threads_for(microseconds), all, tasks, [&](const MatmulBackwardArgs& args, int64_t task, int) {
    const int64_t n = task * kBiasColumns;
    kernels_.training.add_rows(args.d_y.f32() + n, args.d_y.row_stride(), args.d_y.rows(),
                               std::min(kBiasColumns, args.d_y.dim(1) - n), args.d_bias.f32() + n);
  });
}

/// Packs and multiplies what is whole, together; or one of several parts, part by part.
void CpuBackend::accumulate_weights(std::span<const MatmulBackwardArgs> all) {
  add_biases(all);
  double microseconds = 0.0;
  for (const MatmulBackwardArgs& args : all) microseconds += microseconds_of(args);
  const int threads = threads_for(microseconds);
  std::vector<WeightGradient> gradients;
  for (const MatmulBackwardArgs& args : all) {
    if (microseconds_of(args) > 0.0) {
      gradients.emplace_back(kernels_, args, panel_matrix(*args.d_weight), threads);
    }
  }
  for (std::span<WeightGradient> rest = gradients; !rest.empty();) {
    const PackedTogether packed = packed_together(rest);
    const std::span<WeightGradient> group = rest.first(packed.places.size());
    rest = rest.subspan(group.size());
    auto* memory = static_cast<std::byte*>(
        thread_scratch(Scratch::kProduct, static_cast<size_t>(packed.bytes + threads * packed.worker_bytes)));
    for (size_t i = 0; i < group.size(); ++i) {
      const auto& [x, d_y, packs_x] = packed.places[i];
      group[i].place(memory + x, memory + d_y, packs_x);
    }
    // Only a group of one has several parts.
    group[0].for_each_part([&] {
      run_tasks(threads, group, &WeightGradient::pack_tasks,
                [&](const WeightGradient& gradient, int64_t task, int worker) {
                  gradient.pack(task, reinterpret_cast<float*>(memory + packed.bytes + worker * packed.worker_bytes));
                });
      run_tasks(threads, group, &WeightGradient::multiply_tasks,
                [](const WeightGradient& gradient, int64_t task, int) { gradient.multiply(task); });
    });
  }
}

void CpuBackend::weights_backward(std::span<const MatmulBackwardArgs> all) {
  check(all);
  accumulate_weights(all);
}

}  // namespace llama_ext
