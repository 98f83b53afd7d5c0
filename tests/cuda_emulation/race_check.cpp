#include "race_check.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>
#include <unordered_map>
#include <vector>

#include "emulation.h"

namespace cuda_emulation::race_check {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kMostPages = 1024;  // of about 200 KB each
constexpr uint32_t kMostThreads = 1024;

/// Who shares an access: more than one thread only of reads.
enum class Sharers : uint8_t { kThread, kWarp, kBlock, kBlocks };

struct Stamp {
  uint32_t launch = 0;  // 0: none
  uint32_t block = 0;
  uint32_t epoch = 0;
  uint32_t warp_epoch = 0;
  uint32_t code = 0;  // within the library
  uint16_t thread = 0;
  Sharers sharers = Sharers::kThread;
  bool is_atomic = false;
};

/// The last accesses of a byte. Earlier ones are ordered before them, or have been told.
struct Cell {
  Stamp write;
  Stamp read;
};

/// What a block made visible with an atomic operation: accesses before its barrier number `before`, and the calling thread's own.
struct Release {
  uint32_t block;
  uint32_t before;
  uint32_t thread;
};
/// A release that the current block has seen, by which thread and when.
struct Acquired {
  Release release;
  uint32_t thread;
  uint32_t epoch;
  uint64_t time;
};
struct Fence {
  uint64_t time = 0;  // 0: none in this block
  uint32_t epoch = 0;
};

bool is_instrumented = false;
/// The linker may have chosen an instrumented copy of a function that is used here.
bool is_inside = false;
uint32_t blocks_of_launch = 0;
const unsigned char* shared_begin = nullptr;
size_t shared_size = 0;
std::vector<Cell> shared_cells;
std::unordered_map<uintptr_t, std::unique_ptr<std::array<Cell, kPage>>> pages;
/// What was looked up of late, in this launch: allocations take whole pages, and neither begin nor end meanwhile.
struct Recent {
  uintptr_t page = 0;
  Cell* cells = nullptr;
};
std::array<Recent, 1024> recent;
std::unordered_map<const void*, std::vector<Release>> releases;  // by the address of the atomic operation
std::vector<Acquired> acquired;
std::array<Fence, kMostThreads> fences;
uint64_t now = 0;

bool is_known(const Release& release, const Stamp& stamp) {
  if (stamp.sharers != Sharers::kBlocks && stamp.block != release.block) return false;
  return stamp.epoch < release.before || (stamp.sharers == Sharers::kThread && stamp.thread == release.thread);
}

bool is_visible(const Acquired& a, const Place& place) {
  const bool is_after = place.thread == a.thread || place.epoch > a.epoch;
  return is_after && std::max(fences[place.thread].time, fences[a.thread].time) > a.time;
}

bool is_ordered(const Stamp& stamp, const Place& place) {
  if (stamp.launch < place.first_unfinished) return true;
  if (stamp.launch != place.launch) return false;
  if (stamp.sharers == Sharers::kBlocks) {
    // Every other block must be known.
    const auto known =
        std::count_if(acquired.begin(), acquired.end(), [&](const Acquired& a) { return is_visible(a, place); });
    return static_cast<uint32_t>(known) + 1 >= blocks_of_launch;
  }
  if (stamp.block != place.block) {
    return std::any_of(acquired.begin(), acquired.end(),
                       [&](const Acquired& a) { return is_visible(a, place) && is_known(a.release, stamp); });
  }
  if (stamp.epoch < place.epoch) return true;
  if (stamp.sharers == Sharers::kBlock) return false;
  if (stamp.sharers == Sharers::kThread && stamp.thread == place.thread) return true;
  return stamp.thread / kWarpSize == place.thread / kWarpSize && stamp.warp_epoch < place.warp_epoch;
}

/// `stamp` with an access of `place` that nothing orders after it.
void share(Stamp& stamp, const Place& place) {
  if (stamp.block != place.block || stamp.sharers == Sharers::kBlocks) {
    stamp.sharers = Sharers::kBlocks;
  } else if (stamp.thread / kWarpSize != place.thread / kWarpSize) {
    stamp.sharers = Sharers::kBlock;
  } else if (stamp.sharers == Sharers::kThread && stamp.thread != place.thread) {
    stamp.sharers = Sharers::kWarp;
  }
}

uint32_t in_library(const void* code) {
  static const auto* base = [] {
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&is_on), &info);
    return static_cast<const char*>(info.dli_fbase);
  }();
  return static_cast<uint32_t>(static_cast<const char*>(code) - base);
}

/// Of a byte of the device's memory; nullptr where it is not of that.
Cell* cells_of(const unsigned char* byte) {
  const auto page = reinterpret_cast<uintptr_t>(byte) / kPage;
  Recent& found = recent[page % recent.size()];
  if (found.page != page) {
    found = {page, nullptr};
    if (is_device_memory(byte, 1)) {
      auto& cells = pages[page];
      if (cells == nullptr) cells = std::make_unique<std::array<Cell, kPage>>();
      found.cells = cells->data();
    }
  }
  return found.cells == nullptr ? nullptr : found.cells + reinterpret_cast<uintptr_t>(byte) % kPage;
}

void tell(const Stamp& before, bool was_write, const Place& place, Access kind, const void* byte, uint32_t code) {
  const bool is_shared = byte >= shared_begin && byte < shared_begin + shared_size;
  static constexpr const char* kSharers[] = {"", " and others of its warp", " and others of its block",
                                             " and other blocks"};
  static constexpr const char* kVerbs[] = {"reads", "writes", "changes atomically"};
  char text[512];
  std::snprintf(
      text, sizeof text,
      "a race: thread %u of block %u %s %s memory (byte %zu, code +0x%x)%s, and nothing orders that after thread %u%s "
      "of block %u, which %s it%s (code +0x%x); addr2line tells the lines",
      place.thread, place.block, kVerbs[static_cast<int>(kind)], is_shared ? "shared" : "global",
      is_shared ? static_cast<size_t>(static_cast<const unsigned char*>(byte) - shared_begin)
                : static_cast<size_t>(reinterpret_cast<uintptr_t>(byte)),
      code, place.first_unfinished < place.launch ? " before it waits for other kernels" : "", before.thread,
      kSharers[static_cast<int>(before.sharers)], before.block, was_write ? "wrote" : "read",
      before.launch < place.launch ? " in another kernel" : "", before.code);
  is_inside = false;
  fail_launch(text);
}

void check(Cell& cell, Access kind, const Place& place, const void* byte, uint32_t code) {
  const bool is_write_ordered = is_ordered(cell.write, place);
  if (!is_write_ordered && !(kind == Access::kAtomic && cell.write.is_atomic))
    return tell(cell.write, true, place, kind, byte, code);
  if (kind == Access::kRead) {
    if (!is_ordered(cell.read, place)) return share(cell.read, place);
  } else if (!is_ordered(cell.read, place)) {
    return tell(cell.read, false, place, kind, byte, code);
  }
  const Stamp stamp = {place.launch,
                       place.block,
                       place.epoch,
                       place.warp_epoch,
                       code,
                       static_cast<uint16_t>(place.thread),
                       Sharers::kThread,
                       kind == Access::kAtomic};
  (kind == Access::kRead ? cell.read : cell.write) = stamp;
}

/// What an atomic operation says to other blocks, and learns from them.
void meet(const void* address, const Place& place) {
  ++now;
  std::vector<Release>& all = releases[address];
  for (const Release& release : all) {
    if (release.block != place.block) acquired.push_back({release, place.thread, place.epoch, now});
  }
  const uint32_t threads = block().size.x;
  const auto earliest = std::min_element(fences.begin(), fences.begin() + threads,
                                         [](const Fence& a, const Fence& b) { return a.epoch < b.epoch; });
  const bool have_all =
      std::all_of(fences.begin(), fences.begin() + threads, [](const Fence& f) { return f.time > 0; });
  const Fence& own = fences[place.thread];
  if (own.time == 0) return;
  uint32_t before = own.epoch;
  // Or each thread's fence lies before a barrier that this one has passed.
  if (have_all && earliest->epoch < place.epoch) before = std::max(before, earliest->epoch + 1);
  all.push_back({place.block, before, place.thread});
}

}  // namespace

bool is_on() { return is_instrumented; }

void begin_launch(uint32_t blocks, bool starts_early) {
  if (!is_on()) return;
  blocks_of_launch = blocks;
  releases.clear();
  recent.fill({});
  // All that is known of them is ordered before this launch.
  if (!starts_early && pages.size() > kMostPages) pages.clear();
}

void begin_block(const unsigned char* shared, size_t shared_bytes) {
  if (!is_on()) return;
  shared_begin = shared;
  shared_size = shared_bytes;
  shared_cells.assign(shared_bytes, Cell{});
  acquired.clear();
  fences.fill({});
}

void access(Access kind, const void* data, size_t nbytes, const void* from) {
  Place place;
  if (is_inside || !is_on() || !current_place(data, place)) return;
  is_inside = true;
  const auto* bytes = static_cast<const unsigned char*>(data);
  const bool is_shared = bytes >= shared_begin && bytes < shared_begin + shared_size;
  if (is_shared) {
    nbytes = std::min(nbytes, static_cast<size_t>(shared_begin + shared_size - bytes));
  } else if (cells_of(bytes) == nullptr) {
    is_inside = false;
    return;
  } else if (kind == Access::kAtomic) {
    meet(data, place);
  }
  const uint32_t code = in_library(from);
  for (size_t i = 0; i < nbytes; ++i) {
    Cell* cell = is_shared ? shared_cells.data() + (bytes + i - shared_begin) : cells_of(bytes + i);
    if (cell != nullptr) check(*cell, kind, place, bytes + i, code);
  }
  is_inside = false;
}

void fence() {
  Place place;
  if (!is_on() || !current_place(nullptr, place)) return;
  fences[place.thread] = {++now, place.epoch};
}

}  // namespace cuda_emulation::race_check

// What the compiler calls. It wants a few more than kernels need.
using cuda_emulation::Access;

extern "C" {

void __tsan_init() { cuda_emulation::race_check::is_instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define LLAMA_EXT_ACCESSES(NBYTES)                                                                 \
  void __tsan_read##NBYTES(void* data) {                                                           \
    cuda_emulation::race_check::access(Access::kRead, data, NBYTES, __builtin_return_address(0));  \
  }                                                                                                \
  void __tsan_write##NBYTES(void* data) {                                                          \
    cuda_emulation::race_check::access(Access::kWrite, data, NBYTES, __builtin_return_address(0)); \
  }
LLAMA_EXT_ACCESSES(1)
LLAMA_EXT_ACCESSES(2)
LLAMA_EXT_ACCESSES(4)
LLAMA_EXT_ACCESSES(8)
LLAMA_EXT_ACCESSES(16)
#undef LLAMA_EXT_ACCESSES

void __tsan_read_range(void* data, size_t nbytes) {
  cuda_emulation::race_check::access(Access::kRead, data, nbytes, __builtin_return_address(0));
}
void __tsan_write_range(void* data, size_t nbytes) {
  cuda_emulation::race_check::access(Access::kWrite, data, nbytes, __builtin_return_address(0));
}
void __tsan_vptr_update(void*, void*) {}

}  // extern "C"
