// The class behind make_reference_backend(). Memory is in reference_backend.cpp, each operation in the file of its
// name.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace llama_ext::reference {

/// Has no state, so any number of threads may use one.
class ReferenceBackend final : public Backend {
 public:
  std::string device() const override { return "reference"; }
  std::string isa() const override { return "float64"; }
  int threads() const override { return 1; }
  bool shares_host_memory() const override { return true; }

  std::unique_ptr<Buffer> allocate(size_t nbytes) override;
  /// The oracle runs tiny models: whatever the system allows.
  void require_memory(int64_t nbytes, const std::string& what) override;
  void copy_to_device(void* device, const void* host, size_t nbytes) override;
  void copy_to_host(void* host, const void* device, size_t nbytes) override;
  void zero(const TensorView& x) override;
  void synchronize() override {}

  std::unique_ptr<Matrix> create_matrix(int64_t rows, int64_t cols, WeightType type) override;
  std::unique_ptr<Matrix> adopt_matrix(int64_t rows, int64_t cols, WeightType type, std::span<const std::byte> packed,
                                       std::shared_ptr<const void> owner) override;
  std::span<const std::byte> packed_bytes(const Matrix& matrix) const override;
  std::string matrix_layout() const override { return "float64"; }
  int64_t matrix_nbytes(int64_t rows, int64_t cols, WeightType type) const override;
  void write_rows(Matrix& matrix, const RowMap& map, const TensorView& source, const TensorView& importance) override;
  void write_blocks(Matrix& matrix, const RowMap& map, const GgmlType& ggml, int64_t rows,
                    std::span<const std::byte> blocks) override;
  void write_codes(Matrix& matrix, const RowMap& map, const CodeRows& source) override;
  void read_rows(const Matrix& matrix, const RowMap& map, const TensorView& target) override;
  void read_codes(const Matrix& matrix, const RowMap& map, int64_t rows,
                  const std::function<void(int64_t, const QuantizedRow&)>& visit) override;
  void copy_rows(Matrix& target, const RowMap& to, const Matrix& source, const RowMap& from, int64_t rows) override;

  std::unique_ptr<KvCache> create_kv_cache(const KvCacheShape& shape) override;
  int64_t kv_cache_nbytes(const KvCacheShape& shape) const override;
  void copy_kv_cache(KvCache& target, const KvCache& source, int64_t length) override;

  void embedding(const EmbeddingArgs& args) override;
  void matmul(const MatmulArgs& args) override;
  void rms_norm(const RmsNormArgs& args) override;
  void rope(const RopeArgs& args) override;
  void kv_store(const KvStoreArgs& args) override;
  void kv_load(const KvLoadArgs& args) override;
  void attention(const AttentionArgs& args) override;
  void feed_forward(const FeedForwardArgs& args) override;
  void softmax(const SoftmaxArgs& args) override;
  void cross_entropy(const CrossEntropyArgs& args) override;
  void log_sum_exp(const LogSumExpArgs& args) override;
  void sample(std::span<const SampleArgs> rows, std::span<SampleResult> results) override;

  void transpose(Matrix& target, const Matrix& source) override;
  void load_rows(const Matrix& matrix, const RowMap& map, const TensorView& target, bool transposes) override;
  void store_rows(Matrix& matrix, const RowMap& map, const TensorView& source, bool transposes) override;
  TensorView values(Matrix& matrix) override;
  void swiglu(const SwigluArgs& args) override;
  void causal_attention(const CausalAttentionArgs& args) override;
  void dropout(const DropoutArgs& args) override;
  void embedding_backward(const EmbeddingBackwardArgs& args) override;
  void matmul_backward(const MatmulBackwardArgs& args) override;
  void rms_norm_backward(const RmsNormBackwardArgs& args) override;
  void swiglu_backward(const SwigluBackwardArgs& args) override;
  void causal_attention_backward(const CausalAttentionBackwardArgs& args) override;
  void cross_entropy_backward(const CrossEntropyBackwardArgs& args) override;
  void adam(const AdamArgs& args) override;
  void sgd(const SgdArgs& args) override;
  double sum_of_squares(const TensorView& x) override;

 private:
  /// rms_norm(x) in `memory`, or x itself when there is no norm.
  TensorView normalized(const InputNorm& norm, const TensorView& x, std::vector<float>& memory);
};

}  // namespace llama_ext::reference
