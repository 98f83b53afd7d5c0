// Fibers, the scheduler and the shared memory of a block.
#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <vector>

#include "cuda_runtime.h"
#include "device_memory.h"

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
};

struct Fiber {
  Thread thread;
  void* stack_pointer = nullptr;
  const uint64_t* waits_for = nullptr;  // until this is no longer `value`
  uint64_t value = 0;
  bool is_done = false;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  uint64_t generation = 0;
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
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  const std::function<void()>* kernel = nullptr;
  const char* failure = nullptr;

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
  for (unsigned w = 0; w < threads / kWarpSize; ++w) {
    m.warps[w].arrived = 0;
    m.warps[w].what = nullptr;
  }
  for (unsigned i = 0; i < threads; ++i) prepare(m.fibers[i], i, dim3(i), m.stacks + i * kStack);
  unsigned left = threads;
  while (left > 0 && m.failure == nullptr) {
    bool has_moved = false;
    for (const unsigned i : turns) {
      Fiber& fiber = m.fibers[i];
      if (fiber.is_done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.value)) continue;
      fiber.waits_for = nullptr;
      has_moved = true;
      m.current = &fiber;
      cuda_emulation_switch(&m.scheduler, fiber.stack_pointer);
      if (fiber.is_done) --left;
      if (m.failure != nullptr) return;
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
  } else {
    wait_while(&warp.generation, generation);
  }
  return slots;
}

void copy_async(void* shared, const void* global, size_t nbytes) {
  std::memset(shared, 0xff, nbytes);
  machine().current->open_copies.push_back({shared, global, nbytes});
}

void commit_copies() {
  Fiber& self = *machine().current;
  self.groups.push_back(std::move(self.open_copies));
  self.open_copies.clear();
}

void wait_for_copies(int pending) {
  Fiber& self = *machine().current;
  while (self.groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : self.groups.front()) std::memcpy(copy.to, copy.from, copy.nbytes);
    self.groups.pop_front();
  }
}

void launch(CUstream_st* stream, const dim3& grid, unsigned threads, size_t shared_bytes,
            const std::function<void()>& kernel) {
  if (is_capturing(stream)) {
    capture(stream, [=] { launch(nullptr, grid, threads, shared_bytes, kernel); });
    return;
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > kMostThreads || threads % kWarpSize != 0 || shared_bytes > kMostShared) {
    set_last_error(cudaErrorInvalidValue, "a launch of impossible size");
    return;
  }
  Machine& m = machine();
  const size_t aligned_shared = (shared_bytes + 15) / 16 * 16;
  const Order turn_order = order();
  std::vector<unsigned> turns(threads);
  permute(turns, turn_order, threads);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  m.kernel = &kernel;
  m.failure = nullptr;
  m.block.size = dim3(threads);
  m.block.grid = grid;
  const DeviceAccess access;
  for (uint64_t i = 0; i < blocks && m.failure == nullptr; ++i) {
    const uint64_t number = turn_order == Order::kForward ? i : blocks - 1 - i;
    m.block.index = dim3(static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                         static_cast<unsigned>(number / grid.x / grid.y));
    run_block(m, threads, aligned_shared, turns);
  }
  if (m.failure != nullptr) set_last_error(cudaErrorLaunchFailure, m.failure);
}

}  // namespace cuda_emulation
