// What a device must be able to do. The model is written against this and nothing else, so whatever runs here runs Llama.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/recorder.h"
#include "core/tensor_view.h"
#include "ops/attention.h"
#include "ops/causal_attention.h"
#include "ops/cross_entropy.h"
#include "ops/dropout.h"
#include "ops/embedding.h"
#include "ops/feed_forward.h"
#include "ops/kv_cache.h"
#include "ops/log_sum_exp.h"
#include "ops/matmul.h"
#include "ops/matrix.h"
#include "ops/matrix_rows.h"
#include "ops/optimizer.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/sample.h"
#include "ops/softmax.h"
#include "ops/swiglu.h"
#include "quant/ggml_blocks.h"

namespace llama_ext {

/// Memory of a device. `data` may only be followed by the backend that allocated it.
class Buffer {
 public:
  virtual ~Buffer() = default;
  void* data() const { return data_; }
  size_t nbytes() const { return nbytes_; }
  /// Says that others than this backend work with it, on streams of their own: giving it back then waits for the whole device.
  virtual void share() {}

 protected:
  Buffer(void* data, size_t nbytes) : data_(data), nbytes_(nbytes) {}

 private:
  void* data_;
  size_t nbytes_;
};

/// Every method may be called from several threads at once. Operations check their arguments (ops/*.h), may run
/// asynchronously, and are ordered as called from one thread; what they read must stay alive until `synchronize`.
class Backend {
 public:
  virtual ~Backend() = default;

  /// "cpu" | "reference" | "cuda:0": what a user calls it.
  virtual std::string device() const = 0;
  /// The instruction set or compute capability in use.
  virtual std::string isa() const = 0;
  virtual int threads() const = 0;
  /// Whether operations follow pointers into host memory. Otherwise every view that is not said to be in host memory is of what
  /// `allocate` gave.
  virtual bool shares_host_memory() const = 0;
  /// For decoding without waiting for each token; null where operations run on the host anyway.
  virtual Recorder* recorder() { return nullptr; }

  // Memory.
  /// Zero-filled, aligned for any vector. Throws OutOfMemoryError.
  virtual std::unique_ptr<Buffer> allocate(size_t nbytes) = 0;
  /// Throws OutOfMemoryError, with both numbers, when there is not that much memory to give: asked with the sum before many
  /// allocations, as each of them alone might still seem to fit. `what` names the purpose.
  virtual void require_memory(int64_t nbytes, const std::string& what) = 0;
  virtual void copy_to_device(void* device, const void* host, size_t nbytes) = 0;
  virtual void copy_to_host(void* host, const void* device, size_t nbytes) = 0;
  virtual void synchronize() = 0;
  /// to = from, on the device: one dtype and shape, rows of both may be strided.
  virtual void copy(const TensorView& to, const TensorView& from) {
    const size_t nbytes = static_cast<size_t>(from.inner_size()) * size_of(from.dtype());
    const int64_t rows = nbytes == 0 ? 0 : from.rows();
    for (int64_t i = 0; i < rows; ++i) std::memmove(to.slice_rows(i, 1).data(), from.slice_rows(i, 1).data(), nbytes);
  }
  /// The queue that operations go to, as the device's other libraries name it (cudaStream_t); 0 where they run on the host.
  virtual uintptr_t stream() const { return 0; }
  /// x = 0. x: f32, rows may be strided.
  virtual void zero(const TensorView& x) = 0;
  /// Calls function(part, worker) for each part in [0, parts). Parts may run at once, on a host of several threads: each calls
  /// operations of this backend by itself, and none may need what another writes. worker: below threads(), the same for no two at once.
  /// The first exception of a part is thrown; Interrupted between parts.
  virtual void for_each_part(int64_t parts, const std::function<void(int64_t, int)>& function) {
    for (int64_t part = 0; part < parts; ++part) function(part, 0);
  }

  // Weights.
  /// A matrix of zeros. Throws OutOfMemoryError.
  virtual std::unique_ptr<Matrix> create_matrix(int64_t rows, int64_t cols, WeightType type) = 0;
  /// A matrix over `packed`, what `packed_bytes` of one of the same shape, type and layout gave: not copied, so `owner` keeps it
  /// alive. Throws CheckpointError for another number of bytes, UnsupportedError where a device cannot.
  virtual std::unique_ptr<Matrix> adopt_matrix(int64_t rows, int64_t cols, WeightType type,
                                               std::span<const std::byte> packed,
                                               std::shared_ptr<const void> owner) = 0;
  /// A matrix's memory, in the layout that `matrix_layout` names. Throws UnsupportedError where a device cannot.
  virtual std::span<const std::byte> packed_bytes(const Matrix& matrix) const = 0;
  /// Names the layout of packed bytes: another name, another layout.
  virtual std::string matrix_layout() const = 0;
  /// Bytes that such a matrix takes. Throws LimitError when that is out of range.
  virtual int64_t matrix_nbytes(int64_t rows, int64_t cols, WeightType type) const = 0;
  /// Writes `source` (n, K), host memory, f32 | f16 | bf16 | f64, contiguous, to the rows that `map` names, converted to
  /// the matrix's type: rounded to nearest, ties to even, or quantised (quant/quantized_row.h) with `importance`, (K) f32 in host
  /// memory or none. Types that only files bring (q4_k and the like) throw DTypeError.
  virtual void write_rows(Matrix& matrix, const RowMap& map, const TensorView& source,
                          const TensorView& importance) = 0;
  /// Writes rows of ggml blocks, (n, bytes of a row), contiguous, in host memory. Throws DTypeError when the matrix's type is
  /// not `ggml`'s, CheckpointError for a scale that is not finite.
  virtual void write_blocks(Matrix& matrix, const RowMap& map, const GgmlType& ggml, int64_t rows,
                            std::span<const std::byte> blocks) = 0;
  /// Writes rows whose codes are given. Throws DTypeError for a type without such codes, NumericError (take_codes).
  virtual void write_codes(Matrix& matrix, const RowMap& map, const CodeRows& source) = 0;
  /// Reads rows back: `target` (n, K), host memory, f32 or the matrix's own dtype, contiguous.
  virtual void read_rows(const Matrix& matrix, const RowMap& map, const TensorView& target) = 0;
  /// Copies `rows` rows as they are kept: row i of `from` in `source` to row i of `to` in `target`. Throws DTypeError unless both
  /// matrices have one type, ShapeError unless as many columns.
  virtual void copy_rows(Matrix& target, const RowMap& to, const Matrix& source, const RowMap& from, int64_t rows) = 0;
  /// Reads `rows` rows of a quantised matrix as they are kept: calls `visit` with the index of each and its codes, in order, from
  /// this thread. Throws DTypeError for a matrix of floats, UnsupportedError where a device keeps no codes.
  virtual void read_codes(const Matrix& matrix, const RowMap& map, int64_t rows,
                          const std::function<void(int64_t, const QuantizedRow&)>& visit) = 0;

  /// target (K, N) = source (N, K) transposed. Throws DTypeError unless both are float32, ShapeError.
  virtual void transpose(Matrix& target, const Matrix& source) = 0;
  /// Rows of a float32 matrix as a tensor of the device, without host memory: `target` (n, K) f32, or (K, n) with `transposes`;
  /// rows may be strided. Throws DTypeError for another type, ShapeError.
  virtual void load_rows(const Matrix& matrix, const RowMap& map, const TensorView& target, bool transposes) = 0;
  /// The other way round: `source`, likewise, becomes the rows that `map` names. Throws DTypeError, ShapeError.
  virtual void store_rows(Matrix& matrix, const RowMap& map, const TensorView& source, bool transposes) = 0;

  /// All elements of a float32 matrix, padding included, in the order of its layout: (n) f32. For what is done element by
  /// element to matrices of one shape; padding is zero and must stay so. Throws DTypeError for another type.
  virtual TensorView values(Matrix& matrix) = 0;

  // The KV cache of one sequence.
  /// Memory is only touched as positions are stored. Throws DTypeError, OutOfMemoryError.
  virtual std::unique_ptr<KvCache> create_kv_cache(const KvCacheShape& shape) = 0;
  /// Bytes such a cache takes when it is full. Throws LimitError when that is out of range.
  virtual int64_t kv_cache_nbytes(const KvCacheShape& shape) const = 0;
  /// Copies positions [0, length) of all layers; shapes may differ in capacity only.
  virtual void copy_kv_cache(KvCache& target, const KvCache& source, int64_t length) = 0;

  // Operations, one per header of ops/.
  virtual void embedding(const EmbeddingArgs& args) = 0;
  virtual void matmul(const MatmulArgs& args) = 0;
  virtual void rms_norm(const RmsNormArgs& args) = 0;
  virtual void rope(const RopeArgs& args) = 0;
  virtual void kv_store(const KvStoreArgs& args) = 0;
  virtual void kv_load(const KvLoadArgs& args) = 0;
  virtual void attention(const AttentionArgs& args) = 0;
  /// kv_store, then attention of the same segments, layer and q: at once where a device can. Whether q and k are rotated afterwards
  /// is not said.
  virtual void attend(const KvStoreArgs& store, const AttentionArgs& args) {
    kv_store(store);
    attention(args);
  }
  /// attend, then the product of what it gave: projection.x is args.y, seen as (M, H D). At once where a device can, and then y is left
  /// as it was.
  virtual void attend_and_project(const KvStoreArgs& store, const AttentionArgs& args, const MatmulArgs& projection) {
    check_projection(args, projection.x);
    attend(store, args);
    matmul(projection);
  }
  virtual void feed_forward(const FeedForwardArgs& args) = 0;
  virtual void softmax(const SoftmaxArgs& args) = 0;
  virtual void cross_entropy(const CrossEntropyArgs& args) = 0;
  virtual void log_sum_exp(const LogSumExpArgs& args) = 0;
  /// results[i] is what rows[i] gives, which depends on that row alone. As many of both.
  virtual void sample(std::span<const SampleArgs> rows, std::span<SampleResult> results) = 0;

  // Training: what only it needs of the forward direction, gradients, steps of optimisers.
  virtual void swiglu(const SwigluArgs& args) = 0;
  virtual void causal_attention(const CausalAttentionArgs& args) = 0;
  virtual void dropout(const DropoutArgs& args) = 0;
  virtual void embedding_backward(const EmbeddingBackwardArgs& args) = 0;
  virtual void matmul_backward(const MatmulBackwardArgs& args) = 0;
  /// The same for each of `all`, which have no d_x and each a d_weight and a d_bias of its own.
  virtual void weights_backward(std::span<const MatmulBackwardArgs> all) {
    check(all);
    for (const MatmulBackwardArgs& args : all) matmul_backward(args);
  }
  virtual void rms_norm_backward(const RmsNormBackwardArgs& args) = 0;
  virtual void swiglu_backward(const SwigluBackwardArgs& args) = 0;
  virtual void causal_attention_backward(const CausalAttentionBackwardArgs& args) = 0;
  virtual void cross_entropy_backward(const CrossEntropyBackwardArgs& args) = 0;
  virtual void adam(const AdamArgs& args) = 0;
  virtual void sgd(const SgdArgs& args) = 0;
  /// The sum of x^2 in float64, in an order that does not depend on threads. x: (n) f32, contiguous.
  virtual double sum_of_squares(const TensorView& x) = 0;
  /// The sum of those of several tensors, in their order: of all gradients, waiting once.
  virtual double sum_of_all_squares(std::span<const TensorView> tensors) {
    double sum = 0.0;
    for (const TensorView& x : tensors) sum += sum_of_squares(x);
    return sum;
  }

  // Passes through a model (model/transformer.h).
  /// Rows of one at most: as many as keep the device busy, while their memory stays small beside a model's.
  virtual int64_t pass_rows() const { return 512; }

  // Ranges that a profiler shows around operations (backend/range.h).
  virtual bool shows_ranges() const { return false; }
  virtual void begin_range(const std::string& /*name*/) {}
  virtual void end_range() {}
};

}  // namespace llama_ext
