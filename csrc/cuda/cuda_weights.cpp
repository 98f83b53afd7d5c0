// Weights in and out: rows are put together in host memory by as many threads as it is worth, and copied in a few megabytes.
#include <algorithm>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "core/checked.h"
#include "cuda/cuda_backend_internal.h"
#include "cuda/device_views.h"
#include "quant/quantized_row.h"

namespace llama_ext::cuda {
namespace {

constexpr int64_t kBatchBytes = int64_t{16} << 20;
// Fewer weights than this are not worth a thread.
constexpr int64_t kWeightsPerThread = int64_t{1} << 18;

/// Calls work(row, thread) for rows [0, rows); what the first thread that fails throws is thrown.
template <typename Work>
void for_each_row(int64_t rows, int64_t cols, const Work& work) {
  const int64_t most = std::max<int64_t>(1, rows * cols / kWeightsPerThread);
  const int64_t threads = std::min<int64_t>({most, std::max(1u, std::thread::hardware_concurrency()), rows});
  const auto run = [&](int64_t thread) {
    for (int64_t row = rows * thread / threads; row < rows * (thread + 1) / threads; ++row) work(row);
  };
  if (threads <= 1) {
    if (rows > 0) run(0);
    return;
  }
  std::exception_ptr error;
  std::mutex mutex;
  const auto try_run = [&](int64_t thread) {
    try {
      run(thread);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads));
  int64_t thread = 1;
  try {
    for (; thread < threads; ++thread) others.emplace_back(try_run, thread);
  } catch (const std::system_error&) {
    // The system has no more threads: this one does what they were for.
  }
  for (; thread < threads; ++thread) try_run(thread);
  try_run(0);
  for (std::thread& each : others) each.join();
  if (error) std::rethrow_exception(error);
}

/// A float32 matrix as what operations take, its padding left out.
TensorView as_tensor(const WeightView& weight) {
  return TensorView(weight.data, DType::kF32, {int64_t{weight.rows}, int64_t{weight.cols}}, weight.stride);
}

int64_t batch_rows(const WeightView& layout, int64_t rows) {
  const int64_t row_bytes = std::max<int64_t>(1, layout.nbytes / std::max(1, layout.rows));
  return std::clamp<int64_t>(kBatchBytes / row_bytes, 1, std::max<int64_t>(rows, 1));
}

/// Puts rows together by store(host rows, row in them, row of the source) and copies them to where `map` says.
template <typename Store>
void write(const CudaMatrix& matrix, const RowMap& map, int64_t rows, const Store& store) {
  const int64_t most = batch_rows(matrix.view(), rows);
  HostRows host(matrix.view(), std::min(most, rows));
  const auto planes = planes_of(matrix.view());
  for (int64_t begin = 0; begin < rows; begin += most) {
    const int64_t count = std::min(most, rows - begin);
    for_each_row(count, matrix.cols(), [&](int64_t row) { store(host, row, begin + row); });
    for (int64_t i = 0; i < count;) {
      const int64_t place = map(begin + i);
      int64_t run = 1;
      while (i + run < count && map(begin + i + run) == place + run) ++run;
      for (size_t plane = 0; plane < kPlanes; ++plane) {
        const int64_t bytes = planes[plane].row_bytes;
        matrix.gpu().copy_to_device(matrix.data() + planes[plane].begin + place * bytes, host.plane(plane) + i * bytes,
                                    static_cast<size_t>(run * bytes));
      }
      i += run;
    }
    matrix.gpu().synchronize();  // the host's rows are written again
  }
}

/// Brings rows to host memory and calls visit(host rows, row in them, row of the target), from several threads if `parallel`.
template <typename Visit>
void read(const CudaMatrix& matrix, const RowMap& map, int64_t rows, bool parallel, const Visit& visit) {
  const int64_t most = batch_rows(matrix.view(), rows);
  HostRows host(matrix.view(), std::min(most, rows));
  const auto planes = planes_of(matrix.view());
  for (int64_t begin = 0; begin < rows; begin += most) {
    const int64_t count = std::min(most, rows - begin);
    for (int64_t i = 0; i < count;) {
      const int64_t place = map(begin + i);
      int64_t run = 1;
      while (i + run < count && map(begin + i + run) == place + run) ++run;
      for (size_t plane = 0; plane < kPlanes; ++plane) {
        const int64_t bytes = planes[plane].row_bytes;
        matrix.gpu().copy_to_host(host.plane(plane) + i * bytes, matrix.data() + planes[plane].begin + place * bytes,
                                  static_cast<size_t>(run * bytes));
      }
      i += run;
    }
    matrix.gpu().synchronize();
    if (parallel) {
      for_each_row(count, matrix.cols(), [&](int64_t row) { visit(host, row, begin + row); });
    } else {
      for (int64_t row = 0; row < count; ++row) visit(host, row, begin + row);
    }
  }
}

}  // namespace

std::unique_ptr<Matrix> CudaBackend::create_matrix(int64_t rows, int64_t cols, WeightType type) {
  return std::make_unique<CudaMatrix>(gpu_, rows, cols, type);
}

std::unique_ptr<Matrix> CudaBackend::adopt_matrix(int64_t, int64_t, WeightType, std::span<const std::byte>,
                                                  std::shared_ptr<const void>) {
  fail(ErrorKind::kUnsupported,
       "a GPU cannot use the pages of a file of packed weights. Load the model they were made from");
}

std::span<const std::byte> CudaBackend::packed_bytes(const Matrix&) const {
  fail(ErrorKind::kUnsupported, "weights on a GPU cannot be saved packed. Use device='cpu'");
}

void CudaBackend::write_rows(Matrix& matrix, const RowMap& map, const TensorView& source,
                             const TensorView& importance) {
  const CudaMatrix& mine = own(matrix, "write_rows");
  check_write_rows(matrix, map, source, importance);
  if (!matrix.type().is_quantized()) {
    return write(mine, map, source.rows(),
                 [&](HostRows& host, int64_t row, int64_t index) { host.store(row, source, index); });
  }
  const WeightView float_layout = weight_layout(1, matrix.cols(), WeightType{Encoding::kF32});
  write(mine, map, source.rows(), [&](HostRows& host, int64_t row, int64_t index) {
    HostRows widened(float_layout, 1);
    widened.store(0, source, index);
    QuantizedRow codes;
    quantize_row(matrix.type(), reinterpret_cast<const float*>(widened.bytes(0)), matrix.cols(),
                 importance ? importance.f32() : nullptr, codes);
    host.store(row, codes);
  });
}

void CudaBackend::write_blocks(Matrix& matrix, const RowMap& map, const GgmlType& ggml, int64_t rows,
                               std::span<const std::byte> blocks) {
  const CudaMatrix& mine = own(matrix, "write_blocks");
  const int64_t row_bytes = check_write_blocks(matrix, map, ggml, rows, blocks.size());
  const auto* bytes = reinterpret_cast<const uint8_t*>(blocks.data());
  write(mine, map, rows, [&](HostRows& host, int64_t row, int64_t index) {
    QuantizedRow codes;
    decode_ggml_row(ggml, bytes + index * row_bytes, matrix.cols(), codes);
    host.store(row, codes);
  });
}

void CudaBackend::write_codes(Matrix& matrix, const RowMap& map, const CodeRows& source) {
  const CudaMatrix& mine = own(matrix, "write_codes");
  check_map(matrix, map, source.rows, "write_codes");
  write(mine, map, source.rows, [&](HostRows& host, int64_t row, int64_t index) {
    QuantizedRow codes;
    take_codes(matrix.type(), source, index, matrix.cols(), codes);
    host.store(row, codes);
  });
}

void CudaBackend::read_rows(const Matrix& matrix, const RowMap& map, const TensorView& target) {
  const CudaMatrix& mine = own(matrix, "read_rows");
  check_read_rows(matrix, map, target);
  const bool widens = target.dtype() == DType::kF32;
  const int64_t cols = matrix.cols();
  read(mine, map, target.rows(), /*parallel=*/true, [&](const HostRows& host, int64_t row, int64_t index) {
    if (!widens) {
      std::copy_n(reinterpret_cast<const uint16_t*>(host.bytes(row)), cols, target.row<uint16_t>(index));
    } else if (matrix.type().is_quantized()) {
      QuantizedRow codes;
      host.load(row, matrix.type(), codes);
      dequantize_row(matrix.type(), codes, cols, target.row<float>(index));
    } else {
      host.load(row, target.row<float>(index));
    }
  });
}

void CudaBackend::read_codes(const Matrix& matrix, const RowMap& map, int64_t rows,
                             const std::function<void(int64_t, const QuantizedRow&)>& visit) {
  const CudaMatrix& mine = own(matrix, "read_codes");
  check_read_codes(matrix, map, rows);
  QuantizedRow codes;
  read(mine, map, rows, /*parallel=*/false, [&](const HostRows& host, int64_t row, int64_t index) {
    host.load(row, matrix.type(), codes);
    visit(index, codes);
  });
}

void CudaBackend::copy_rows(Matrix& target, const RowMap& to, const Matrix& source, const RowMap& from, int64_t rows) {
  const CudaMatrix& into = own(target, "copy_rows");
  const CudaMatrix& out_of = own(source, "copy_rows");
  check_copy_rows(target, to, source, from, rows);
  const auto target_planes = planes_of(into.view());
  const auto source_planes = planes_of(out_of.view());
  for (int64_t i = 0; i < rows;) {
    // Within a matrix a row may be source and target: in order, then.
    int64_t run = 1;
    while (&into != &out_of && i + run < rows && to(i + run) == to(i) + run && from(i + run) == from(i) + run) ++run;
    for (size_t plane = 0; plane < kPlanes; ++plane) {
      const int64_t bytes = target_planes[plane].row_bytes;
      gpu_->copy_on_device(into.data() + target_planes[plane].begin + to(i) * bytes,
                           out_of.data() + source_planes[plane].begin + from(i) * bytes,
                           static_cast<size_t>(run * bytes));
    }
    i += run;
  }
}

void CudaBackend::transpose(Matrix& target, const Matrix& source) {
  const OpRange range("transpose");
  check_transpose(target, source);
  cuda::transpose(*gpu_, rows_of(as_tensor(own(source, "transpose").view())), source.rows(), source.cols(),
                  rows_of(as_tensor(own(target, "transpose").view())));
}

void CudaBackend::load_rows(const Matrix& matrix, const RowMap& map, const TensorView& target, bool transposes) {
  const OpRange range("load_rows");
  const int64_t rows = check_tensor_rows(matrix, map, target, transposes, "load_rows");
  const TensorView all = as_tensor(own(matrix, "load_rows").view());
  for_each_run(map, rows, [&](int64_t row, int64_t place, int64_t count) {
    const TensorView from = all.slice_rows(place, count);
    if (!transposes) return copy(target.slice_rows(row, count), from);
    Rows to = rows_of(target);
    to.data += row;
    cuda::transpose(*gpu_, rows_of(from), count, matrix.cols(), to);
  });
}

void CudaBackend::store_rows(Matrix& matrix, const RowMap& map, const TensorView& source, bool transposes) {
  const OpRange range("store_rows");
  const int64_t rows = check_tensor_rows(matrix, map, source, transposes, "store_rows");
  const TensorView all = as_tensor(own(matrix, "store_rows").view());
  for_each_run(map, rows, [&](int64_t row, int64_t place, int64_t count) {
    const TensorView to = all.slice_rows(place, count);
    if (!transposes) return copy(to, source.slice_rows(row, count));
    Rows from = rows_of(source);
    from.data += row;
    cuda::transpose(*gpu_, from, matrix.cols(), count, rows_of(to));
  });
}

TensorView CudaBackend::values(Matrix& matrix) {
  const CudaMatrix& mine = own(matrix, "values");
  check_values(matrix, "values");
  return TensorView(mine.data(), DType::kF32, {int64_t{mine.view().rows} * mine.view().stride});
}

}  // namespace llama_ext::cuda
