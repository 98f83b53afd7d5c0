#include "reference/reference_backend.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/checked.h"
#include "quant/ggml_blocks.h"
#include "reference/interrupt_poll.h"
#include "reference/reference_ops.h"
#include "reference/storage.h"

namespace llama_ext {

std::unique_ptr<Backend> make_reference_backend() { return std::make_unique<reference::ReferenceBackend>(); }

namespace reference {
namespace {

void copy_bytes(void* target, const void* source, size_t nbytes) {
  if (nbytes > 0) std::memcpy(target, source, nbytes);
}

void store_codes(const ReferenceMatrix& matrix, int64_t index, const QuantizedRow& row) {
  dequantize_row(matrix.type(), row, matrix.cols(), static_cast<double*>(matrix.data()) + index * matrix.cols());
}

}  // namespace

std::unique_ptr<Buffer> ReferenceBackend::allocate(size_t nbytes) { return std::make_unique<ReferenceBuffer>(nbytes); }

int64_t ReferenceBackend::kv_cache_nbytes(const KvCacheShape& shape) const {
  return ReferenceKvCache::nbytes_for(shape);
}

void ReferenceBackend::require_memory(int64_t /*nbytes*/, const std::string& /*what*/) {}

void ReferenceBackend::zero(const TensorView& x) {
  for (int64_t row = 0; row < x.rows(); ++row) std::fill_n(x.row<float>(row), x.inner_size(), 0.0f);
}

void ReferenceBackend::copy_to_device(void* device, const void* host, size_t nbytes) {
  copy_bytes(device, host, nbytes);
}

void ReferenceBackend::copy_to_host(void* host, const void* device, size_t nbytes) { copy_bytes(host, device, nbytes); }

std::unique_ptr<Matrix> ReferenceBackend::create_matrix(int64_t rows, int64_t cols, WeightType type) {
  return std::make_unique<ReferenceMatrix>(rows, cols, type);
}

std::unique_ptr<Matrix> ReferenceBackend::adopt_matrix(int64_t, int64_t, WeightType, std::span<const std::byte>,
                                                       std::shared_ptr<const void>) {
  fail(ErrorKind::kUnsupported, "the reference backend cannot map packed weights. Load the model they were made from");
}

std::span<const std::byte> ReferenceBackend::packed_bytes(const Matrix&) const {
  fail(ErrorKind::kUnsupported, "the reference backend does not pack weights. Use device='cpu'");
}

int64_t ReferenceBackend::matrix_nbytes(int64_t rows, int64_t cols, WeightType type) const {
  return ReferenceMatrix::nbytes_for(rows, cols, type);
}

void ReferenceBackend::write_rows(Matrix& matrix, const RowMap& map, const TensorView& source,
                                  const TensorView& importance) {
  const ReferenceMatrix& mine = own(matrix, "write_rows");
  check_write_rows(matrix, map, source, importance);
  const int64_t cols = matrix.cols();
  std::vector<float> widened(static_cast<size_t>(cols));
  QuantizedRow codes;
  InterruptPoll interrupt;
  for (int64_t i = 0; i < source.rows(); ++i) {
    interrupt.advance(cols + 1);
    const auto element = [&](int64_t k) { return load_element(source.data(), source.dtype(), i * cols + k); };
    if (mine.type().is_quantized()) {
      for (int64_t k = 0; k < cols; ++k) widened[static_cast<size_t>(k)] = static_cast<float>(element(k));
      quantize_row(mine.type(), widened.data(), cols, importance ? importance.f32() : nullptr, codes);
      store_codes(mine, map(i), codes);
      continue;
    }
    for (int64_t k = 0; k < cols; ++k) store_element(mine.data(), mine.dtype(), map(i) * cols + k, element(k));
  }
}

void ReferenceBackend::write_blocks(Matrix& matrix, const RowMap& map, const GgmlType& ggml, int64_t rows,
                                    std::span<const std::byte> blocks) {
  const ReferenceMatrix& mine = own(matrix, "write_blocks");
  const int64_t row_bytes = check_write_blocks(matrix, map, ggml, rows, blocks.size());
  QuantizedRow codes;
  for (int64_t i = 0; i < rows; ++i) {
    decode_ggml_row(ggml, reinterpret_cast<const uint8_t*>(blocks.data()) + i * row_bytes, matrix.cols(), codes);
    store_codes(mine, map(i), codes);
  }
}

void ReferenceBackend::write_codes(Matrix& matrix, const RowMap& map, const CodeRows& source) {
  const ReferenceMatrix& mine = own(matrix, "write_codes");
  check_map(matrix, map, source.rows, "write_codes");
  QuantizedRow codes;
  for (int64_t i = 0; i < source.rows; ++i) {
    take_codes(mine.type(), source, i, matrix.cols(), codes);
    store_codes(mine, map(i), codes);
  }
}

void ReferenceBackend::read_rows(const Matrix& matrix, const RowMap& map, const TensorView& target) {
  const ReferenceMatrix& mine = own(matrix, "read_rows");
  check_read_rows(matrix, map, target);
  const int64_t cols = matrix.cols();
  InterruptPoll interrupt;
  for (int64_t i = 0; i < target.rows(); ++i) {
    interrupt.advance(cols + 1);
    for (int64_t k = 0; k < cols; ++k) {
      store_element(target.data(), target.dtype(), i * cols + k,
                    load_element(mine.data(), mine.dtype(), map(i) * cols + k));
    }
  }
}

void ReferenceBackend::copy_rows(Matrix& target, const RowMap& to, const Matrix& source, const RowMap& from,
                                 int64_t rows) {
  const ReferenceMatrix& into = own(target, "copy_rows");
  const ReferenceMatrix& out_of = own(source, "copy_rows");
  check_copy_rows(target, to, source, from, rows);
  const size_t nbytes = static_cast<size_t>(into.cols()) * size_of(into.dtype());
  for (int64_t i = 0; i < rows; ++i) {
    copy_bytes(static_cast<std::byte*>(into.data()) + static_cast<size_t>(to(i)) * nbytes,
               static_cast<const std::byte*>(out_of.data()) + static_cast<size_t>(from(i)) * nbytes, nbytes);
  }
}

void ReferenceBackend::transpose(Matrix& target, const Matrix& source) {
  check_transpose(target, source);
  const auto* from = static_cast<const float*>(own(source, "transpose").data());
  auto* to = static_cast<float*>(own(target, "transpose").data());
  for (int64_t row = 0; row < source.rows(); ++row) {
    for (int64_t column = 0; column < source.cols(); ++column) {
      to[column * source.rows() + row] = from[row * source.cols() + column];
    }
  }
}

void ReferenceBackend::load_rows(const Matrix& matrix, const RowMap& map, const TensorView& target, bool transposes) {
  const int64_t rows = check_tensor_rows(matrix, map, target, transposes, "load_rows");
  const auto* from = static_cast<const float*>(own(matrix, "load_rows").data());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < matrix.cols(); ++k) {
      (transposes ? target.row<float>(k)[i] : target.row<float>(i)[k]) = from[map(i) * matrix.cols() + k];
    }
  }
}

void ReferenceBackend::store_rows(Matrix& matrix, const RowMap& map, const TensorView& source, bool transposes) {
  const int64_t rows = check_tensor_rows(matrix, map, source, transposes, "store_rows");
  auto* to = static_cast<float*>(own(matrix, "store_rows").data());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < matrix.cols(); ++k) {
      to[map(i) * matrix.cols() + k] = transposes ? source.row<float>(k)[i] : source.row<float>(i)[k];
    }
  }
}

TensorView ReferenceBackend::values(Matrix& matrix) {
  const ReferenceMatrix& mine = own(matrix, "values");
  check_values(matrix, "values");
  return {mine.data(), DType::kF32, {mine.rows() * mine.cols()}};
}

void ReferenceBackend::read_codes(const Matrix&, const RowMap&, int64_t,
                                  const std::function<void(int64_t, const QuantizedRow&)>&) {
  fail(ErrorKind::kUnsupported,
       "the reference backend keeps quantised weights as numbers, not as codes. Use device='cpu'");
}

std::unique_ptr<KvCache> ReferenceBackend::create_kv_cache(const KvCacheShape& shape) {
  return std::make_unique<ReferenceKvCache>(shape);
}

void ReferenceBackend::log_sum_exp(const LogSumExpArgs& args) {
  check(args);
  for (int64_t row = 0; row < args.logits.rows(); ++row) {
    args.out[row] = log_sum_exp_on_host(args.logits.row<float>(row), args.logits.dim(1), "log_sum_exp");
  }
}

void ReferenceBackend::sample(std::span<const SampleArgs> rows, std::span<SampleResult> results) {
  require(rows.size() == results.size(), ErrorKind::kInternal, "sample: ", rows.size(), " rows, but ", results.size(),
          " results");
  for (size_t row = 0; row < rows.size(); ++row) results[row] = sample_on_host(rows[row]);
}

}  // namespace reference
}  // namespace llama_ext
