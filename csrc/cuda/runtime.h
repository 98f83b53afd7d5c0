// A thin layer over the CUDA runtime: one GPU, its stream, its memory; every error is one of ours.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <shared_mutex>
#include <string>
#include <vector>

#include "core/errors.h"

namespace llama_ext::cuda {

/// Throws OutOfMemoryError or DeviceError, saying what was being done, unless `error` is cudaSuccess.
void require_success(cudaError_t error, const char* what);

/// A function of the driver, with which we are not linked, as of a version of CUDA (12000 for 12.0). Null where it has none.
void* driver_function(const char* name, unsigned version) noexcept;

/// Why there is no GPU to be had, with what was found and what is needed; empty when there is one.
std::string why_no_gpu();
/// How many there are; 0 when why_no_gpu() says something.
int gpu_count();

/// While it lives, a GPU is the calling thread's current one. Then that is what it was before, also for other libraries in the process
/// - unless nothing has used that GPU: making it current would take memory of it.
class [[nodiscard]] CurrentGpu {
 public:
  /// Throws DeviceError.
  explicit CurrentGpu(int index);
  /// False where `index` cannot be had.
  CurrentGpu(int index, std::nothrow_t) noexcept;
  ~CurrentGpu();
  CurrentGpu(const CurrentGpu&) = delete;
  CurrentGpu& operator=(const CurrentGpu&) = delete;
  explicit operator bool() const { return error_ == cudaSuccess; }

 private:
  int before_ = -1;
  int index_;
  cudaError_t error_;
};

/// Of products of one row of x and codes: none, those that run long, or all.
enum class StreamsOneRow : uint8_t { kNone, kLong, kAll };

/// One GPU with the stream that all of a backend's work goes to, in order, whatever thread asks.
class Gpu {
 public:
  /// Throws DeviceError: there is no such GPU, its driver is too old, or it is of an unsupported kind.
  explicit Gpu(int index);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  int index() const { return index_; }
  /// Where the calling thread's work goes: while it records, to the capture.
  cudaStream_t stream() const;
  /// Whether kernels that wait for their predecessors themselves (launch.h) may be started before those are done.
  bool overlaps() const { return overlaps_; }
  /// Which products of one row of x and codes are made by matmul_one_row.cu.
  StreamsOneRow streams_one_row() const { return streams_one_row_; }
  /// 90 for compute capability 9.0.
  int capability() const { return capability_; }
  /// Whether kernels of Hopper's own instructions (wgmma.h) are there: not where the driver compiles what was made for others, as it
  /// does for later GPUs, and for Hopper with CUDA_FORCE_PTX_JIT=1.
  bool has_hopper_code() const { return has_hopper_code_; }
  int multiprocessors() const { return multiprocessors_; }
  /// Shared memory that a block may ask for.
  size_t shared_bytes_per_block() const { return shared_bytes_per_block_; }
  /// memory().total, without asking.
  size_t total_memory() const { return total_memory_; }
  /// What a call of the runtime that goes to the current GPU needs. Everything below does so, and launch() too.
  [[nodiscard]] CurrentGpu use() const { return CurrentGpu(index_); }

  struct Memory {
    size_t available;
    size_t total;
  };
  Memory memory() const;
  /// Gives back what the pool of scratch memory holds beyond its use.
  void trim() const;

  /// Where memory comes from. kPool: in the order of the stream and without waiting, for what comes and goes with every pass; what
  /// is given back stays in the pool. kOwn: for what stays; giving it back waits for the GPU and gives it to everybody.
  enum class Source : uint8_t { kOwn, kPool };
  /// Zero-filled, aligned to 16 bytes at least; null for no bytes. Throws OutOfMemoryError with both numbers, naming `what`.
  void* allocate(size_t nbytes, const char* what, Source source = Source::kOwn) const;
  void release(void* memory, Source source = Source::kOwn) const noexcept;
  void copy_to_device(void* device, const void* host, size_t nbytes) const;
  void copy_to_host(void* host, const void* device, size_t nbytes) const;
  void copy_on_device(void* to, const void* from, size_t nbytes) const;
  /// `height` rows of `width` bytes, which start so many bytes apart there and here.
  void copy_rows_on_device(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                           size_t height) const;
  /// `height` rows of `width` bytes that start `pitch` bytes apart.
  void fill_zero(void* memory, size_t pitch, size_t width, size_t height) const;
  void synchronize() const;
  /// Waits for everything that the device does, for others as well; not while we record, which that would spoil. False where it
  /// cannot be waited for: somebody else records.
  bool synchronize_device() const noexcept;

 private:
  int index_;
  int capability_ = 0;
  int multiprocessors_ = 0;
  size_t shared_bytes_per_block_ = 0;
  size_t total_memory_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaMemPool_t pool_ = nullptr;
  bool has_hopper_code_ = false;
  bool overlaps_ = false;
  StreamsOneRow streams_one_row_ = StreamsOneRow::kLong;
};

/// hopper_code.cu: the compute capability that the kernels were compiled for which run on this GPU, 90 for 9.0.
int architecture_of_code(const Gpu& gpu);

/// Scratch memory of the operations of one recording. They run one after the other, so what one has given back the next takes.
class Arena {
 public:
  explicit Arena(const Gpu& gpu) : gpu_(gpu) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  void* take(size_t nbytes);
  void give_back(void* memory) noexcept;

 private:
  struct Block {
    void* memory;
    size_t nbytes;
    bool is_taken;
  };
  const Gpu& gpu_;
  std::vector<Block> blocks_;
};

/// While it lives, what the calling thread starts on this GPU is captured and does not run; scratch memory comes from `arena`. One at a
/// time for a thread.
class Capture {
 public:
  Capture(const Gpu& gpu, Arena& arena);
  ~Capture();
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  /// What was captured, once.
  cudaGraph_t end() const;

  /// The calling thread's, when it captures on this GPU.
  static const Capture* of(const Gpu& gpu);
  Arena& arena() const { return arena_; }
  cudaStream_t stream() const { return stream_; }

 private:
  const Gpu& gpu_;
  Arena& arena_;
  cudaStream_t stream_ = nullptr;
  std::shared_lock<std::shared_mutex> capturing_;  // see Gpu::synchronize_device
};

/// Memory for the launches of one operation, in the order of the stream: cheap, as it comes from the runtime's pool, or from the
/// recording that is being made.
class Scratch {
 public:
  Scratch(const Gpu& gpu, size_t nbytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  const Gpu& gpu_;
  const Capture* capture_;
  void* memory_ = nullptr;
};

}  // namespace llama_ext::cuda
