// What the tests of training operations share: matrices with gaps between their rows, and backends of every tier and of one
// and two threads that must agree to the bit.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "core/checked.h"
#include "cpu/cpu_backend.h"
#include "cpu/isa.h"

namespace llama_ext::test {

/// Numbers in [-1, 1), the same every time.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed * 2654435769u + 1) {}
  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int64_t>(state_ >> 40) - (int64_t{1} << 23)) * 0x1p-23f;
  }
  std::vector<float> vector(int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = next();
    return values;
  }

 private:
  uint64_t state_;
};

/// (rows, columns) float32 whose rows have a gap after them, which nobody may write.
struct Grid {
  static constexpr float kGap = 12345.5f;
  int64_t rows;
  int64_t columns;
  int64_t stride;
  std::vector<float> data;

  Grid(int64_t row_count, int64_t column_count, int64_t gap = 3)
      : rows(row_count),
        columns(column_count),
        stride(column_count + gap),
        data(static_cast<size_t>(row_count * (column_count + gap)) + 1, kGap) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) at(r, c) = 0.0f;
    }
  }
  Grid(int64_t row_count, int64_t column_count, Numbers& numbers, int64_t gap = 3)
      : Grid(row_count, column_count, gap) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) at(r, c) = numbers.next();
    }
  }
  float& at(int64_t r, int64_t c) { return data[static_cast<size_t>(r * stride + c)]; }
  double d(int64_t r, int64_t c) const { return static_cast<double>(data[static_cast<size_t>(r * stride + c)]); }
  TensorView view() { return TensorView(data.data(), DType::kF32, {rows, columns}, stride); }
  TensorView heads(int64_t count) {
    return TensorView(data.data(), DType::kF32, {rows, count, columns / count}, stride);
  }
  bool gaps_are_untouched() const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = columns; c < stride; ++c) {
        if (data[static_cast<size_t>(r * stride + c)] != kGap) return false;
      }
    }
    return true;
  }
};

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

/// Runs `body`, which gives everything it computed, on each tier with one, two and five threads; they must agree to the bit.
inline void on_every_tier(const std::function<std::vector<float>(Backend&)>& body) {
  for (const std::string& isa : available_isas()) {
    const std::vector<float> alone = body(*make_cpu_backend(1, isa));
    for (int threads : {2, 5}) CHECK(same_bits(alone, body(*make_cpu_backend(threads, isa))));
  }
}

inline TensorView flat(std::vector<float>& values) {
  return TensorView(values.data(), DType::kF32, {static_cast<int64_t>(values.size())});
}

inline void append(std::vector<float>& to, const std::vector<float>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

inline std::unique_ptr<Matrix> matrix_of(Backend& backend, Grid& grid, WeightType type) {
  auto matrix = backend.create_matrix(grid.rows, grid.columns, type);
  std::vector<float> values;
  for (int64_t r = 0; r < grid.rows; ++r) {
    for (int64_t c = 0; c < grid.columns; ++c) values.push_back(grid.at(r, c));
  }
  backend.write_rows(*matrix, {}, TensorView(values.data(), DType::kF32, {grid.rows, grid.columns}), {});
  return matrix;
}

inline Grid read(Backend& backend, const Matrix& matrix) {
  Grid grid(matrix.rows(), matrix.cols(), 0);
  backend.read_rows(matrix, {}, grid.view());
  return grid;
}

}  // namespace llama_ext::test
