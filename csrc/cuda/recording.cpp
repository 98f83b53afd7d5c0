#include "cuda/recording.h"

#include <algorithm>
#include <utility>

#include "cuda/device_views.h"
#include "cuda/ranges.h"

namespace llama_ext::cuda {
namespace {

class CudaMark final : public Mark {
 public:
  explicit CudaMark(std::shared_ptr<Gpu> gpu) : gpu_(std::move(gpu)) {
    const CurrentGpu current = gpu_->use();
    require_success(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "creating an event");
  }
  ~CudaMark() override {
    const CurrentGpu current(gpu_->index(), std::nothrow);
    cudaEventDestroy(event_);
  }
  CudaMark(const CudaMark&) = delete;
  CudaMark& operator=(const CudaMark&) = delete;
  void set() override {
    const CurrentGpu current = gpu_->use();
    require_success(cudaEventRecord(event_, gpu_->stream()), "setting an event");
  }
  void wait() override {
    const CurrentGpu current = gpu_->use();
    require_success(cudaEventSynchronize(event_), "waiting for the GPU");
  }

 private:
  std::shared_ptr<Gpu> gpu_;
  cudaEvent_t event_ = nullptr;
};

/// Page-locked, so that kernels reach it.
class VisibleBuffer final : public Buffer {
 public:
  VisibleBuffer(std::shared_ptr<Gpu> gpu, size_t nbytes)
      : Buffer(allocate(*gpu, nbytes), nbytes), gpu_(std::move(gpu)) {}
  ~VisibleBuffer() override {
    const CurrentGpu current(gpu_->index(), std::nothrow);
    cudaFreeHost(data());
  }
  VisibleBuffer(const VisibleBuffer&) = delete;
  VisibleBuffer& operator=(const VisibleBuffer&) = delete;

 private:
  static void* allocate(const Gpu& gpu, size_t nbytes) {
    const CurrentGpu current = gpu.use();
    void* memory = nullptr;
    require_success(cudaHostAlloc(&memory, nbytes, cudaHostAllocDefault), "memory that the GPU shares");
    std::fill_n(static_cast<unsigned char*>(memory), nbytes, static_cast<unsigned char>(0));
    return memory;
  }

  std::shared_ptr<Gpu> gpu_;
};

/// A captured graph, ready to run.
class CudaRecording final : public Recording {
 public:
  CudaRecording(std::shared_ptr<Gpu> gpu, const std::function<void()>& operations)
      : gpu_(std::move(gpu)), arena_(*gpu_) {
    const CurrentGpu current = gpu_->use();
    cudaGraph_t graph = nullptr;
    {
      const Capture capture(*gpu_, arena_);
      operations();
      graph = capture.end();
    }
    const cudaError_t error = cudaGraphInstantiate(&runnable_, graph, 0);
    cudaGraphDestroy(graph);
    require_success(error, "making a graph of recorded kernels");
  }
  ~CudaRecording() override {
    const CurrentGpu current(gpu_->index(), std::nothrow);
    cudaGraphExecDestroy(runnable_);
  }
  CudaRecording(const CudaRecording&) = delete;
  CudaRecording& operator=(const CudaRecording&) = delete;
  void replay() override {
    const CurrentGpu current = gpu_->use();
    require_success(cudaGraphLaunch(runnable_, gpu_->stream()), "a graph of recorded kernels");
  }

 private:
  std::shared_ptr<Gpu> gpu_;
  Arena arena_;
  cudaGraphExec_t runnable_ = nullptr;
};

}  // namespace

std::unique_ptr<Recording> CudaRecorder::record(const std::function<void()>& operations) {
  return std::make_unique<CudaRecording>(gpu_, operations);
}

std::unique_ptr<Mark> CudaRecorder::create_mark() { return std::make_unique<CudaMark>(gpu_); }

std::unique_ptr<Buffer> CudaRecorder::allocate_visible(size_t nbytes) {
  return std::make_unique<VisibleBuffer>(gpu_, nbytes);
}

void CudaRecorder::sample_next(const SampleNextArgs& args) {
  const OpRange range("sample_next");
  check(args);
  const SamplingOptions& options = *args.options;
  SampleNextView view;
  view.logits = device_data(args.logits);
  view.rows = static_cast<int>(args.logits.rows());
  view.vocabulary = static_cast<int>(args.logits.dim(1));
  view.tokens = static_cast<int32_t*>(args.tokens.data());
  view.positions = static_cast<int32_t*>(args.positions.data());
  view.state = args.rows;
  view.results = args.results;
  view.slots = static_cast<int>(args.slots);
  if (!options.logit_bias.empty()) view.bias = device_data(args.bias);
  if (has_penalties(options)) view.occurrences = static_cast<int32_t*>(args.occurrences.data());
  view.temperature = options.temperature;
  view.top_k = options.top_k;
  view.top_p = options.top_p;
  view.min_p = options.min_p;
  view.repetition_penalty = options.repetition_penalty;
  view.presence_penalty = options.presence_penalty;
  view.frequency_penalty = options.frequency_penalty;
  cuda::sample_next(*gpu_, view);
}

}  // namespace llama_ext::cuda
