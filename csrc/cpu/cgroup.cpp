#include "cpu/cgroup.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>

#include "core/errors.h"

namespace llama_ext {
namespace {

/// Bytes of page cache that the memory group of this folder and those below it are charged for; shared memory is not among them.
size_t file_pages(const std::string& folder) {
  std::ifstream file(folder + "/memory.stat");
  std::string key;
  size_t own = 0;
  size_t total = 0;
  for (size_t bytes = 0; file >> key >> bytes;) {
    if (key == "inactive_file" || key == "active_file") own += bytes;
    if (key == "total_inactive_file" || key == "total_active_file") total += bytes;
  }
  // Version 2 says only the first pair, which includes the groups below; in version 1 that is the second pair.
  return std::max(own, total);
}

}  // namespace

std::vector<std::string> cgroup_folders(const std::string& controller) {
  std::vector<std::string> folders;
  std::ifstream groups("/proc/self/cgroup");
  std::string line;
  while (std::getline(groups, line)) {
    // "hierarchy:controllers:path"; version 2 names no controllers.
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = cat(",", line.substr(first + 1, second - first - 1), ",");
    std::string path = line.substr(second + 1);
    const bool is_v2 = controllers == ",,";
    if (!is_v2 && controllers.find(cat(",", controller, ",")) == std::string::npos) continue;
    const std::string root = is_v2 ? std::string("/sys/fs/cgroup") : cat("/sys/fs/cgroup/", controller);
    for (;;) {
      folders.push_back(root + path);
      if (path.empty() || path == "/") break;
      path.resize(path.rfind('/'));
    }
  }
  return folders;
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::optional<size_t> first_number(std::initializer_list<std::string> paths) {
  for (const std::string& path : paths) {
    std::istringstream text(first_line(path));
    size_t number = 0;
    if (text >> number) return number;
  }
  return std::nullopt;
}

size_t cgroup_memory_left(const std::string& folder) {
  // Version 2, then 1; "max" and a missing file do not parse, which means no limit.
  const std::optional<size_t> limit = first_number({folder + "/memory.max", folder + "/memory.limit_in_bytes"});
  const std::optional<size_t> used = first_number({folder + "/memory.current", folder + "/memory.usage_in_bytes"});
  if (!limit || !used) return std::numeric_limits<size_t>::max();
  const size_t kept = *used - std::min(*used, file_pages(folder));
  return *limit - std::min(*limit, kept);
}

}  // namespace llama_ext
