// How many threads to use when nobody said: what the scheduler will really give us.
#include <sched.h>

#include <atomic>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <set>
#include <sstream>
#include <string_view>
#include <system_error>

#include "core/errors.h"
#include "cpu/cgroup.h"
#include "cpu/thread_pool.h"

namespace llama_ext {
namespace {

constexpr const char* kVariable = "LLAMA_EXT_NUM_THREADS";

std::atomic<int> chosen{0};

/// What the environment asks for; 0 when it does not.
int threads_of_environment() {
  const char* text = std::getenv(kVariable);
  if (text == nullptr || *text == '\0') return 0;
  const std::string_view digits(text);
  int threads = 0;
  const auto [rest, error] = std::from_chars(digits.data(), digits.data() + digits.size(), threads);
  require(error == std::errc() && rest == digits.data() + digits.size() && threads >= 1 && threads <= kMaxThreads,
          ErrorKind::kOption, kVariable, " must be a whole number in [1, ", kMaxThreads, "], got '", digits, "'");
  return threads;
}

/// Distinct physical cores among the CPUs this process may run on. Without topology files every CPU counts.
int physical_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string siblings = first_line(cat("/sys/devices/system/cpu/cpu", cpu, "/topology/thread_siblings_list"));
    cores.insert(siblings.empty() ? cat("cpu", cpu) : siblings);
  }
  return cores.empty() ? 1 : static_cast<int>(cores.size());
}

/// CPUs allowed by "quota period", or infinity for "max" and for no file.
double quota_of(const std::string& quota, const std::string& period) {
  std::istringstream quota_text(quota);
  std::istringstream period_text(period);
  double quota_us = 0;
  double period_us = 0;
  if (!(quota_text >> quota_us) || !(period_text >> period_us) || quota_us <= 0 || period_us <= 0) return INFINITY;
  return quota_us / period_us;
}

/// The tightest quota of this process's control groups.
double cgroup_quota() {
  double tightest = INFINITY;
  for (const std::string& folder : cgroup_folders("cpu")) {
    std::istringstream both(first_line(folder + "/cpu.max"));
    std::string quota;
    std::string period;
    both >> quota >> period;
    tightest = std::fmin(tightest, quota_of(quota, period));
    tightest = std::fmin(tightest,
                         quota_of(first_line(folder + "/cpu.cfs_quota_us"), first_line(folder + "/cpu.cfs_period_us")));
  }
  return tightest;
}

}  // namespace

ThreadDefault default_threads() {
  if (const int set = chosen.load(); set > 0) return {set, "set by set_num_threads"};
  if (const int asked = threads_of_environment(); asked > 0) return {asked, cat(kVariable, " asks for it")};
  const int cores = physical_cores();
  const double quota = cgroup_quota();
  if (quota < cores) {
    const int whole = quota < 1.0 ? 1 : quota < kMaxThreads ? static_cast<int>(quota) : kMaxThreads;
    return {whole, cat("cgroup quota of ", quota, " CPUs, below ", cores, " physical cores")};
  }
  return {cores < kMaxThreads ? cores : kMaxThreads, cat(cores, cores == 1 ? " physical core" : " physical cores")};
}

void set_default_threads(int threads) {
  require(threads >= 0 && threads <= kMaxThreads, ErrorKind::kOption, "set_num_threads: threads must be in [1, ",
          kMaxThreads, "], or 0 for the machine's default, got ", threads);
  chosen.store(threads);
}

}  // namespace llama_ext
