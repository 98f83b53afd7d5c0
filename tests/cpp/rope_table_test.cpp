// RopeTable: what it keeps is what rope_angles computes, from several threads at once and beyond what it keeps.
#include "model/rope_table.h"

#include <cstdint>
#include <thread>
#include <vector>

#include "check.h"

namespace llama_ext::test {

void test_rope_table() {
  constexpr int64_t kKept = 1000, kPairs = 8;
  RopeConfig config;
  config.head_dim = 2 * kPairs;
  config.theta = 500000.0;
  const RopeTable table(config, kKept);
  const std::vector<double> frequencies = rope_inverse_frequencies(config);
  CHECK(table.inverse_frequencies() == frequencies);

  std::vector<char> is_same(4, 0);
  std::vector<std::thread> threads;
  for (size_t thread = 0; thread < is_same.size(); ++thread) {
    threads.emplace_back([&, thread] {
      std::vector<int64_t> positions;
      for (int64_t i = 0; i < 1500; ++i)
        positions.push_back((37 * i + 11 * static_cast<int64_t>(thread)) % (kKept + 300));
      const int64_t count = static_cast<int64_t>(positions.size());
      std::vector<float> cos(positions.size() * kPairs), sin(cos.size()), wanted_cos(cos.size()),
          wanted_sin(cos.size());
      table.copy(positions.data(), count, cos.data(), sin.data());
      rope_angles(config, frequencies, positions.data(), count, wanted_cos.data(), wanted_sin.data());
      is_same[thread] = cos == wanted_cos && sin == wanted_sin;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(is_same == std::vector<char>(4, 1));
}

}  // namespace llama_ext::test
