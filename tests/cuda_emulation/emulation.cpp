// Fibers, the scheduler and the shared memory of a block.
#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
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
constexpr unsigned kMostCluster = 2;
constexpr unsigned kMostFibers = kMostCluster * kMostThreads;
constexpr size_t kSharedWindow = 228 * 1024;

struct Copy {
  void* to;
  const void* from;
  size_t nbytes;
  const void* code;
};

struct Resident;

struct Fiber {
  Thread thread;
  Resident* home = nullptr;
  void* stack_pointer = nullptr;
  const uint64_t* waits_for = nullptr;  // until this is no longer `value`
  uint64_t value = 0;
  bool is_done = false;
  bool has_waited = false;  // for kernels before its own
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> groups;
  std::vector<std::function<void()>> open_products;
  std::deque<std::vector<std::function<void()>>> products;
};

struct Warp {
  uint64_t generation = 0;
  uint32_t syncs = 0;
  unsigned arrived = 0;
  const char* what = nullptr;
  alignas(16) unsigned char slots[2][kWarpSize * kSlot];
};

/// A block that runs, and its places for whoever waits.
struct Resident {
  Block block;
  unsigned char* window = nullptr;  // of shared memory, which ends at a forbidden page
  uint32_t number = 0;              // within the grid
  uint32_t rank = 0;                // within its cluster
  unsigned left = 0;                // threads that are not done
  unsigned at_barrier = 0;
  uint64_t barrier = 0;
  uint32_t epoch = 0;
  int64_t registers = 0;  // that its threads have more than at the launch
  struct Named {
    unsigned arrived = 0;
    uint64_t generation = 0;
  };
  std::array<Named, 16> named;
};

/// Everything a host thread needs to run blocks; made at its first launch.
struct Machine {
  std::vector<Resident> residents = std::vector<Resident>(kMostCluster);
  std::vector<Fiber> fibers = std::vector<Fiber>(kMostFibers);
  std::vector<Warp> warps = std::vector<Warp>(kMostFibers / kWarpSize);
  unsigned char* stacks = nullptr;
  unsigned guarded =
      0;  // stacks that end at a forbidden page; more of them once they are used, as a process has few such pages
  unsigned cluster = 1;
  unsigned at_cluster_barrier = 0;
  uint64_t cluster_barrier = 0;
  std::deque<std::function<void()>> copies;  // of the copy engine, to be done
  bool is_watched = true;                    // for races
  uint32_t launch = 0;
  uint32_t first_unfinished = 0;  // launch that this one may run beside, until it waits
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
    stacks = map(kMostFibers * kStack);
    for (Resident& resident : residents) {
      resident.window = map(kSharedWindow + 4096);
      mprotect(resident.window + kSharedWindow, 4096, PROT_NONE);
    }
  }
  ~Machine() {
    munmap(stacks, kMostFibers * kStack);
    for (const Resident& resident : residents) munmap(resident.window, kSharedWindow + 4096);
  }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
};

Machine& machine() {
  thread_local std::unique_ptr<Machine> made = std::make_unique<Machine>();
  return *made;
}
thread_local Machine* running = nullptr;  // while fibers run

// Counted over all host threads, which take turns: a stream's kernels run one after the other, whoever starts them.
std::mutex launch_mutex;
uint32_t launches = 0;
uint32_t last_threads = 0;
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
  if (!self.open_copies.empty() || !self.groups.empty() || !self.open_products.empty() || !self.products.empty())
    m.failure = "a thread ended with copies or products that nobody waited for";
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
  fiber.open_products.clear();
  fiber.products.clear();
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

/// Blocks [first, first + cluster) of the grid.
void run_cluster(Machine& m, uint64_t first, const dim3& grid, unsigned threads, size_t shared_bytes,
                 const std::vector<unsigned>& turns) {
  for (unsigned rank = 0; rank < m.cluster; ++rank) {
    Resident& resident = m.residents[rank];
    const uint64_t number = first + rank;
    resident.block.index = dim3(static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                                static_cast<unsigned>(number / grid.x / grid.y));
    resident.block.size = dim3(threads);
    resident.block.grid = grid;
    resident.block.shared = resident.window + kSharedWindow - shared_bytes;
    std::memset(resident.block.shared, 0xff, shared_bytes);
    resident.number = static_cast<uint32_t>(number);
    resident.rank = rank;
    resident.left = threads;
    resident.at_barrier = 0;
    resident.epoch = 0;
    resident.registers = 0;
    resident.named.fill({});
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned at = rank * threads + i;
      prepare(m.fibers[at], i, dim3(i), m.stacks + at * kStack);
      m.fibers[at].home = &resident;
    }
  }
  m.at_cluster_barrier = 0;
  m.copies.clear();
  const unsigned all = threads * m.cluster;
  for (; m.guarded < all; ++m.guarded) mprotect(m.stacks + m.guarded * kStack, 4096, PROT_NONE);
  for (unsigned w = 0; w < all / kWarpSize; ++w) {
    m.warps[w].arrived = 0;
    m.warps[w].syncs = 0;
    m.warps[w].what = nullptr;
  }
  race_check::begin_block(m.residents[0].block.shared, shared_bytes);
  unsigned left = all;
  while (left > 0) {
    bool has_moved = false;
    for (const unsigned i : turns) {
      Fiber& fiber = m.fibers[i];
      if (fiber.is_done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.value)) continue;
      fiber.waits_for = nullptr;
      has_moved = true;
      m.current = &fiber;
      cuda_emulation_switch(&m.scheduler, fiber.stack_pointer);
      if (!m.failure.empty()) return;
      if (fiber.is_done) {
        --left;
        --fiber.home->left;
      }
    }
    if (has_moved) continue;
    // The copy engine works when nobody else can: no sooner than it must.
    if (m.copies.empty()) {
      m.failure = "a barrier or a collective that not all threads reach";
      return;
    }
    const auto copy = std::move(order() == Order::kBackward ? m.copies.back() : m.copies.front());
    order() == Order::kBackward ? m.copies.pop_back() : m.copies.pop_front();
    copy();
    if (!m.failure.empty()) return;
  }
  if (!m.copies.empty()) m.failure = "copies that nobody waited for";
  // A GPU would not go on where too few were given back.
  for (unsigned rank = 0; rank < m.cluster; ++rank) {
    if (m.residents[rank].registers > 0) m.failure = "threads that take more registers than others have given back";
  }
}

}  // namespace

Thread& thread() { return machine().current->thread; }
Block& block() { return machine().current->home->block; }

void sync_block() {
  Resident& resident = *machine().current->home;
  const uint64_t generation = resident.barrier;
  if (++resident.at_barrier == resident.block.size.x) {
    resident.at_barrier = 0;
    ++resident.barrier;
    ++resident.epoch;
    return;
  }
  wait_while(&resident.barrier, generation);
}

void meet_at(int barrier, unsigned count, bool waits) {
  Resident::Named& named = machine().current->home->named.at(static_cast<size_t>(barrier));
  const uint64_t generation = named.generation;
  if (++named.arrived == count) {
    named.arrived = 0;
    ++named.generation;
  } else if (waits) {
    wait_while(&named.generation, generation);
  }
}

unsigned cluster_rank() { return machine().current->home->rank; }

void sync_cluster() {
  Machine& m = machine();
  const uint64_t generation = m.cluster_barrier;
  if (++m.at_cluster_barrier == m.cluster * block().size.x) {
    m.at_cluster_barrier = 0;
    ++m.cluster_barrier;
    return;
  }
  wait_while(&m.cluster_barrier, generation);
}

unsigned char* shared_window() { return machine().current->home->window; }
unsigned char* shared_window_of(unsigned rank) {
  Machine& m = machine();
  if (rank >= m.cluster || m.residents[rank].left == 0) {
    fail_launch("something for a block of the cluster that is not there, or has ended");
  }
  return m.residents[rank].window;
}

void wait_for_change(const uint64_t* word, uint64_t value) { wait_while(word, value); }

void copy_later(std::function<void()> copy) { machine().copies.push_back(std::move(copy)); }

void multiply_later(std::function<void()> product) {
  if (order() == Order::kBackward) return product();
  machine().current->open_products.push_back(std::move(product));
}
void commit_products() {
  Fiber& self = *machine().current;
  self.products.push_back(std::move(self.open_products));
  self.open_products.clear();
}
void wait_for_products(int pending) {
  Fiber& self = *machine().current;
  while (self.products.size() > static_cast<size_t>(pending)) {
    for (const auto& product : self.products.front()) product();
    self.products.pop_front();
  }
}

void have_registers(int count) {
  // As many at the launch as all threads can have alike, in eights: what is left over belongs to no block.
  constexpr unsigned kAll = 65536;
  const auto at_launch = static_cast<int>(kAll / block().size.x / 8 * 8);
  if (count % 8 != 0 || count < 24 || count > 256) fail_launch("so many registers no thread can have");
  machine().current->home->registers += count - at_launch;
}

void stop_watching() { machine().is_watched = false; }

const unsigned char* exchange_bytes(const char* what, const void* value, size_t nbytes) {
  Machine& m = machine();
  Warp& warp = m.warps[static_cast<size_t>(m.current - m.fibers.data()) / kWarpSize];
  const uint64_t generation = warp.generation;
  unsigned char* slots = warp.slots[generation % 2];
  if (warp.arrived > 0 && std::strcmp(warp.what, what) != 0)
    fail_launch("lanes of one warp call different collectives");
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
  if (m == nullptr || !m->is_watched) return false;
  const auto* byte = static_cast<const unsigned char*>(data);
  if (byte >= m->stacks && byte < m->stacks + kMostFibers * kStack) return false;
  const Fiber& fiber = *m->current;
  place = {m->launch,         fiber.has_waited ? m->launch : m->first_unfinished, fiber.home->number,
           fiber.home->epoch, m->warps[fiber.thread.number / kWarpSize].syncs,    fiber.thread.number};
  return true;
}

[[noreturn]] void fail_launch(const char* reason) {
  machine().failure = reason;
  to_scheduler();
  std::abort();
}

void wait_for_predecessors() {
  if (architecture_of_code() < 90) return;  // other GPUs have no such instruction
  Machine& m = machine();
  m.current->has_waited = true;
  m.has_any_waited = true;
}

void copy_async(void* shared, const void* global, size_t nbytes) {
  const void* code = __builtin_return_address(0);
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % nbytes != 0) {
    fail_launch("an asynchronous copy between addresses that are no multiples of its bytes");
  }
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

uint32_t cuda_emulation_launches() {
  const std::lock_guard lock(launch_mutex);
  return launches;
}

uint32_t cuda_emulation_threads() {
  const std::lock_guard lock(launch_mutex);
  return last_threads;
}

void begin_in_order() {
  const std::lock_guard lock(launch_mutex);
  first_of_chain = launches + 1;
}

void launch(CUstream_st* stream, const LaunchShape& shape, const std::function<void()>& kernel) {
  if (is_elsewhere(stream)) return;
  if (is_capturing(stream)) {
    capture(stream, [=] { launch(nullptr, shape, kernel); });
    return;
  }
  finish_copies(stream);
  const dim3& grid = shape.grid;
  const unsigned threads = shape.threads;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads % kWarpSize != 0 || threads > kMostThreads || shape.cluster > kMostCluster ||
      grid.x % shape.cluster != 0 || shape.shared_bytes > shared_memory_per_block()) {
    set_last_error(cudaErrorInvalidValue, "a launch of impossible size");
    return;
  }
  const std::lock_guard turn(launch_mutex);
  Machine& m = machine();
  m.launch = ++launches;
  last_threads = threads;
  if (!shape.starts_early) first_of_chain = m.launch;
  m.first_unfinished = first_of_chain;
  m.has_any_waited = false;
  const size_t aligned_shared = (shape.shared_bytes + 15) / 16 * 16;
  const Order turn_order = order();
  std::vector<unsigned> turns(threads * shape.cluster);
  permute(turns, turn_order, threads);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  m.kernel = &kernel;
  m.failure.clear();
  m.cluster = shape.cluster;
  // What orders accesses of clusters is unknown to the check.
  m.is_watched = shape.cluster == 1;
  race_check::begin_launch(static_cast<uint32_t>(blocks), shape.starts_early);
  const DeviceAccess access;
  running = &m;
  const uint64_t clusters = blocks / shape.cluster;
  for (uint64_t i = 0; i < clusters && m.failure.empty(); ++i) {
    const uint64_t number = turn_order == Order::kForward ? i : clusters - 1 - i;
    run_cluster(m, number * shape.cluster, grid, threads, aligned_shared, turns);
  }
  running = nullptr;
  if (shape.starts_early && !m.has_any_waited && m.failure.empty())
    m.failure = "a kernel that starts early and does not wait for its predecessors";
  if (!m.failure.empty()) set_last_error(cudaErrorLaunchFailure, m.failure.c_str());
}

}  // namespace cuda_emulation
