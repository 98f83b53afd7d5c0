#include "cpu/cgroup.h"

#include <fstream>
#include <sstream>

#include "core/errors.h"

namespace llama_ext {

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

}  // namespace llama_ext
