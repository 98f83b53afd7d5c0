#include "cpu/thread_pool.h"

#include <immintrin.h>
#include <pthread.h>

#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "core/errors.h"
#include "core/float_environment.h"
#include "core/interrupt.h"

namespace llama_ext {
namespace {

constexpr auto kPollInterval = std::chrono::milliseconds(5);
// About 50 us of PAUSE: a decode step's next operation comes sooner, an idle model's does not.
constexpr int kSpins = 1000;

/// The tasks that one worker takes first, in order; the others help when they have done theirs. They are the same part of every job
/// of as many workers, so what a thread has written is in its own cache when the next operation reads it.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Job {
  TaskFunction function = nullptr;
  void* context = nullptr;
  Share* shares = nullptr;  // of each worker
  int workers = 0;
  std::atomic<bool> cancelled{false};
  std::mutex error_mutex;
  std::exception_ptr error;

  void record_error() {
    const std::lock_guard lock(error_mutex);
    if (!error) error = std::current_exception();
    cancelled.store(true, std::memory_order_relaxed);
  }
};

thread_local bool inside_task = false;

bool interrupt_requested() {
  InterruptHandler* handler = current_interrupt_handler();
  if (handler == nullptr) return false;
  thread_local std::chrono::steady_clock::time_point last{};
  const auto now = std::chrono::steady_clock::now();
  if (now - last < kPollInterval) return false;
  last = now;
  return handler->requested();
}

void divide(Job& job, int64_t tasks) {
  for (int64_t i = 0; i < job.workers; ++i) {
    job.shares[i].next.store(tasks * i / job.workers, std::memory_order_relaxed);
    job.shares[i].end = tasks * (i + 1) / job.workers;
  }
}

/// Takes tasks until there are none, its own share's first; only the caller polls for interrupts.
bool work(Job& job, int worker, bool polls) {
  bool interrupted = false;
  inside_task = true;
  try {
    for (int i = 0; i < job.workers; ++i) {
      Share& share = job.shares[(worker + i) % job.workers];
      // Looked at first: a counter that is only read stays in all caches.
      while (!job.cancelled.load(std::memory_order_relaxed) && share.next.load(std::memory_order_relaxed) < share.end) {
        if (polls && interrupt_requested()) {
          interrupted = true;
          job.cancelled.store(true, std::memory_order_relaxed);
          break;
        }
        const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= share.end) break;
        job.function(job.context, task, worker);
      }
    }
  } catch (...) {
    job.record_error();
  }
  inside_task = false;
  return interrupted;
}

/// Waits until `value` is no longer `old`: spins first, then sleeps in the kernel.
template <typename T>
void wait_while(std::atomic<T>& value, T old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
    _mm_pause();
  }
  value.wait(old, std::memory_order_acquire);
}

class ThreadPool {
 public:
  /// False: busy, the caller has to do the work itself.
  bool try_run(Job& job, int64_t tasks, int threads, bool* interrupted) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    const int helpers = ensure_workers(threads - 1);
    job.shares = shares_.data();
    job.workers = helpers + 1;
    divide(job, tasks);
    working_.store(helpers, std::memory_order_relaxed);
    for (int i = 0; i < helpers; ++i) {
      Slot& slot = *slots_[static_cast<size_t>(i)];
      slot.job = &job;
      slot.has_job.store(1, std::memory_order_release);
      slot.has_job.notify_one();
    }
    *interrupted = work(job, 0, true);
    for (int left = working_.load(std::memory_order_acquire); left != 0;
         left = working_.load(std::memory_order_acquire)) {
      wait_while(working_, left);
    }
    return true;
  }

 private:
  struct alignas(64) Slot {
    std::atomic<int> has_job{0};  // an int: what the kernel can wait on directly
    Job* job = nullptr;
  };

  /// Starts threads as they are first needed; returns how many there are, which is fewer than asked for when the system refuses.
  int ensure_workers(int count) {
    while (started_ < count) {
      const int index = started_;
      auto slot = std::make_unique<Slot>();
      Slot* place = slot.get();
      try {
        std::thread([this, place, index] { serve(*place, index + 1); }).detach();
      } catch (const std::system_error&) {
        break;
      }
      slots_[static_cast<size_t>(index)] = std::move(slot);
      ++started_;
    }
    return started_ < count ? started_ : count;
  }

  [[noreturn]] void serve(Slot& slot, int worker) {
    const DefaultFloatEnvironment environment;
    for (;;) {
      wait_while(slot.has_job, 0);
      if (slot.has_job.load(std::memory_order_acquire) == 0) continue;
      work(*slot.job, worker, false);
      slot.has_job.store(0, std::memory_order_relaxed);
      // The job belongs to the caller again as soon as the count is zero.
      if (working_.fetch_sub(1, std::memory_order_acq_rel) == 1) working_.notify_one();
    }
  }

  std::mutex mutex_;
  alignas(64) std::atomic<int> working_{0};  // workers that still hold a pointer to the job
  std::array<std::unique_ptr<Slot>, kMaxThreads> slots_;
  std::array<Share, kMaxThreads> shares_;
  int started_ = 0;
};

// Never destroyed: its threads sleep until the process ends, and a forked child leaves its parent's pool alone.
std::atomic<ThreadPool*> shared_pool{nullptr};

ThreadPool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { shared_pool.store(nullptr); });
  static_cast<void>(registered);
  ThreadPool* current = shared_pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    auto fresh = std::make_unique<ThreadPool>();
    if (shared_pool.compare_exchange_strong(current, fresh.get())) current = fresh.release();
  }
  return *current;
}

}  // namespace

bool inside_parallel_task() { return inside_task; }

void parallel_run(int threads, int64_t tasks, TaskFunction function, void* context) {
  if (tasks <= 0) return;
  if (inside_task) {
    for (int64_t task = 0; task < tasks; ++task) function(context, task, 0);
    return;
  }
  const DefaultFloatEnvironment environment;
  Job job;
  job.function = function;
  job.context = context;
  const int allowed = threads < kMaxThreads ? threads : kMaxThreads;
  const int useful = static_cast<int>(tasks < allowed ? tasks : allowed);
  bool interrupted = false;
  if (useful <= 1 || !pool().try_run(job, tasks, useful, &interrupted)) {
    Share all;
    job.shares = &all;
    job.workers = 1;
    divide(job, tasks);
    interrupted = work(job, 0, true);
  }
  if (job.error) std::rethrow_exception(job.error);
  if (interrupted) throw Interrupted();
}

}  // namespace llama_ext
