#include "cpu/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <string>

#include "core/errors.h"
#include "cpu/cgroup.h"

namespace llama_ext {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// Asking costs tens of microseconds, more than a small buffer itself.
constexpr size_t kWorthAsking = size_t{64} << 20;
constexpr size_t kUnlimited = std::numeric_limits<size_t>::max();

void* map_pages(size_t nbytes, const char* what) {
  if (nbytes == 0) return nullptr;
  // Asked first: the system itself promises more than it has, and ends the process when it cannot keep its word.
  if (nbytes >= kWorthAsking) require_available_memory(nbytes, what);
  void* data = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(data != MAP_FAILED, ErrorKind::kOutOfMemory, what, " needs ", nbytes, " bytes: ", std::strerror(errno));
  return data;
}

size_t system_memory() {
  std::ifstream file("/proc/meminfo");
  std::string key;
  while (file >> key) {
    if (key == "MemAvailable:") {
      size_t kib = 0;
      return file >> kib ? kib * 1024 : kUnlimited;
    }
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return kUnlimited;
}

/// What the tightest control group of this process could give.
size_t cgroup_memory() {
  size_t left = kUnlimited;
  for (const std::string& folder : cgroup_folders("memory")) left = std::min(left, cgroup_memory_left(folder));
  return left;
}

}  // namespace

size_t available_memory() { return std::min(system_memory(), cgroup_memory()); }

void require_available_memory(size_t nbytes, const char* what) {
  const size_t available = available_memory();
  require(nbytes <= available, ErrorKind::kOutOfMemory, what, " needs ", nbytes, " bytes, ", available,
          " are available");
}

HostBuffer::HostBuffer(size_t nbytes, const char* what) : Buffer(map_pages(nbytes, what), nbytes) {
  // About 12% of a decode step: fewer misses of the address cache. Only a hint, so a refusal is no error.
  if (nbytes >= 2 * kHugePage) madvise(data(), nbytes, MADV_HUGEPAGE);
}

HostBuffer::~HostBuffer() {
  if (data() != nullptr) munmap(data(), nbytes());
}

void* thread_scratch(Scratch purpose, size_t nbytes) {
  thread_local std::array<std::unique_ptr<HostBuffer>, kScratches> buffers;
  std::unique_ptr<HostBuffer>& scratch = buffers[static_cast<size_t>(purpose)];
  if (!scratch || scratch->nbytes() < nbytes) {
    scratch.reset();
    scratch = std::make_unique<HostBuffer>(nbytes < 65536 ? 65536 : nbytes + nbytes / 4, "scratch");
  }
  return scratch->data();
}

}  // namespace llama_ext
