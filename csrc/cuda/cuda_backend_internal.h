// The class behind make_cuda_backend(). Memory is in cuda_backend.cpp, weights in cuda_weights.cpp, operations in cuda_ops.cpp.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "backend/backend.h"
#include "cuda/cuda_matrix.h"
#include "cuda/kernels.h"
#include "cuda/ranges.h"
#include "cuda/recording.h"
#include "cuda/runtime.h"

namespace llama_ext::cuda {

class CudaBuffer final : public Buffer {
 public:
  CudaBuffer(std::shared_ptr<Gpu> gpu, size_t nbytes)
      : Buffer(gpu->allocate(nbytes, "a buffer", Gpu::Source::kPool), nbytes), gpu_(std::move(gpu)) {}
  ~CudaBuffer() override {
    // The pool is ordered by our stream, and knows nothing of theirs. What cannot be waited for is not given back: rather too little
    // memory than somebody else's results in it.
    if (is_shared_ && !gpu_->synchronize_device()) return;
    gpu_->release(data(), Gpu::Source::kPool);
  }
  void share() override { is_shared_ = true; }

 private:
  std::shared_ptr<Gpu> gpu_;
  std::atomic<bool> is_shared_ = false;
};

class CudaKvCache final : public KvCache {
 public:
  CudaKvCache(const std::shared_ptr<Gpu>& gpu, const KvCacheShape& shape);
  ~CudaKvCache() override { gpu_->release(memory_, source_); }
  CudaKvCache(const CudaKvCache&) = delete;
  CudaKvCache& operator=(const CudaKvCache&) = delete;
  int64_t nbytes() const override { return nbytes_; }
  static int64_t nbytes_for(const KvCacheShape& shape);
  KvLayerView layer(int64_t index) const;

 private:
  std::shared_ptr<Gpu> gpu_;
  int64_t nbytes_;
  Gpu::Source source_;
  unsigned char* memory_;
};

/// Downcasts what this backend made; anything else throws DeviceError.
const CudaMatrix& own(const Matrix& matrix, const char* op);
const CudaKvCache& own(const KvCache& cache, const char* op);

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int index) : gpu_(std::make_shared<Gpu>(index)), recorder_(gpu_) {}

  std::string device() const override { return "cuda:" + std::to_string(gpu_->index()); }
  std::string isa() const override;
  int threads() const override { return 1; }
  bool shares_host_memory() const override { return false; }
  int64_t pass_rows() const override { return 2048; }
  Recorder* recorder() override { return &recorder_; }
  bool shows_ranges() const override { return ranges_are_on(); }
  void begin_range(const std::string& name) override { push_range(name.c_str()); }
  void end_range() override { pop_range(); }

  std::unique_ptr<Buffer> allocate(size_t nbytes) override { return std::make_unique<CudaBuffer>(gpu_, nbytes); }
  void require_memory(int64_t nbytes, const std::string& what) override;
  void copy_to_device(void* device, const void* host, size_t nbytes) override {
    gpu_->copy_to_device(device, host, nbytes);
  }
  void copy_to_host(void* host, const void* device, size_t nbytes) override {
    gpu_->copy_to_host(host, device, nbytes);
  }
  void copy(const TensorView& to, const TensorView& from) override;
  uintptr_t stream() const override { return reinterpret_cast<uintptr_t>(gpu_->stream()); }
  void zero(const TensorView& x) override;
  void synchronize() override { gpu_->synchronize(); }

  std::unique_ptr<Matrix> create_matrix(int64_t rows, int64_t cols, WeightType type) override;
  std::unique_ptr<Matrix> adopt_matrix(int64_t rows, int64_t cols, WeightType type, std::span<const std::byte> packed,
                                       std::shared_ptr<const void> owner) override;
  std::span<const std::byte> packed_bytes(const Matrix& matrix) const override;
  std::string matrix_layout() const override { return "cuda rows 1"; }
  int64_t matrix_nbytes(int64_t rows, int64_t cols, WeightType type) const override {
    return weight_layout(rows, cols, type).nbytes;
  }
  void write_rows(Matrix& matrix, const RowMap& map, const TensorView& source, const TensorView& importance) override;
  void write_blocks(Matrix& matrix, const RowMap& map, const GgmlType& ggml, int64_t rows,
                    std::span<const std::byte> blocks) override;
  void write_codes(Matrix& matrix, const RowMap& map, const CodeRows& source) override;
  void read_rows(const Matrix& matrix, const RowMap& map, const TensorView& target) override;
  void copy_rows(Matrix& target, const RowMap& to, const Matrix& source, const RowMap& from, int64_t rows) override;
  void read_codes(const Matrix& matrix, const RowMap& map, int64_t rows,
                  const std::function<void(int64_t, const QuantizedRow&)>& visit) override;
  void transpose(Matrix& target, const Matrix& source) override;
  void load_rows(const Matrix& matrix, const RowMap& map, const TensorView& target, bool transposes) override;
  void store_rows(Matrix& matrix, const RowMap& map, const TensorView& source, bool transposes) override;
  TensorView values(Matrix& matrix) override;

  std::unique_ptr<KvCache> create_kv_cache(const KvCacheShape& shape) override;
  int64_t kv_cache_nbytes(const KvCacheShape& shape) const override { return CudaKvCache::nbytes_for(shape); }
  void copy_kv_cache(KvCache& target, const KvCache& source, int64_t length) override;

  void embedding(const EmbeddingArgs& args) override;
  void matmul(const MatmulArgs& args) override;
  void rms_norm(const RmsNormArgs& args) override;
  void rope(const RopeArgs& args) override;
  void kv_store(const KvStoreArgs& args) override;
  void kv_load(const KvLoadArgs& args) override;
  void attention(const AttentionArgs& args) override;
  void attend(const KvStoreArgs& store, const AttentionArgs& args) override;
  void attend_and_project(const KvStoreArgs& store, const AttentionArgs& args, const MatmulArgs& projection) override;
  void feed_forward(const FeedForwardArgs& args) override;
  void softmax(const SoftmaxArgs& args) override;
  void cross_entropy(const CrossEntropyArgs& args) override;
  void log_sum_exp(const LogSumExpArgs& args) override;
  void sample(std::span<const SampleArgs> rows, std::span<SampleResult> results) override;

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
  double sum_of_squares(const TensorView& x) override { return sum_of_all_squares({&x, 1}); }
  double sum_of_all_squares(std::span<const TensorView> tensors) override;

 private:
  bool takes_few_rows(const WeightView& weight, int64_t rows, Compute compute) const;
  void product(const ProductView& view, Compute compute) const;
  void feed_forward_on_tensor_cores(const FeedForwardArgs& args) const;

  std::shared_ptr<Gpu> gpu_;
  // Of attention_decode, since the first cache was made: not before, as most that a test or an optimiser does needs none, and not
  // later, when it might be recorded.
  std::once_flag arrived_once_;
  std::unique_ptr<CudaBuffer> arrived_;
  CudaRecorder recorder_;
};

}  // namespace llama_ext::cuda
