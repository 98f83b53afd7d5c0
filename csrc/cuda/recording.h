// Operations captured into a CUDA graph, on a stream of their own: what other threads ask for meanwhile goes where it always goes.
#pragma once

#include <functional>
#include <memory>

#include "backend/backend.h"
#include "cuda/runtime.h"

namespace llama_ext::cuda {

class CudaRecorder final : public Recorder {
 public:
  explicit CudaRecorder(std::shared_ptr<Gpu> gpu) : gpu_(std::move(gpu)) {}
  std::unique_ptr<Recording> record(const std::function<void()>& operations) override;
  std::unique_ptr<Mark> create_mark() override;
  std::unique_ptr<Buffer> allocate_visible(size_t nbytes) override;
  void sample_next(const SampleNextArgs& args) override;

 private:
  std::shared_ptr<Gpu> gpu_;
};

}  // namespace llama_ext::cuda
