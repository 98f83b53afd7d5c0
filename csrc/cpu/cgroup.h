// What the control groups of this process allow it, versions 1 and 2.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace llama_ext {

/// Folders that may hold the limits of `controller` ("cpu", "memory"), from the process's own group up to the root.
std::vector<std::string> cgroup_folders(const std::string& controller);

/// The first line of a file, or "".
std::string first_line(const std::string& path);

/// The number that the first of these files to exist starts with; nothing when it is a word.
std::optional<size_t> first_number(std::initializer_list<std::string> paths);

}  // namespace llama_ext
