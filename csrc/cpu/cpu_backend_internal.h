// The CPU backend's class, for the files that implement it.
#pragma once

#include "backend/backend.h"
#include "cpu/kernel_table.h"
#include "cpu/panels.h"
#include "cpu/thread_pool.h"

namespace llama_ext {

class CpuBackend final : public Backend {
 public:
  CpuBackend(const KernelTable& kernels, int threads) : kernels_(kernels), threads_(threads) {}

  std::string device() const override { return "cpu"; }
  std::string isa() const override { return kernels_.name; }
  int threads() const override { return threads_; }
  bool shares_host_memory() const override { return true; }

  std::unique_ptr<Buffer> allocate(size_t nbytes) override;
  void require_memory(int64_t nbytes, const std::string& what) override;
  void copy_to_device(void* device, const void* host, size_t nbytes) override;
  void copy_to_host(void* host, const void* device, size_t nbytes) override;
  void synchronize() override {}
  void zero(const TensorView& x) override;
  void for_each_part(int64_t parts, const std::function<void(int64_t, int)>& function) override;

  std::unique_ptr<Matrix> create_matrix(int64_t rows, int64_t cols, WeightType type) override;
  std::unique_ptr<Matrix> adopt_matrix(int64_t rows, int64_t cols, WeightType type, std::span<const std::byte> packed,
                                       std::shared_ptr<const void> owner) override;
  std::span<const std::byte> packed_bytes(const Matrix& matrix) const override;
  std::string matrix_layout() const override { return kPanelLayout; }
  int64_t matrix_nbytes(int64_t rows, int64_t cols, WeightType type) const override {
    return PanelMatrix::nbytes_for(rows, cols, type);
  }
  void write_rows(Matrix& matrix, const RowMap& map, const TensorView& source, const TensorView& importance) override;
  void write_blocks(Matrix& matrix, const RowMap& map, const GgmlType& ggml, int64_t rows,
                    std::span<const std::byte> blocks) override;
  void write_codes(Matrix& matrix, const RowMap& map, const CodeRows& source) override;
  void read_rows(const Matrix& matrix, const RowMap& map, const TensorView& target) override;
  void read_codes(const Matrix& matrix, const RowMap& map, int64_t rows,
                  const std::function<void(int64_t, const QuantizedRow&)>& visit) override;
  void copy_rows(Matrix& target, const RowMap& to, const Matrix& source, const RowMap& from, int64_t rows) override;

  std::unique_ptr<KvCache> create_kv_cache(const KvCacheShape& shape) override;
  int64_t kv_cache_nbytes(const KvCacheShape& shape) const override { return PanelKvCache::nbytes_for(shape); }
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
  void weights_backward(std::span<const MatmulBackwardArgs> all) override;
  void rms_norm_backward(const RmsNormBackwardArgs& args) override;
  void swiglu_backward(const SwigluBackwardArgs& args) override;
  void causal_attention_backward(const CausalAttentionBackwardArgs& args) override;
  void cross_entropy_backward(const CrossEntropyBackwardArgs& args) override;
  void adam(const AdamArgs& args) override;
  void sgd(const SgdArgs& args) override;
  double sum_of_squares(const TensorView& x) override;

 private:
  template <typename Move>
  void for_each_block(const Matrix& matrix, const RowMap& map, int64_t rows, const Move& move) const;
  /// A product and what becomes of each finished block (kernel_table.h).
  struct Product {
    TensorView x;  // (M, K)
    const PanelMatrix* weight;
    const float* bias;
    EpilogueKind epilogue;
    TensorView y;
    Compute compute;
    InputNorm norm = {};
  };
  void multiply(const Product& product);
  int64_t rows_per_task(const Product& product, const GemmKernel& kernel) const;
  void multiply_blocks(const Product& product, int64_t block_rows);
  void multiply_rows(const Product& product, int64_t begin, int64_t count);
  static int64_t normed_floats(const Product& product, const GemmKernel& kernel);
  template <typename To>
  void pack_tile(const Product& product, const GemmKernel& kernel, int64_t row, int64_t rows, int64_t k_block,
                 float* normed, const To& to) const;
  void multiply_rounded(const Product& product);
  // Gradients of products (cpu_matmul_backward.cpp).
  const float* widened_block(const PanelMatrix& weight, int64_t panel, int64_t k0, float* scratch) const;
  void transpose_weight(const PanelMatrix& weight, int64_t n0, int64_t count, PanelMatrix& slab);
  void multiply_transposed(const MatmulBackwardArgs& args);
  // Gradients of weights (cpu_weight_gradients.cpp).
  void add_biases(std::span<const MatmulBackwardArgs> all);
  void accumulate_weights(std::span<const MatmulBackwardArgs> all);
  // Attention of whole sequences (cpu_causal_attention.cpp).
  struct AttentionOperands;
  struct AttentionShare;
  void attention_gradients(const CausalAttentionBackwardArgs& args, const RowRange& sequence, int64_t kv_head,
                           const AttentionShare& share, float* memory) const;
  const GemmKernel& kernel_for(const WeightType& type, Compute compute) const;
  /// How many threads are worth waking for work that takes one of them about `microseconds`.
  int threads_for(double microseconds) const { return microseconds < 10.0 ? 1 : available_threads(); }
  /// One within a part of for_each_part.
  int available_threads() const { return inside_parallel_task() ? 1 : threads_; }

  const KernelTable& kernels_;
  int threads_;
};

/// The backend's own matrix; throws LlamaExtError for one of another backend.
const PanelMatrix& panel_matrix(const Matrix& matrix);
PanelMatrix& panel_matrix(Matrix& matrix);
/// One row of any type as float32. out: (K).
void load_row(const PanelMatrix& matrix, int64_t row, float* out);
const PanelKvCache& panel_cache(const KvCache& cache);
PanelKvCache& panel_cache(KvCache& cache);

}  // namespace llama_ext
