// How many threads to use when nobody said: what the scheduler will really give us.
#include <sched.h>

#include <atomic>
#include <cmath>
#include <fstream>
#include <set>
#include <sstream>

#include "core/errors.h"
#include "cpu/thread_pool.h"

namespace llama_ext {
namespace {

std::atomic<int> chosen{0};

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

/// Distinct physical cores among the CPUs this process may run on. Without topology files every CPU counts.
int physical_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string siblings = read_line(cat("/sys/devices/system/cpu/cpu", cpu, "/topology/thread_siblings_list"));
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

/// The tightest quota of this process's cgroup and its ancestors, versions 2 and 1.
double cgroup_quota() {
  double tightest = INFINITY;
  std::ifstream groups("/proc/self/cgroup");
  std::string line;
  while (std::getline(groups, line)) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    const bool is_v2 = controllers.empty();
    if (!is_v2 && controllers.find("cpu") == std::string::npos) continue;
    for (;;) {
      if (is_v2) {
        std::istringstream fields(read_line("/sys/fs/cgroup" + path + "/cpu.max"));
        std::string quota;
        std::string period;
        fields >> quota >> period;
        tightest = std::fmin(tightest, quota_of(quota, period));
      } else {
        const std::string folder = "/sys/fs/cgroup/cpu" + path;
        tightest = std::fmin(
            tightest, quota_of(read_line(folder + "/cpu.cfs_quota_us"), read_line(folder + "/cpu.cfs_period_us")));
      }
      if (path.empty() || path == "/") break;
      path.resize(path.rfind('/'));
    }
  }
  return tightest;
}

}  // namespace

ThreadDefault default_threads() {
  if (const int set = chosen.load(); set > 0) return {set, "set by set_num_threads"};
  const int cores = physical_cores();
  const double quota = cgroup_quota();
  if (quota < cores) {
    const int whole = quota < 1.0 ? 1 : static_cast<int>(quota);
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
