// Matrices as training meets them, on every backend: all values as one vector, rows that are copied as they are kept, transposed
// ones; copies; and parts of a computation, each of which calls operations.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/isa.h"
#include "reference/reference_backend.h"

namespace llama_ext::test {
namespace {

TensorView view(std::vector<float>& data, std::initializer_list<int64_t> shape) {
  return {static_cast<void*>(data.data()), DType::kF32, shape};
}

std::vector<float> numbers(int64_t count, float first) {
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = first + static_cast<float>(i * 7 % 101) / 8.0f;
  return values;
}

std::unique_ptr<Matrix> matrix_of(Backend& backend, int64_t rows, int64_t cols, const WeightType& type, float first) {
  auto matrix = backend.create_matrix(rows, cols, type);
  std::vector<float> values = numbers(rows * cols, first);
  backend.write_rows(*matrix, {}, view(values, {rows, cols}), {});
  return matrix;
}

std::vector<float> rows_of(Backend& backend, const Matrix& matrix) {
  std::vector<float> values(static_cast<size_t>(matrix.rows() * matrix.cols()));
  backend.read_rows(matrix, {}, view(values, {matrix.rows(), matrix.cols()}));
  return values;
}

void test_values(Backend& backend) {
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {31, 33}, {33, 64}, {65, 7}, {70, 130}, {0, 4}}) {
    const auto matrix = matrix_of(backend, rows, cols, {Encoding::kF32, 0}, 1.0f);
    std::vector<float> expected = rows_of(backend, *matrix);
    const TensorView values = backend.values(*matrix);
    CHECK(values.rank() == 1 && values.dtype() == DType::kF32 && values.size() >= rows * cols);
    // Nothing but the elements and zeros.
    std::vector<float> found(values.f32(), values.f32() + values.size());
    CHECK(std::count_if(found.begin(), found.end(), [](float x) { return x != 0.0f; }) == rows * cols);
    double squares = 0;
    for (const float x : expected) squares += static_cast<double>(x) * static_cast<double>(x);
    CHECK_NEAR(backend.sum_of_squares(values), squares, 1e-12 * squares);
    // It is the matrix's own memory, in the same order for all matrices of one shape.
    const auto other = matrix_of(backend, rows, cols, {Encoding::kF32, 0}, 1.0f);
    const TensorView same = backend.values(*other);
    CHECK(std::equal(found.begin(), found.end(), same.f32(), same.f32() + same.size()));
    for (int64_t i = 0; i < values.size(); ++i) values.f32()[i] *= -2.0f;
    for (float& x : expected) x *= -2.0f;
    CHECK(rows_of(backend, *matrix) == expected);
  }
  for (const WeightType& type : {WeightType{Encoding::kBF16, 0}, WeightType{Encoding::kInt8, 64}}) {
    const auto matrix = matrix_of(backend, 3, 64, type, 1.0f);
    CHECK_ERROR(ErrorKind::kDType, "float32", backend.values(*matrix));
  }
}

void test_copied_rows(Backend& backend) {
  constexpr int64_t kCols = 130;
  for (const WeightType& type :
       {WeightType{Encoding::kF32, 0}, WeightType{Encoding::kBF16, 0}, WeightType{Encoding::kF16, 0},
        WeightType{Encoding::kInt8, 32}, WeightType{Encoding::kInt5Min, 64}, WeightType{Encoding::kInt4, 128}}) {
    const auto source = matrix_of(backend, 70, kCols, type, 1.0f);
    const std::vector<float> from = rows_of(backend, *source);
    for (const auto& [to_map, from_map, count] : {std::tuple<RowMap, RowMap, int64_t>{{}, {}, 70},
                                                  {{.begin = 33}, {.begin = 1}, 20},
                                                  {{.begin = 16, .group = 16, .stride = 32}, {.begin = 2}, 40},
                                                  {{.begin = 5}, {.begin = 0, .group = 3, .stride = 8}, 17},
                                                  {{.begin = 99}, {.begin = 69}, 1},
                                                  {{.begin = 100}, {}, 0}}) {
      const auto target = matrix_of(backend, 100, kCols, type, -20.0f);
      std::vector<float> expected = rows_of(backend, *target);
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(from.begin() + from_map(i) * kCols, kCols, expected.begin() + to_map(i) * kCols);
      }
      backend.copy_rows(*target, to_map, *source, from_map, count);
      CHECK(rows_of(backend, *target) == expected);
    }
    CHECK(rows_of(backend, *source) == from);
    const auto target = matrix_of(backend, 100, kCols, type, -20.0f);
    CHECK_ERROR(ErrorKind::kShape, "row", backend.copy_rows(*target, {.begin = 90}, *source, {}, 11));
    CHECK_ERROR(ErrorKind::kShape, "row", backend.copy_rows(*target, {}, *source, {.begin = 60}, 11));
    CHECK_ERROR(ErrorKind::kShape, "row", backend.copy_rows(*target, {}, *source, {}, -1));
    const auto narrow = matrix_of(backend, 100, 128, type, 1.0f);
    CHECK_ERROR(ErrorKind::kShape, "row", backend.copy_rows(*narrow, {}, *source, {}, 1));
  }
  const auto floats = matrix_of(backend, 3, kCols, {Encoding::kF32, 0}, 1.0f);
  const auto halves = matrix_of(backend, 3, kCols, {Encoding::kBF16, 0}, 1.0f);
  const auto groups = matrix_of(backend, 3, kCols, {Encoding::kInt8, 32}, 1.0f);
  const auto others = matrix_of(backend, 3, kCols, {Encoding::kInt8, 64}, 1.0f);
  CHECK_ERROR(ErrorKind::kDType, "row", backend.copy_rows(*floats, {}, *halves, {}, 1));
  CHECK_ERROR(ErrorKind::kDType, "row", backend.copy_rows(*groups, {}, *others, {}, 1));
}

void test_transposed(Backend& backend) {
  const WeightType f32{Encoding::kF32, 0};
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {31, 33}, {33, 64}, {300, 7}, {70, 130}, {0, 4}, {4, 0}}) {
    const auto source = matrix_of(backend, rows, cols, f32, 1.0f);
    const auto target = matrix_of(backend, cols, rows, f32, -20.0f);
    backend.transpose(*target, *source);
    const std::vector<float> from = rows_of(backend, *source);
    const std::vector<float> to = rows_of(backend, *target);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < cols; ++col) {
        CHECK(to[static_cast<size_t>(col * rows + row)] == from[static_cast<size_t>(row * cols + col)]);
      }
    }
    // Padding stays zero.
    const TensorView values = backend.values(*target);
    CHECK(std::count_if(values.f32(), values.f32() + values.size(), [](float x) { return x != 0.0f; }) == rows * cols);
  }
  const auto matrix = matrix_of(backend, 3, 5, f32, 1.0f);
  const auto other = matrix_of(backend, 3, 5, f32, 1.0f);
  const auto square = matrix_of(backend, 3, 3, f32, 1.0f);
  const auto halves = matrix_of(backend, 5, 3, {Encoding::kBF16, 0}, 1.0f);
  CHECK_ERROR(ErrorKind::kShape, "target", backend.transpose(*other, *matrix));
  CHECK_ERROR(ErrorKind::kShape, "another matrix", backend.transpose(*square, *square));
  CHECK_ERROR(ErrorKind::kDType, "float32", backend.transpose(*halves, *matrix));
  CHECK_ERROR(ErrorKind::kDType, "float32", backend.transpose(*matrix, *halves));
}

/// What is written and read is proven from Python (tests/ops/test_matrix_rows.py).
void test_stored_rows_leave_the_padding_alone(Backend& backend) {
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {31, 33}, {33, 64}, {70, 130}}) {
    for (const bool transposes : {false, true}) {
      const auto matrix = backend.create_matrix(rows, cols, {Encoding::kF32, 0});
      std::vector<float> source = numbers(rows * cols, 1.0f);
      const TensorView tensor = transposes ? view(source, {cols, rows}) : view(source, {rows, cols});
      backend.store_rows(*matrix, {}, tensor, transposes);
      const TensorView values = backend.values(*matrix);
      CHECK(std::count_if(values.f32(), values.f32() + values.size(), [](float x) { return x != 0.0f; }) ==
            rows * cols);
    }
  }
}

void test_copies(Backend& backend) {
  for (const int64_t rows : {0, 1, 3}) {
    std::vector<float> source = numbers(3 * 8, 1.0f);
    std::vector<float> target(3 * 6, -1.0f);
    // Columns 2 to 6 of rows of 8 into columns 1 to 5 of rows of 6.
    backend.copy({target.data() + 1, DType::kF32, {rows, 4}, 6}, {source.data() + 2, DType::kF32, {rows, 4}, 8});
    for (int64_t i = 0; i < 3; ++i) {
      for (int64_t j = 0; j < 6; ++j) {
        const bool is_copied = i < rows && j >= 1 && j < 5;
        CHECK(target[static_cast<size_t>(i * 6 + j)] ==
              (is_copied ? source[static_cast<size_t>(i * 8 + j + 1)] : -1.0f));
      }
    }
  }
}

void test_parts(Backend& backend) {
  constexpr int64_t kParts = 50;
  // Each part multiplies with the backend, in memory of its own.
  const auto weight = matrix_of(backend, 40, 70, {Encoding::kF32, 0}, 1.0f);
  std::vector<float> x = numbers(kParts * 70, 0.5f);
  std::vector<float> expected(static_cast<size_t>(kParts * 40));
  std::vector<float> found(expected.size());
  backend.matmul({.x = view(x, {kParts, 70}), .weight = weight.get(), .bias = {}, .y = view(expected, {kParts, 40})});
  std::vector<int> calls(kParts);
  backend.for_each_part(kParts, [&](int64_t part, int worker) {
    ++calls[static_cast<size_t>(part)];
    CHECK(worker >= 0 && worker < backend.threads());
    backend.matmul({.x = view(x, {kParts, 70}).slice_rows(part, 1),
                    .weight = weight.get(),
                    .bias = {},
                    .y = view(found, {kParts, 40}).slice_rows(part, 1)});
  });
  CHECK(std::all_of(calls.begin(), calls.end(), [](int count) { return count == 1; }));
  CHECK(found == expected);
  CHECK_ERROR(ErrorKind::kOption, "part 3", backend.for_each_part(kParts, [](int64_t part, int) {
    if (part == 3) fail(ErrorKind::kOption, "part 3 does not work");
  }));
  backend.for_each_part(0, [](int64_t, int) { fail(ErrorKind::kInternal, "there is no part"); });
}

}  // namespace

void test_matrix_values() {
  const std::unique_ptr<Backend> reference = make_reference_backend();
  test_values(*reference);
  test_copied_rows(*reference);
  test_transposed(*reference);
  test_stored_rows_leave_the_padding_alone(*reference);
  test_copies(*reference);
  test_parts(*reference);
  for (const std::string& isa : available_isas()) {
    const std::unique_ptr<Backend> cpu = make_cpu_backend(2, isa);
    test_values(*cpu);
    test_copied_rows(*cpu);
    test_transposed(*cpu);
    test_stored_rows_leave_the_padding_alone(*cpu);
    test_copies(*cpu);
    test_parts(*cpu);
  }
}

}  // namespace llama_ext::test
