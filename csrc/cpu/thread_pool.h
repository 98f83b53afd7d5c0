// Threads of our own: no OpenMP, which clashes with other libraries' copies and hangs after fork.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

namespace llama_ext {

struct ThreadDefault {
  int threads;
  std::string reason;  // "2 physical cores", "cgroup quota of 1.5 CPUs", ...
};

/// What threads=0 means: what was set, or else LLAMA_EXT_NUM_THREADS, or else min(physical cores in the affinity mask, whole CPUs of the
/// cgroup quota). Throws OptionError for a variable that is no number in [1, kMaxThreads].
ThreadDefault default_threads();
/// Sets the default for backends made later. 1 <= threads <= kMaxThreads, or 0 for the machine's. Throws OptionError.
void set_default_threads(int threads);

inline constexpr int kMaxThreads = 256;

using TaskFunction = void (*)(void* context, int64_t task, int worker);

/// Runs function(context, i, worker) for each i in [0, tasks), on up to `threads` threads: the caller is worker 0. Of t workers the
/// w-th takes the w-th of t equal parts of the tasks, in order, then helps the others. Returns when all are done. Polls the caller's
/// interrupt handler between its tasks; on a request the rest is skipped and Interrupted is thrown. The first exception of a task is
/// thrown. When the pool is at work for another thread, or this is called from a task, the caller does everything itself: results
/// never depend on who computes them. Works after fork: the child gets a pool of its own.
void parallel_run(int threads, int64_t tasks, TaskFunction function, void* context);

/// Whether the caller is a task, which would run the tasks of another parallel_run by itself.
bool inside_parallel_task();

/// parallel_run for a callable (int64_t task, int worker).
template <typename Function>
void parallel_for(int threads, int64_t tasks, Function&& function) {
  using Callable = std::remove_reference_t<Function>;
  parallel_run(
      threads, tasks, [](void* context, int64_t task, int worker) { (*static_cast<Callable*>(context))(task, worker); },
      const_cast<std::remove_const_t<Callable>*>(&function));
}

}  // namespace llama_ext
