// How operations that work row by row are shared among threads.
#pragma once

#include <cstdint>

#include "core/checked.h"
#include "core/tensor_view.h"
#include "cpu/thread_pool.h"

namespace llama_ext {

// What one thread gets through in a microsecond, roughly, in elements of a row-wise operation.
inline constexpr double kElementsPerMicrosecond = 2000.0;
inline constexpr int64_t kRowsPerTask = 16;

/// Calls function(row) for each row, in parallel when there is enough to do.
template <typename Function>
void for_each_row(int64_t rows, int threads, const Function& function) {
  parallel_for(threads, ceil_div(rows, kRowsPerTask), [&](int64_t task, int) {
    const int64_t end = (task + 1) * kRowsPerTask < rows ? (task + 1) * kRowsPerTask : rows;
    for (int64_t row = task * kRowsPerTask; row < end; ++row) function(row);
  });
}

inline double row_microseconds(const TensorView& view) {
  return static_cast<double>(view.size()) / kElementsPerMicrosecond;
}

}  // namespace llama_ext
