// What a control group has left, from files as versions 1 and 2 of the kernel's interface write them.
#include "cpu/cgroup.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

#include "check.h"

namespace llama_ext::test {
namespace {

/// The folder of a control group with these files, gone with the object.
class Group {
 public:
  Group(std::initializer_list<std::pair<std::string, std::string>> files)
      : folder_(std::filesystem::temp_directory_path() / cat("llama_ext_cgroup_test_", getpid())) {
    std::filesystem::create_directory(folder_);
    for (const auto& [name, text] : files) std::ofstream(folder_ / name) << text << '\n';
  }
  ~Group() { std::filesystem::remove_all(folder_); }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  size_t left() const { return cgroup_memory_left(folder_.string()); }

 private:
  std::filesystem::path folder_;
};

}  // namespace

void test_cgroup() {
  constexpr size_t kUnlimited = std::numeric_limits<size_t>::max();
  // A container that has just downloaded a model of 600 bytes is charged for it, and may have that memory nevertheless.
  const std::string stat =
      "anon 100\nfile 650\nshmem 50\ninactive_anon 150\nactive_anon 0\ninactive_file 400\nactive_file 200";
  CHECK(Group({{"memory.max", "1000"}, {"memory.current", "750"}, {"memory.stat", stat}}).left() == 850);
  // In version 1 the first pair is the group's own alone, its use with that of the groups below it.
  const std::string first =
      "cache 100\ninactive_file 60\nactive_file 40\ntotal_inactive_file 300\ntotal_active_file 150";
  CHECK(Group({{"memory.limit_in_bytes", "1000"}, {"memory.usage_in_bytes", "900"}, {"memory.stat", first}}).left() ==
        550);
  CHECK(Group({{"memory.max", "1000"}, {"memory.current", "750"}}).left() == 250);
  CHECK(Group({{"memory.max", "700"}, {"memory.current", "750"}, {"memory.stat", "anon 750"}}).left() == 0);
  // The files are read one after another, so that they may contradict each other.
  CHECK(Group({{"memory.max", "1000"}, {"memory.current", "500"}, {"memory.stat", stat}}).left() == 1000);
  CHECK(Group({{"memory.max", "max"}, {"memory.current", "750"}, {"memory.stat", stat}}).left() == kUnlimited);
  CHECK(Group({}).left() == kUnlimited);
}

}  // namespace llama_ext::test
