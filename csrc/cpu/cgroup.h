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

/// Bytes that the memory group of this folder could still give: its limit less what is used, where pages of files count as free,
/// as the system drops them before it refuses memory; the largest number when it has no limit.
size_t cgroup_memory_left(const std::string& folder);

}  // namespace llama_ext
