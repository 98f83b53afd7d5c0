#include "cuda/runtime.h"

#include <cuda.h>

#include <cstdlib>
#include <mutex>
#include <string_view>

namespace llama_ext::cuda {
namespace {

// The runtime that this library is linked with needs a driver of the same major version: CUDA 13 came with driver 580. Of CUDA 12, which
// came with 525, drivers before 12.4 do not load kernels that are compressed as ours are (--compress-mode=size in CMakeLists.txt).
constexpr int kNeededDriver = CUDART_VERSION >= 13000 ? CUDART_VERSION / 1000 * 1000 : 12040;
constexpr const char* kNeededDriverText = kNeededDriver >= 13000 ? "580" : "550";
constexpr int kNeededCapability = 80;

thread_local const Capture* current_capture = nullptr;

/// Shared by those who record, held alone by who waits for a whole device.
std::shared_mutex& captures() {
  static auto& mutex = *new std::shared_mutex;  // for memory that is given back when the process ends, too
  return mutex;
}

/// A setting of the environment, "0" or "1", for comparison. Throws OptionError.
bool is_set(const char* name, bool otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  const std::string_view said(text);
  require(said == "0" || said == "1", ErrorKind::kOption, name, " must be 0 or 1, got '", said, "'");
  return said == "1";
}

/// Whether anything in this process has used the GPU.
bool is_in_use(int index) noexcept {
  using GetState = CUresult (*)(CUdevice, unsigned*, int*);
  static const auto get_state = reinterpret_cast<GetState>(driver_function("cuDevicePrimaryCtxGetState", 7000));
  unsigned flags = 0;
  int is_active = 0;
  return get_state != nullptr && get_state(index, &flags, &is_active) == CUDA_SUCCESS && is_active != 0;
}

/// 12040 for CUDA 12.4; 0 without a driver.
int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
  cudaGetLastError();
  return 0;
}

std::string version_text(int version) { return cat(version / 1000, ".", version % 1000 / 10); }

}  // namespace

void require_success(cudaError_t error, const char* what) {
  if (error == cudaSuccess) [[likely]] {
    return;
  }
  cudaGetLastError();  // forget it: the next call is not to blame
  fail(error == cudaErrorMemoryAllocation ? ErrorKind::kOutOfMemory : ErrorKind::kDevice, "CUDA: ", what, ": ",
       cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
}

void* driver_function(const char* name, unsigned version) noexcept {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  if (cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return result == cudaDriverEntryPointSuccess ? found : nullptr;
}

std::string why_no_gpu() {
  int count = 0;  // which an error leaves alone
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) cudaGetLastError();
  // The runtime counts GPUs with any driver of its own major version.
  const int driver = driver_version();
  if (error == cudaSuccess && count > 0 && driver >= kNeededDriver) return "";
  if (driver == 0) {
    return cat("no NVIDIA driver was found; one of version ", kNeededDriverText, " or later is needed (CUDA ",
               version_text(kNeededDriver), ")");
  }
  if (error == cudaErrorInsufficientDriver || driver < kNeededDriver) {
    return cat("the NVIDIA driver is too old: it supports CUDA ", version_text(driver), ", and CUDA ",
               version_text(kNeededDriver), " (driver ", kNeededDriverText, " or later) is needed. Update the driver");
  }
  if (error == cudaErrorNoDevice || error == cudaSuccess) return "the driver finds no NVIDIA GPU";
  return cat("the driver does not answer: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
}

int gpu_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return driver_version() >= kNeededDriver ? count : 0;
  cudaGetLastError();
  return 0;
}

CurrentGpu::CurrentGpu(int index, std::nothrow_t) noexcept : index_(index) {
  if (cudaGetDevice(&before_) != cudaSuccess) cudaGetLastError();
  error_ = cudaSetDevice(index);
  if (error_ != cudaSuccess) cudaGetLastError();
}

CurrentGpu::CurrentGpu(int index) : CurrentGpu(index, std::nothrow) { require_success(error_, "choosing the GPU"); }

CurrentGpu::~CurrentGpu() {
  if (before_ < 0 || before_ == index_ || !is_in_use(before_)) return;
  if (cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
}

Gpu::Gpu(int index) : index_(index) {
  const std::string reason = why_no_gpu();
  require(reason.empty(), ErrorKind::kDevice, "device 'cuda:", index, "': ", reason, ", or use device='cpu'");
  const int count = gpu_count();
  require(index >= 0 && index < count, ErrorKind::kDevice, "device 'cuda:", index, "': there ",
          count == 1 ? "is 1 GPU" : cat("are ", count, " GPUs"), ", numbered from 0");
  const auto attribute = [index](cudaDeviceAttr name) {
    int value = 0;
    require_success(cudaDeviceGetAttribute(&value, name, index), "asking for the GPU's attributes");
    return value;
  };
  capability_ = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  multiprocessors_ = attribute(cudaDevAttrMultiProcessorCount);
  shared_bytes_per_block_ = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  require(capability_ >= kNeededCapability, ErrorKind::kDevice, "device 'cuda:", index,
          "': the GPU has compute capability ", capability_ / 10, ".", capability_ % 10,
          ", and 8.0 (Ampere) or later is needed. Use device='cpu'");
  require(attribute(cudaDevAttrMemoryPoolsSupported) != 0, ErrorKind::kDevice, "device 'cuda:", index,
          "': this driver offers no memory pools, which are needed. Use device='cpu'");
  const CurrentGpu current = use();
  has_hopper_code_ = capability_ == 90 && architecture_of_code(*this) >= 90;
  // What was compiled for 8.0 does not wait (wait_for_predecessors).
  overlaps_ = has_hopper_code_ && is_set("LLAMA_EXT_CUDA_OVERLAP", true);
  const bool streams_all = is_set("LLAMA_EXT_CUDA_ONE_ROW", false);
  const bool streams_any = is_set("LLAMA_EXT_CUDA_ONE_ROW", true);
  streams_one_row_ = streams_all ? StreamsOneRow::kAll : streams_any ? StreamsOneRow::kLong : StreamsOneRow::kNone;
  total_memory_ = memory().total;
  // Memory of the pool is kept between operations.
  require_success(cudaDeviceGetDefaultMemPool(&pool_, index), "asking for the memory pool");
  uint64_t threshold = UINT64_MAX;
  require_success(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &threshold),
                  "configuring the memory pool");
  require_success(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
}

Gpu::~Gpu() {
  if (const CurrentGpu current(index_, std::nothrow); current) cudaStreamDestroy(stream_);
}

cudaStream_t Gpu::stream() const {
  const Capture* capture = Capture::of(*this);
  return capture == nullptr ? stream_ : capture->stream();
}

Gpu::Memory Gpu::memory() const {
  const CurrentGpu current = use();
  Memory memory{};
  require_success(cudaMemGetInfo(&memory.available, &memory.total), "asking for the free memory");
  return memory;
}

void Gpu::trim() const {
  synchronize();
  require_success(cudaMemPoolTrimTo(pool_, 0), "giving back scratch memory");
}

void* Gpu::allocate(size_t nbytes, const char* what, Source source) const {
  if (nbytes == 0) return nullptr;
  const CurrentGpu current = use();
  void* memory = nullptr;
  const auto attempt = [&] {
    return source == Source::kPool ? cudaMallocAsync(&memory, nbytes, stream_) : cudaMalloc(&memory, nbytes);
  };
  cudaError_t error = attempt();
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    trim();
    error = attempt();
  }
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    const Memory found = this->memory();
    fail(ErrorKind::kOutOfMemory, what, " needs ", nbytes, " bytes on cuda:", index_, ", which has ", found.available,
         " of ", found.total, " bytes free");
  }
  require_success(error, what);
  const cudaError_t filled = cudaMemsetAsync(memory, 0, nbytes, stream_);
  if (filled != cudaSuccess) release(memory, source);
  require_success(filled, what);
  return memory;
}

void Gpu::release(void* memory, Source source) const noexcept {
  if (memory == nullptr) return;
  const CurrentGpu current(index_, std::nothrow);
  if (!current) return;
  if (source == Source::kPool) {
    cudaFreeAsync(memory, stream_);
  } else {
    cudaFree(memory);
  }
}

void Gpu::copy_to_device(void* device, const void* host, size_t nbytes) const {
  if (nbytes == 0) return;
  const CurrentGpu current = use();
  require_success(cudaMemcpyAsync(device, host, nbytes, cudaMemcpyHostToDevice, stream()), "a copy to the GPU");
}

void Gpu::copy_to_host(void* host, const void* device, size_t nbytes) const {
  if (nbytes == 0) return;
  const CurrentGpu current = use();
  require_success(cudaMemcpyAsync(host, device, nbytes, cudaMemcpyDeviceToHost, stream()), "a copy from the GPU");
}

void Gpu::copy_on_device(void* to, const void* from, size_t nbytes) const {
  if (nbytes == 0) return;
  const CurrentGpu current = use();
  require_success(cudaMemcpyAsync(to, from, nbytes, cudaMemcpyDeviceToDevice, stream()), "a copy on the GPU");
}

void Gpu::copy_rows_on_device(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height) const {
  if (width == 0 || height == 0) return;
  const CurrentGpu current = use();
  require_success(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, height, cudaMemcpyDeviceToDevice, stream()),
                  "a copy on the GPU");
}

void Gpu::fill_zero(void* memory, size_t pitch, size_t width, size_t height) const {
  if (width == 0 || height == 0) return;
  const CurrentGpu current = use();
  const cudaError_t error = height == 1 ? cudaMemsetAsync(memory, 0, width, stream())
                                        : cudaMemset2DAsync(memory, pitch, 0, width, height, stream());
  require_success(error, "a fill on the GPU");
}

void Gpu::synchronize() const {
  const CurrentGpu current = use();
  require_success(cudaStreamSynchronize(stream_), "waiting for the GPU");
}

bool Gpu::synchronize_device() const noexcept {
  const std::unique_lock alone(captures());
  if (const CurrentGpu current(index_, std::nothrow); current && cudaDeviceSynchronize() == cudaSuccess) return true;
  cudaGetLastError();
  return false;
}

Arena::~Arena() {
  for (const Block& block : blocks_) gpu_.release(block.memory, Gpu::Source::kPool);
}

void* Arena::take(size_t nbytes) {
  Block* best = nullptr;
  for (Block& block : blocks_) {
    if (!block.is_taken && block.nbytes >= nbytes && (best == nullptr || block.nbytes < best->nbytes)) best = &block;
  }
  if (best == nullptr) {
    blocks_.reserve(blocks_.size() + 1);
    blocks_.push_back({gpu_.allocate(nbytes, "scratch memory of a recording", Gpu::Source::kPool), nbytes, false});
    best = &blocks_.back();
  }
  best->is_taken = true;
  return best->memory;
}

void Arena::give_back(void* memory) noexcept {
  for (Block& block : blocks_) {
    if (block.memory == memory) block.is_taken = false;
  }
}

Capture::Capture(const Gpu& gpu, Arena& arena) : gpu_(gpu), arena_(arena), capturing_(captures()) {
  require(current_capture == nullptr, ErrorKind::kInternal, "CUDA: a recording within a recording");
  const CurrentGpu current = gpu.use();
  require_success(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  // Relaxed: this thread may allocate meanwhile, and others may do anything. Nothing but what is recorded goes to this stream.
  const cudaError_t error = cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed);
  if (error != cudaSuccess) cudaStreamDestroy(stream_);
  require_success(error, "recording kernels");
  current_capture = this;
}

Capture::~Capture() {
  current_capture = nullptr;
  const CurrentGpu current(gpu_.index(), std::nothrow);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream_, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone) {
    cudaGraph_t graph = nullptr;  // of operations that threw
    if (cudaStreamEndCapture(stream_, &graph) == cudaSuccess && graph != nullptr) cudaGraphDestroy(graph);
  }
  cudaGetLastError();
  cudaStreamDestroy(stream_);
}

cudaGraph_t Capture::end() const {
  const CurrentGpu current = gpu_.use();
  cudaGraph_t graph = nullptr;
  require_success(cudaStreamEndCapture(stream_, &graph), "recording kernels");
  return graph;
}

const Capture* Capture::of(const Gpu& gpu) {
  return current_capture != nullptr && &current_capture->gpu_ == &gpu ? current_capture : nullptr;
}

Scratch::Scratch(const Gpu& gpu, size_t nbytes) : gpu_(gpu), capture_(Capture::of(gpu)) {
  if (nbytes == 0) return;
  if (capture_ != nullptr) {
    memory_ = capture_->arena().take(nbytes);
    return;
  }
  const CurrentGpu current = gpu.use();
  require_success(cudaMallocAsync(&memory_, nbytes, gpu.stream()), "scratch memory");
}

Scratch::~Scratch() {
  if (memory_ == nullptr) return;
  if (capture_ != nullptr) {
    capture_->arena().give_back(memory_);
  } else if (const CurrentGpu current(gpu_.index(), std::nothrow); current) {
    cudaFreeAsync(memory_, gpu_.stream());
  }
}

}  // namespace llama_ext::cuda
