// Fibers, the scheduler and the shared memory of a block.
#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "device_memory.h"
#include "race_check.h"

// Saves the registers that a call keeps, changes stacks, and returns into the other fiber.
extern "C" void cuda_emulation_switch(void** save, void* load);
asm(R"(
.text
.globl cuda_emulation_switch
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_switch, .-cuda_emulation_switch
.section .note.GNU-stack,"",@progbits
.text
)");

namespace cuda_emulation {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kMostShared = 227 * 1024;

struct Copy {
  void* to;
  const void* from;
  size_t nbytes;
  const void* code;
};

struct Fiber {
  Thread thread;
  void* stack_pointer = nullptr;
  const uint64_t* waits_for = nullptr;  // until this is no longer `value`
  uint64_t value = 0;
  bool is_done = false;
  bool has_waited = false;  // for kernels before its own
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  uint64_t generation = 0;
  uint32_t syncs = 0;
  unsigned arrived = 0;
  const char* what = nullptr;
  alignas(16) unsigned char slots[2][kWarpSize * kSlot];
};

/// Everything a host thread needs to run blocks; made at its first launch.
struct Machine {
  Block block;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMostThreads);
  std::vector<Warp> warps = std::vector<Warp>(kMostThreads / kWarpSize);
  unsigned char* stacks = nullptr;
  unsigned char* shared = nullptr;  // ends at a forbidden page
  uint64_t barrier = 0;
  unsigned at_barrier = 0;
  uint32_t launch = 0;
  uint32_t first_unfinished = 0;  // launch that this one may run beside, until it waits
  uint32_t block_number = 0;
  uint32_t epoch = 0;
  bool has_any_waited = false;
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::string failure;

  Machine() {
    const auto map = [](size_t nbytes) {
      void* memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) std::abort();
      return static_cast<unsigned char*>(memory);
    };
    stacks = map(kMostThreads * kStack);
    for (unsigned i = 0; i < kMostThreads; ++i) mprotect(stacks + i * kStack, 4096, PROT_NONE);
    shared = map(kMostShared + 4096 + 4096);
    const size_t whole = (kMostShared + 4095) / 4096 * 4096;
    mprotect(shared + whole, 4096, PROT_NONE);
    shared += whole;
  }
};

Machine& machine() {
  thread_local std::unique_ptr<Machine> made = std::make_unique<Machine>();
  return *made;
}
thread_local Machine* running = nullptr;  // while fibers run

// Counted over all host threads, which take turns where races are looked for.
std::mutex launch_mutex;
uint32_t launches = 0;
uint32_t first_of_chain = 0;  // of kernels that start early, one after the other

void to_scheduler() {
  Machine& m = machine();
  cuda_emulation_switch(&m.current->stack_pointer, m.scheduler);
}

/// Returns when *counter has changed from `value`.
void wait_while(const uint64_t* counter, uint64_t value) {
  Machine& m = machine();
  while (*counter == value) {
    m.current->waits_for = counter;
    m.current->value = value;
    to_scheduler();
  }
}

[[noreturn]] void fiber_main() {
  Machine& m = machine();
  (*m.kernel)();
  Fiber& self = *m.current;
  if (!self.open_copies.empty() || !self.groups.empty())
    m.failure = "a thread ended with copies that nobody waited for";
  self.is_done = true;
  to_scheduler();
  std::abort();
}

void prepare(Fiber& fiber, unsigned number, const dim3& index, unsigned char* stack) {
  fiber.thread.index = index;
  fiber.thread.number = number;
  fiber.waits_for = nullptr;
  fiber.is_done = false;
  fiber.has_waited = machine().first_unfinished == machine().launch;
  fiber.open_copies.clear();
  fiber.groups.clear();
  // Six registers and the address that the switch returns to; aligned as after a call.
  void** top = reinterpret_cast<void**>(stack + kStack - 64);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(&fiber_main);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  fiber.stack_pointer = top - 8;
}

/// The order in which threads and blocks take turns: what is right in one and wrong in another lacks a barrier.
enum class Order { kForward, kBackward, kShuffled };
Order order() {
  const char* name = std::getenv("LLAMA_EXT_CUDA_EMULATION_ORDER");
  if (name == nullptr || std::strcmp(name, "forward") == 0) return Order::kForward;
  return std::strcmp(name, "backward") == 0 ? Order::kBackward : Order::kShuffled;
}

void permute(std::vector<unsigned>& numbers, Order order, uint64_t seed) {
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (order == Order::kBackward) std::reverse(numbers.begin(), numbers.end());
  if (order != Order::kShuffled) return;
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (size_t i = numbers.size(); i > 1; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(numbers[i - 1], numbers[(state >> 33) % i]);
  }
}

void run_block(Machine& m, unsigned threads, size_t shared_bytes, const std::vector<unsigned>& turns) {
  m.block.shared = m.shared - shared_bytes;
  std::memset(m.block.shared, 0xff, shared_bytes);
  m.at_barrier = 0;
  m.epoch = 0;
  race_check::begin_block(m.block.shared, shared_bytes);
  for (unsigned w = 0; w < threads / kWarpSize; ++w) {
    m.warps[w].arrived = 0;
    m.warps[w].syncs = 0;
    m.warps[w].what = nullptr;
  }
  for (unsigned i = 0; i < threads; ++i) prepare(m.fibers[i], i, dim3(i), m.stacks + i * kStack);
  unsigned left = threads;
  while (left > 0 && m.failure.empty()) {
    bool has_moved = false;
    for (const unsigned i : turns) {
      Fiber& fiber = m.fibers[i];
      if (fiber.is_done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.value)) continue;
      fiber.waits_for = nullptr;
      has_moved = true;
      m.current = &fiber;
      cuda_emulation_switch(&m.scheduler, fiber.stack_pointer);
      if (fiber.is_done) --left;
      if (!m.failure.empty()) return;
    }
    if (!has_moved) m.failure = "a barrier or a collective that not all threads reach";
  }
}

}  // namespace

Thread& thread() { return machine().current->thread; }
Block& block() { return machine().block; }

void sync_block() {
  Machine& m = machine();
  const uint64_t generation = m.barrier;
  if (++m.at_barrier == m.block.size.x) {
    m.at_barrier = 0;
    ++m.barrier;
    ++m.epoch;
    return;
  }
  wait_while(&m.barrier, generation);
}

const unsigned char* exchange_bytes(const char* what, const void* value, size_t nbytes) {
  Machine& m = machine();
  Warp& warp = m.warps[m.current->thread.number / kWarpSize];
  const uint64_t generation = warp.generation;
  unsigned char* slots = warp.slots[generation % 2];
  if (warp.arrived > 0 && std::strcmp(warp.what, what) != 0) {
    m.failure = "lanes of one warp call different collectives";
    to_scheduler();
  }
  warp.what = what;
  std::memcpy(slots + lane() * kSlot, value, nbytes);
  if (++warp.arrived == kWarpSize) {
    warp.arrived = 0;
    ++warp.generation;
    if (std::strcmp(what, kSyncWarp) == 0) ++warp.syncs;
  } else {
    wait_while(&warp.generation, generation);
  }
  return slots;
}

bool current_place(const void* data, Place& place) {
  const Machine* m = running;
  if (m == nullptr) return false;
  const auto* byte = static_cast<const unsigned char*>(data);
  if (byte >= m->stacks && byte < m->stacks + kMostThreads * kStack) return false;
  const Fiber& fiber = *m->current;
  place = {m->launch, fiber.has_waited ? m->launch : m->first_unfinished, m->block_number,
           m->epoch,  m->warps[fiber.thread.number / kWarpSize].syncs,    fiber.thread.number};
  return true;
}

void fail_launch(const char* reason) {
  machine().failure = reason;
  to_scheduler();
}

void wait_for_predecessors() {
  Machine& m = machine();
  m.current->has_waited = true;
  m.has_any_waited = true;
}

void copy_async(void* shared, const void* global, size_t nbytes) {
  const void* code = __builtin_return_address(0);
  race_check::access(Access::kRead, global, nbytes, code);
  race_check::access(Access::kWrite, shared, nbytes, code);
  std::memset(shared, 0xff, nbytes);
  machine().current->open_copies.push_back({shared, global, nbytes, code});
}

void commit_copies() {
  Fiber& self = *machine().current;
  self.groups.push_back(std::move(self.open_copies));
  self.open_copies.clear();
}

void wait_for_copies(int pending) {
  Fiber& self = *machine().current;
  while (self.groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : self.groups.front()) {
      race_check::access(Access::kRead, copy.from, copy.nbytes, copy.code);
      race_check::access(Access::kWrite, copy.to, copy.nbytes, copy.code);
      std::memcpy(copy.to, copy.from, copy.nbytes);
    }
    self.groups.pop_front();
  }
}

void begin_in_order() {
  const std::lock_guard lock(launch_mutex);
  first_of_chain = launches + 1;
}

void launch(CUstream_st* stream, const dim3& grid, unsigned threads, size_t shared_bytes, bool starts_early,
            const std::function<void()>& kernel) {
  if (is_capturing(stream)) {
    capture(stream, [=] { launch(nullptr, grid, threads, shared_bytes, starts_early, kernel); });
    return;
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > kMostThreads || threads % kWarpSize != 0 || shared_bytes > shared_memory_per_block()) {
    set_last_error(cudaErrorInvalidValue, "a launch of impossible size");
    return;
  }
  std::unique_lock turn(launch_mutex);
  Machine& m = machine();
  m.launch = ++launches;
  if (!starts_early) first_of_chain = m.launch;
  m.first_unfinished = first_of_chain;
  m.has_any_waited = false;
  if (!race_check::is_on()) turn.unlock();
  const size_t aligned_shared = (shared_bytes + 15) / 16 * 16;
  const Order turn_order = order();
  std::vector<unsigned> turns(threads);
  permute(turns, turn_order, threads);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  m.kernel = &kernel;
  m.failure.clear();
  m.block.size = dim3(threads);
  m.block.grid = grid;
  race_check::begin_launch(static_cast<uint32_t>(blocks), starts_early);
  const DeviceAccess access;
  running = &m;
  for (uint64_t i = 0; i < blocks && m.failure.empty(); ++i) {
    const uint64_t number = turn_order == Order::kForward ? i : blocks - 1 - i;
    m.block_number = static_cast<uint32_t>(number);
    m.block.index = dim3(static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                         static_cast<unsigned>(number / grid.x / grid.y));
    run_block(m, threads, aligned_shared, turns);
  }
  running = nullptr;
  if (starts_early && !m.has_any_waited && m.failure.empty())
    m.failure = "a kernel that starts early and does not wait for its predecessors";
  if (!m.failure.empty()) set_last_error(cudaErrorLaunchFailure, m.failure.c_str());
}

}  // namespace cuda_emulation
