// The emulated runtime: memory, copies, errors. What a test wants to be wrong is named by environment variables.
#include "device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace cuda_emulation {
namespace {

constexpr size_t kPage = 4096;

struct Allocation {
  size_t nbytes;
  unsigned char* mapping;
  size_t mapped;
};

std::mutex mutex;
std::map<const unsigned char*, Allocation> allocations;
size_t allocated = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_reason;
thread_local int access_depth = 0;
thread_local int current_device = 0;
constexpr size_t kMostDevices = 16;
std::array<std::atomic<bool>, kMostDevices>
    is_used;  // whoever makes a GPU current, or has it do something, makes its context

void use_device(int device) { is_used[static_cast<size_t>(device) % kMostDevices] = true; }

int protection_key() {
  static const int key = pkey_alloc(0, 0);
  return key;
}

size_t setting(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

size_t memory_size() { return setting("LLAMA_EXT_CUDA_EMULATION_MEMORY", size_t{4} << 30); }

int capability() { return static_cast<int>(setting("LLAMA_EXT_CUDA_EMULATION_CAPABILITY", 90)); }

cudaError_t fail(cudaError_t error, const char* reason) {
  set_last_error(error, reason);
  return error;
}

/// As the real runtime checks pointers: anything else is an error, not a crash.
bool is_valid(const void* data, size_t nbytes, bool is_device) {
  return nbytes == 0 || is_device_memory(data, nbytes) == is_device;
}

}  // namespace

size_t shared_memory_per_block() {
  // CUDA C++ programming guide, technical specifications per compute capability.
  const int number = capability();
  if (number == 80 || number == 87) return size_t{163} * 1024;
  return number < 90 || number >= 120 ? size_t{99} * 1024 : size_t{227} * 1024;
}

int architecture_of_code() {
  return static_cast<int>(setting("LLAMA_EXT_CUDA_EMULATION_CODE", capability() == 90 ? 90 : 80));
}

void set_last_error(cudaError_t error, const char* reason) {
  last_error = error;
  last_reason = reason;
}

bool has_protection_keys() { return protection_key() >= 0; }

DeviceAccess::DeviceAccess() {
  if (access_depth++ == 0 && protection_key() >= 0) pkey_set(protection_key(), 0);
}

DeviceAccess::~DeviceAccess() {
  if (--access_depth == 0 && protection_key() >= 0) pkey_set(protection_key(), PKEY_DISABLE_ACCESS);
}

bool is_device_memory(const void* data, size_t nbytes) {
  const auto* begin = static_cast<const unsigned char*>(data);
  const std::lock_guard lock(mutex);
  auto found = allocations.upper_bound(begin);
  if (found == allocations.begin()) return false;
  --found;
  return begin + nbytes <= found->first + found->second.nbytes;
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

// Graphs: a list of closures.

struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> work;
  int device = current_device;
};
struct CUstream_st {
  struct Copy {
    void* to;
    const void* from;
    size_t nbytes;
  };
  int device = current_device;
  CUgraph_st* graph = nullptr;  // while it captures
  std::vector<Copy> copies;     // from the host's memory, still to be done
};
struct CUevent_st {
  int device = current_device;
};

static std::atomic<int> capturing_streams = 0;
static std::mutex copies_mutex;
static std::set<CUstream_st*> streams;

/// Whether copies from the host's memory are done as late as may be, which some drivers do with pageable memory, too.
static bool copies_are_late() { return setting("LLAMA_EXT_CUDA_EMULATION_LATE_COPIES", 1) != 0; }

static void finish_copies_of(CUstream_st& stream) {
  const DeviceAccess access;
  for (const CUstream_st::Copy& copy : stream.copies) std::memcpy(copy.to, copy.from, copy.nbytes);
  stream.copies.clear();
}

void cuda_emulation::finish_copies(cudaStream_t stream) {
  const std::lock_guard lock(copies_mutex);
  if (stream != nullptr) finish_copies_of(*stream);
}

static void finish_all_copies() {
  const std::lock_guard lock(copies_mutex);
  for (CUstream_st* stream : streams) finish_copies_of(*stream);
}

bool cuda_emulation::is_elsewhere(cudaStream_t stream) {
  if (stream == nullptr || stream->device == current_device) return false;
  set_last_error(cudaErrorInvalidResourceHandle, "a stream of another GPU than the current one");
  return true;
}

bool cuda_emulation::is_capturing(cudaStream_t stream) { return stream != nullptr && stream->graph != nullptr; }

void cuda_emulation::capture(cudaStream_t stream, std::function<void()> work) {
  stream->graph->work.push_back(std::move(work));
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || stream->graph != nullptr) return fail(cudaErrorInvalidValue, "no stream that can capture");
  stream->graph = new CUgraph_st;
  ++capturing_streams;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!is_capturing(stream)) return fail(cudaErrorInvalidValue, "the stream does not capture");
  *graph = std::exchange(stream->graph, nullptr);
  --capturing_streams;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* runnable, cudaGraph_t graph, unsigned long long) {
  use_device(current_device);
  *runnable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t runnable, cudaStream_t stream) {
  if (is_elsewhere(stream)) return last_error;
  if (runnable->device != current_device) return fail(cudaErrorInvalidValue, "a graph of another GPU");
  if (is_capturing(stream)) return fail(cudaErrorStreamCaptureUnsupported, "a graph within a graph");
  begin_in_order();
  finish_copies(stream);
  for (const auto& work : runnable->work) work();
  return last_error;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t runnable) {
  use_device(current_device);
  delete runnable;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  use_device(current_device);
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  use_device(current_device);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (is_elsewhere(stream)) return last_error;
  return event->device == current_device ? cudaSuccess
                                         : fail(cudaErrorInvalidResourceHandle, "an event of another GPU");
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  use_device(current_device);
  finish_all_copies();
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t nbytes, unsigned) {
  use_device(current_device);
  *memory = std::malloc(nbytes);
  return *memory != nullptr || nbytes == 0 ? cudaSuccess : fail(cudaErrorMemoryAllocation, "out of memory");
}
cudaError_t cudaFreeHost(void* memory) {
  use_device(current_device);
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  const size_t driver = setting("LLAMA_EXT_CUDA_EMULATION_DRIVER", CUDART_VERSION);
  if (driver < CUDART_VERSION / 1000 * 1000) return fail(cudaErrorInsufficientDriver, "driver");
  const size_t devices = setting("LLAMA_EXT_CUDA_EMULATION_DEVICES", 1);
  if (devices == 0) return fail(cudaErrorNoDevice, "no device");
  *count = static_cast<int>(devices);
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = static_cast<int>(setting("LLAMA_EXT_CUDA_EMULATION_DRIVER", CUDART_VERSION));
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || static_cast<size_t>(device) >= setting("LLAMA_EXT_CUDA_EMULATION_DEVICES", 1)) {
    return fail(cudaErrorInvalidDevice, "device");
  }
  current_device = device;
  use_device(device);
  return cudaSuccess;
}

int cuda_emulation::cuda_emulation_is_used(int device) { return is_used[static_cast<size_t>(device) % kMostDevices]; }

CUresult cuda_emulation::primary_context_state(CUdevice device, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = cuda_emulation_is_used(device);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(shared_memory_per_block());
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability() % 10;
      break;
    case cudaDevAttrMemoryPoolsSupported:
      *value = 1;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  use_device(current_device);
  attributes->ptxVersion = architecture_of_code();
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  use_device(current_device);
  const std::lock_guard lock(mutex);
  *total = memory_size();
  *available = *total - std::min(*total, allocated);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t nbytes) {
  use_device(current_device);
  if (nbytes == 0) {
    *memory = nullptr;
    return cudaSuccess;
  }
  const size_t padded = (nbytes + 15) / 16 * 16;
  const size_t usable = (padded + kPage - 1) / kPage * kPage;
  {
    const std::lock_guard lock(mutex);
    if (padded > memory_size() || allocated > memory_size() - padded) {
      return fail(cudaErrorMemoryAllocation, "out of memory");
    }
  }
  void* mapping =
      mmap(nullptr, usable + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return fail(cudaErrorMemoryAllocation, "out of memory");
  auto* bytes = static_cast<unsigned char*>(mapping);
  mprotect(bytes + usable, kPage, PROT_NONE);
  unsigned char* begin = bytes + usable - padded;
  std::memset(begin, 0xff, padded);
  if (protection_key() >= 0) {
    pkey_mprotect(bytes, usable, PROT_READ | PROT_WRITE, protection_key());
    if (access_depth == 0) pkey_set(protection_key(), PKEY_DISABLE_ACCESS);
  }
  const std::lock_guard lock(mutex);
  allocations[begin] = {nbytes, bytes, usable + kPage};
  allocated += padded;
  *memory = begin;
  return cudaSuccess;
}

static cudaError_t give_back(void* memory) {
  use_device(current_device);
  if (memory == nullptr) return cudaSuccess;
  finish_all_copies();
  const std::lock_guard lock(mutex);
  const auto found = allocations.find(static_cast<unsigned char*>(memory));
  if (found == allocations.end()) return fail(cudaErrorInvalidValue, "freed what was not allocated");
  munmap(found->second.mapping, found->second.mapped);
  allocated -= (found->second.nbytes + 15) / 16 * 16;
  allocations.erase(found);
  return cudaSuccess;
}

// A real one waits for all that the device does.
cudaError_t cudaFree(void* memory) {
  const size_t milliseconds = setting("LLAMA_EXT_CUDA_EMULATION_BUSY", 0);
  if (milliseconds > 0) std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  return give_back(memory);
}

cudaError_t cudaMallocAsync(void** memory, size_t nbytes, cudaStream_t stream) {
  return is_elsewhere(stream) ? last_error : cudaMalloc(memory, nbytes);
}
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  return is_elsewhere(stream) ? last_error : give_back(memory);
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = nullptr;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t nbytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (is_elsewhere(stream)) return last_error;
  // A real graph would read the host's memory again with every launch.
  if (is_capturing(stream)) return fail(cudaErrorStreamCaptureUnsupported, "a copy while kernels are recorded");
  if (!is_valid(to, nbytes, kind != cudaMemcpyDeviceToHost) ||
      !is_valid(from, nbytes, kind != cudaMemcpyHostToDevice)) {
    return fail(cudaErrorInvalidValue, "a copy between other memory than it says");
  }
  if (kind == cudaMemcpyHostToDevice && stream != nullptr && nbytes > 0 && copies_are_late()) {
    const std::lock_guard lock(copies_mutex);
    stream->copies.push_back({to, from, nbytes});
    return cudaSuccess;
  }
  finish_copies(stream);
  const DeviceAccess access;
  if (nbytes > 0) std::memmove(to, from, nbytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  if (to_pitch < width || from_pitch < width) return fail(cudaErrorInvalidValue, "rows that overlap");
  for (size_t row = 0; row < height; ++row) {
    const cudaError_t error =
        cudaMemcpyAsync(static_cast<unsigned char*>(to) + row * to_pitch,
                        static_cast<const unsigned char*>(from) + row * from_pitch, width, kind, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t nbytes, cudaStream_t stream) {
  if (is_elsewhere(stream)) return last_error;
  if (is_capturing(stream)) {
    capture(stream, [=] { cudaMemsetAsync(memory, value, nbytes, nullptr); });
    return cudaSuccess;
  }
  begin_in_order();
  finish_copies(stream);
  if (!is_valid(memory, nbytes, true)) return fail(cudaErrorInvalidValue, "not memory of the device");
  const DeviceAccess access;
  if (nbytes > 0) std::memset(memory, value, nbytes);
  return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(void* memory, size_t pitch, int value, size_t width, size_t height, cudaStream_t stream) {
  if (is_elsewhere(stream)) return last_error;
  if (is_capturing(stream)) {
    capture(stream, [=] { cudaMemset2DAsync(memory, pitch, value, width, height, nullptr); });
    return cudaSuccess;
  }
  begin_in_order();
  finish_copies(stream);
  if (height == 0 || width == 0) return cudaSuccess;
  if (!is_valid(memory, pitch * (height - 1) + width, true) || pitch < width) {
    return fail(cudaErrorInvalidValue, "not memory of the device");
  }
  const DeviceAccess access;
  for (size_t row = 0; row < height; ++row)
    std::memset(static_cast<unsigned char*>(memory) + row * pitch, value, width);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  use_device(current_device);
  *stream = new CUstream_st;
  const std::lock_guard lock(copies_mutex);
  streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  use_device(current_device);
  finish_copies(stream);
  {
    const std::lock_guard lock(copies_mutex);
    streams.erase(stream);
  }
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  use_device(current_device);
  finish_copies(stream);
  return cudaSuccess;
}
// A real one would be an error while any stream captures, and end its capture.
cudaError_t cudaDeviceSynchronize() {
  use_device(current_device);
  finish_all_copies();
  return capturing_streams == 0 ? cudaSuccess : fail(cudaErrorStreamCaptureUnsupported, "a stream captures");
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t) { return last_reason.c_str(); }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError (emulated)";
}
