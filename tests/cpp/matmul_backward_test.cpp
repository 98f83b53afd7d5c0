// Gradients of products, and products that round their weights, against plain loops in float64.
#include <array>
#include <cmath>

#include "core/half.h"
#include "training_inputs.h"

namespace llama_ext::test {
namespace {

double sum_of(Backend& backend, Matrix& matrix) { return backend.sum_of_squares(backend.values(matrix)); }

void test_matmul_backward(int64_t m, int64_t n, int64_t k, WeightType type, Compute compute, double tolerance) {
  on_every_tier([&](Backend& backend) {
    Numbers numbers(static_cast<uint64_t>(m + 7 * n + 49 * k));
    Grid weight(n, k, numbers), x(m, k, numbers), d_y(m, n, numbers), d_x(m, k, numbers), start(n, k, numbers);
    std::vector<float> d_bias = numbers.vector(n);
    const std::vector<float> bias_before = d_bias;
    const Grid before = d_x;
    const auto packed = matrix_of(backend, weight, type);
    Grid kept = read(backend, *packed);
    if (compute == Compute::kBF16 && type == WeightType{Encoding::kF32}) {
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t c = 0; c < k; ++c) kept.at(r, c) = bf16_to_f32(f32_to_bf16(kept.at(r, c)));
      }
    }
    const auto d_weight = matrix_of(backend, start, {});
    for (bool accumulate : {false, true}) {
      backend.matmul_backward({.d_y = d_y.view(),
                               .weight = packed.get(),
                               .x = x.view(),
                               .d_x = d_x.view(),
                               .accumulate = accumulate,
                               .d_weight = accumulate ? nullptr : d_weight.get(),
                               .d_bias = accumulate ? TensorView() : flat(d_bias),
                               .compute = compute});
      for (int64_t r = 0; r < m; ++r) {
        for (int64_t c = 0; c < k; ++c) {
          double expected = 0;
          for (int64_t i = 0; i < n; ++i) expected += d_y.d(r, i) * kept.d(i, c);
          CHECK_NEAR(d_x.d(r, c), expected * (accumulate ? 2 : 1), tolerance * std::sqrt(static_cast<double>(n + 1)));
        }
      }
      CHECK(d_x.gaps_are_untouched());
    }
    Grid gradient = read(backend, *d_weight);
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) {
      double bias = static_cast<double>(bias_before[static_cast<size_t>(i)]);
      for (int64_t r = 0; r < m; ++r) bias += d_y.d(r, i);
      CHECK_NEAR(d_bias[static_cast<size_t>(i)], bias, 1e-5 * static_cast<double>(m + 1));
      for (int64_t c = 0; c < k; ++c) {
        double expected = start.d(i, c);
        for (int64_t r = 0; r < m; ++r) expected += d_y.d(r, i) * x.d(r, c);
        CHECK_NEAR(gradient.d(i, c), expected, tolerance * std::sqrt(static_cast<double>(m + 1)));
        squares += gradient.d(i, c) * gradient.d(i, c);
      }
    }
    // Padding is zero still, or it would be counted.
    CHECK_NEAR(sum_of(backend, *d_weight), squares, 1e-12 * squares);
    append(d_x.data, gradient.data);
    append(d_x.data, d_bias);
    return d_x.data;
  });
}

void test_matmul_backward_of_all_shapes() {
  for (const auto& [m, n, k] : std::vector<std::array<int64_t, 3>>{{0, 5, 7},
                                                                   {1, 1, 1},
                                                                   {3, 33, 65},
                                                                   {70, 31, 96},
                                                                   {517, 100, 45},
                                                                   {400, 65, 70},
                                                                   {200, 7, 400},
                                                                   {5, 64, 0},
                                                                   {5, 0, 64}}) {
    test_matmul_backward(m, n, k, {}, Compute::kExact, 2e-6);
  }
  test_matmul_backward(300, 70, 90, {}, Compute::kBF16, 1e-2);
  test_matmul_backward(70, 40, 90, {Encoding::kBF16}, Compute::kExact, 2e-6);
  test_matmul_backward(70, 40, 90, {Encoding::kBF16}, Compute::kBF16, 1e-2);
  test_matmul_backward(70, 40, 90, {Encoding::kF16}, Compute::kExact, 2e-6);
  test_matmul_backward(70, 40, 300, {Encoding::kInt4, 128}, Compute::kExact, 2e-6);
  test_matmul_backward(70, 40, 90, {Encoding::kInt8, 32}, Compute::kBF16, 1e-2);
}

// A range of W^T at a time: more outputs than one takes, 4 MB of 320 columns.
void test_many_outputs() { test_matmul_backward(2, 3500, 310, {}, Compute::kExact, 6e-6); }

void test_products_round_float32_weights_to_bf16() {
  on_every_tier([](Backend& backend) {
    Numbers numbers(5);
    const int64_t m = 40, n = 77, k = 51;
    Grid weight(n, k, numbers), x(m, k, numbers), y(m, n, numbers);
    std::vector<float> bias = numbers.vector(n);
    const Grid before = y;
    const auto packed = matrix_of(backend, weight, {});
    backend.matmul({.x = x.view(),
                    .weight = packed.get(),
                    .bias = flat(bias),
                    .y = y.view(),
                    .accumulate = true,
                    .compute = Compute::kBF16});
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t i = 0; i < n; ++i) {
        double expected = before.d(r, i) + static_cast<double>(bias[static_cast<size_t>(i)]);
        for (int64_t c = 0; c < k; ++c)
          expected += x.d(r, c) * static_cast<double>(bf16_to_f32(f32_to_bf16(weight.at(i, c))));
        // Where the ISA multiplies bfloat16, x is rounded, too.
        CHECK_NEAR(y.d(r, i), expected, 2e-2);
        if (backend.isa() == "avx2" || backend.isa() == "x86-64-v2") CHECK_NEAR(y.d(r, i), expected, 1e-5);
      }
    }
    CHECK(y.gaps_are_untouched());
    return y.data;
  });
}

// Gradients of several weights and biases at once, to the bit those of one after the other: operands that are shared and not, more
// than fit together, and one that goes in parts; in float32 and rounded.
void test_several_weights() {
  constexpr int64_t kRows = 530;
  for (const Compute compute : {Compute::kExact, Compute::kBF16}) {
    on_every_tier([&](Backend& backend) {
      Numbers numbers(9);
      Grid narrow(kRows, 65, numbers), wide(kRows, 1300, numbers), d_narrow(kRows, 70, numbers);
      Grid d_other(kRows, 33, numbers), d_wide(kRows, 1500, numbers), d_rows(3, 40, numbers);
      struct Product {
        Grid& d_y;
        Grid* x;
        bool has_bias;
      };
      const std::vector<Product> products = {
          {d_narrow, &narrow, true}, {d_other, &narrow, false}, {d_narrow, &wide, false}, {d_wide, &wide, true},
          {d_other, &wide, false},   {d_rows, nullptr, true},   {d_other, nullptr, false}};
      std::vector<float> found;
      for (const bool together : {false, true}) {
        std::vector<std::unique_ptr<Matrix>> weights;
        std::vector<std::vector<float>> biases;
        std::vector<MatmulBackwardArgs> all;
        biases.reserve(products.size());
        for (const auto& [d_y, x, has_bias] : products) {
          biases.emplace_back(static_cast<size_t>(d_y.columns), 0.25f);
          MatmulBackwardArgs args{.d_y = d_y.view(), .compute = compute};
          if (x != nullptr) {
            Grid start(d_y.columns, x->columns);
            start.at(0, 0) = 3.0f;
            weights.push_back(matrix_of(backend, start, {}));
            args.x = x->view();
            args.d_weight = weights.back().get();
          }
          if (has_bias) args.d_bias = flat(biases.back());
          all.push_back(args);
        }
        if (together) {
          backend.weights_backward(all);
        } else {
          for (const MatmulBackwardArgs& args : all) backend.matmul_backward(args);
        }
        std::vector<float> values;
        for (const auto& weight : weights) append(values, read(backend, *weight).data);
        for (const auto& bias : biases) append(values, bias);
        if (together) CHECK(same_bits(values, found));
        found = values;
      }
      backend.weights_backward({});
      return found;
    });
  }
}

void test_several_weights_are_checked() {
  const auto backend = make_cpu_backend(2);
  Numbers numbers(3);
  Grid x(4, 5, numbers), d_y(4, 6, numbers), start(6, 5, numbers), d_x(4, 5, numbers);
  const auto weight = matrix_of(*backend, start, {});
  const auto other = matrix_of(*backend, start, {});
  std::vector<float> bias(6);
  const MatmulBackwardArgs good{.d_y = d_y.view(), .x = x.view(), .d_weight = weight.get(), .d_bias = flat(bias)};
  std::vector<MatmulBackwardArgs> all = {good, good};
  CHECK_ERROR(ErrorKind::kShape, "the same d_weight", backend->weights_backward(all));
  all[1].d_weight = other.get();
  CHECK_ERROR(ErrorKind::kShape, "d_bias", backend->weights_backward(all));
  all[1].d_bias = {};
  backend->weights_backward(all);
  all[1].weight = weight.get();
  all[1].d_x = d_x.view();
  CHECK_ERROR(ErrorKind::kShape, "d_x", backend->weights_backward(all));
}

}  // namespace

void test_matmul_backward() {
  test_several_weights();
  test_several_weights_are_checked();
  test_matmul_backward_of_all_shapes();
  test_many_outputs();
  test_products_round_float32_weights_to_bf16();
}

}  // namespace llama_ext::test
