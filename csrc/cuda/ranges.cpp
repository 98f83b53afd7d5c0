#include "cuda/ranges.h"

#include <cstdlib>
#include <string_view>

#include "core/errors.h"

#if defined(LLAMA_EXT_NVTX)
#include <nvtx3/nvToolsExt.h>
#endif

namespace llama_ext::cuda {
namespace {

/// What LLAMA_EXT_NVTX says, or "".
std::string_view asked() {
  const char* text = std::getenv("LLAMA_EXT_NVTX");
  return text == nullptr ? "" : text;
}

[[noreturn]] void fail_without(std::string_view who) {
  fail(ErrorKind::kUnsupported, who,
       ": this build of llama_ext has no NVTX ranges, as nvtx3/nvToolsExt.h was not found. ",
       "Install the header of the CUDA toolkit (cuda-nvtx) and build the package again");
}

#if defined(LLAMA_EXT_NVTX)
nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t handle = nvtxDomainCreateA("llama_ext");
  return handle;
}
#endif

}  // namespace

std::atomic<bool> ranges::are_on = has_ranges() && asked() == "1";

void show_ranges(bool on) {
  if (on && !has_ranges()) fail_without("set_nvtx_ranges");
  ranges::are_on.store(on, std::memory_order_relaxed);
}

void require_ranges_asked_for() {
  require(asked().empty() || asked() == "0" || asked() == "1", ErrorKind::kOption,
          "LLAMA_EXT_NVTX must be 0 or 1, got '", asked(), "'");
  if (asked() == "1" && !has_ranges()) fail_without("LLAMA_EXT_NVTX=1");
}

#if defined(LLAMA_EXT_NVTX)
bool has_ranges() { return true; }

void push_range(const char* name) {
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = name;
  nvtxDomainRangePushEx(domain(), &attributes);
}

void pop_range() { nvtxDomainRangePop(domain()); }
#else
bool has_ranges() { return false; }
void push_range(const char*) {}
void pop_range() {}
#endif

}  // namespace llama_ext::cuda
