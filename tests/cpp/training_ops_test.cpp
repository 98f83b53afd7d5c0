// Operations of training on rows and steps of optimisers, against plain loops in float64.
#include <array>
#include <cmath>

#include "ops/dropout.h"
#include "training_inputs.h"

namespace llama_ext::test {
namespace {

void test_swiglu(int64_t rows, int64_t size) {
  on_every_tier([=](Backend& backend) {
    Numbers numbers(11);
    Grid gate(rows, size, numbers), up(rows, size, numbers), d_y(rows, size, numbers), y(rows, size), again(rows, size);
    if (rows > 1 && size > 2) {
      gate.at(0, 0) = 120.0f;
      gate.at(1, 1) = -120.0f;
      for (int64_t c = 2; c < size; ++c) gate.at(1, c) *= 20.0f;
    }
    Grid d_gate = gate, d_up = up;
    backend.swiglu({gate.view(), up.view(), y.view()});
    backend.swiglu_backward({d_gate.view(), d_up.view(), d_y.view(), d_gate.view(), d_up.view(), again.view()});
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < size; ++c) {
        const double g = gate.d(r, c), u = up.d(r, c), d = d_y.d(r, c);
        const double s = 1.0 / (1.0 + std::exp(-g));
        CHECK_NEAR(y.d(r, c), g * s * u, 1e-6 * (1 + std::fabs(g)));
        CHECK_NEAR(again.d(r, c), g * s * u, 1e-6 * (1 + std::fabs(g)));
        CHECK_NEAR(d_gate.d(r, c), d * u * s * (1 + g * (1 - s)), 1e-6 * (1 + std::fabs(g)));
        CHECK_NEAR(d_up.d(r, c), d * g * s, 1e-6 * (1 + std::fabs(g)));
      }
    }
    CHECK(y.gaps_are_untouched() && d_gate.gaps_are_untouched() && d_up.gaps_are_untouched());
    append(y.data, d_gate.data);
    append(y.data, d_up.data);
    return y.data;
  });
}

void test_rms_norm_backward(int64_t rows, int64_t size, bool accumulate) {
  on_every_tier([=](Backend& backend) {
    Numbers numbers(13);
    Grid x(rows, size, numbers), d_y(rows, size, numbers), d_x(rows, size, numbers);
    std::vector<float> weight = numbers.vector(size), d_weight = numbers.vector(size);
    const Grid before = d_x;
    const std::vector<float> weight_before = d_weight;
    const double eps = 1e-3;
    backend.rms_norm_backward({x.view(), flat(weight), eps, d_y.view(), d_x.view(), accumulate, flat(d_weight)});
    std::vector<double> expected_weight(weight_before.begin(), weight_before.end());
    for (int64_t r = 0; r < rows; ++r) {
      double squares = 0, products = 0;
      for (int64_t c = 0; c < size; ++c) {
        squares += x.d(r, c) * x.d(r, c);
        products += static_cast<double>(weight[static_cast<size_t>(c)]) * d_y.d(r, c) * x.d(r, c);
      }
      const double inv = 1.0 / std::sqrt(squares / static_cast<double>(size) + eps);
      for (int64_t c = 0; c < size; ++c) {
        const double own = static_cast<double>(weight[static_cast<size_t>(c)]) * d_y.d(r, c);
        const double expected = inv * (own - x.d(r, c) * inv * inv * products / static_cast<double>(size));
        CHECK_NEAR(d_x.d(r, c), expected + (accumulate ? before.d(r, c) : 0), 2e-5);
        expected_weight[static_cast<size_t>(c)] += d_y.d(r, c) * x.d(r, c) * inv;
      }
    }
    for (size_t c = 0; c < expected_weight.size(); ++c) CHECK_NEAR(d_weight[c], expected_weight[c], 1e-4);
    CHECK(d_x.gaps_are_untouched());
    Grid in_place = d_y;
    if (!accumulate) {
      backend.rms_norm_backward({x.view(), flat(weight), eps, in_place.view(), in_place.view()});
      CHECK(same_bits(in_place.data, d_x.data));
    }
    append(d_x.data, d_weight);
    return d_x.data;
  });
}

void test_dropout_keeps_what_its_bits_say(int64_t rows, int64_t size, double p) {
  on_every_tier([=](Backend& backend) {
    Numbers numbers(17);
    Grid x(rows, size, numbers), y(rows, size, numbers), in_place = x;
    const Grid before = y;
    const uint64_t seed = 0x123456789abcdef0u;
    backend.dropout({x.view(), y.view(), p, seed, true});
    backend.dropout({in_place.view(), in_place.view(), p, seed, false});
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < size; ++c) {
        const bool kept = dropout_bits(seed, static_cast<uint64_t>(r * size + c)) >= dropout_threshold(p);
        const double expected = kept ? x.d(r, c) / (1 - p) : 0.0;
        CHECK_NEAR(in_place.d(r, c), expected, 1e-6);
        CHECK_NEAR(y.d(r, c), before.d(r, c) + expected, 1e-6);
      }
    }
    CHECK(y.gaps_are_untouched() && in_place.gaps_are_untouched());
    append(y.data, in_place.data);
    return y.data;
  });
}

void test_cross_entropy_backward(int64_t rows, int64_t size) {
  on_every_tier([=](Backend& backend) {
    Numbers numbers(19);
    Grid logits(rows, size, numbers);
    for (float& value : logits.data) value = value == Grid::kGap ? value : 30.0f * value;
    std::vector<int32_t> labels(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) {
      labels[static_cast<size_t>(r)] = r % 5 == 3 ? kIgnoreLabel : static_cast<int32_t>(r * 31 % size);
    }
    const TensorView label_view(labels.data(), DType::kI32, {rows});
    const Grid before = logits;
    std::vector<float> alone(static_cast<size_t>(rows)), losses(static_cast<size_t>(rows));
    backend.cross_entropy({logits.view(), label_view, flat(alone)});
    backend.cross_entropy_backward({logits.view(), label_view, 0.25, flat(losses)});
    CHECK(same_bits(alone, losses));
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t label = labels[static_cast<size_t>(r)];
      double total = 0;
      for (int64_t c = 0; c < size; ++c) total += std::exp(before.d(r, c));
      if (label != kIgnoreLabel) CHECK_NEAR(losses[static_cast<size_t>(r)], std::log(total) - before.d(r, label), 1e-5);
      for (int64_t c = 0; c < size; ++c) {
        const double p = std::exp(before.d(r, c)) / total - (c == label ? 1.0 : 0.0);
        CHECK_NEAR(logits.d(r, c), label == kIgnoreLabel ? 0.0 : 0.25 * p, 1e-6);
      }
    }
    CHECK(logits.gaps_are_untouched());
    append(logits.data, losses);
    return logits.data;
  });
}

void test_embedding_backward() {
  on_every_tier([](Backend& backend) {
    Numbers numbers(23);
    const int64_t tokens = 300, vocabulary = 37, size = 70;
    Grid start(vocabulary, size, numbers), d_y(tokens, size, numbers, 0);
    std::vector<int32_t> ids(static_cast<size_t>(tokens));
    for (size_t t = 0; t < ids.size(); ++t) ids[t] = static_cast<int32_t>(t * t % 37);
    const auto table = matrix_of(backend, start, {});
    backend.embedding_backward({TensorView(ids.data(), DType::kI32, {tokens}), d_y.view(), table.get()});
    Grid sums = read(backend, *table);
    Grid expected = start;
    for (int64_t t = 0; t < tokens; ++t) {
      // The same additions in the same order.
      for (int64_t c = 0; c < size; ++c) expected.at(ids[static_cast<size_t>(t)], c) += d_y.at(t, c);
    }
    for (int64_t r = 0; r < vocabulary; ++r) {
      for (int64_t c = 0; c < size; ++c) CHECK(sums.at(r, c) == expected.at(r, c));
    }
    return sums.data;
  });
}

void test_rope_inverse_undoes_rope() {
  on_every_tier([](Backend& backend) {
    Numbers numbers(29);
    const int64_t tokens = 50, heads = 3, dim = 22;
    Grid x(tokens, heads * dim, numbers);
    std::vector<float> angles = numbers.vector(tokens * dim / 2), cos = angles, sin = angles;
    for (size_t i = 0; i < angles.size(); ++i) {
      cos[i] = std::cos(5 * angles[i]);
      sin[i] = std::sin(5 * angles[i]);
    }
    const TensorView cos_view(cos.data(), DType::kF32, {tokens, dim / 2});
    const TensorView sin_view(sin.data(), DType::kF32, {tokens, dim / 2});
    const Grid before = x;
    backend.rope({x.heads(heads), cos_view, sin_view});
    Grid rotated = x;
    backend.rope({x.heads(heads), cos_view, sin_view, true});
    bool changed = false;
    for (size_t i = 0; i < x.data.size(); ++i) {
      CHECK_NEAR(x.data[i], before.data[i], 1e-6);
      changed = changed || std::fabs(rotated.data[i] - before.data[i]) > 0.1f;
    }
    CHECK(changed && x.gaps_are_untouched());
    append(rotated.data, x.data);
    return rotated.data;
  });
}

void test_adam(bool decoupled, int64_t size) {
  on_every_tier([=](Backend& backend) {
    Numbers numbers(31);
    std::vector<float> parameter = numbers.vector(size), first(parameter.size()), second(parameter.size());
    std::vector<double> p(parameter.begin(), parameter.end()), m(p.size()), v(p.size());
    AdamArgs args;
    args.parameter = flat(parameter);
    args.first = flat(first);
    args.second = flat(second);
    args.gradient_scale = 0.5;
    args.lr = 1e-2;
    args.decay = 0.1;
    args.decoupled = decoupled;
    for (int64_t step = 1; step <= 20; ++step) {
      std::vector<float> gradient = numbers.vector(size);
      args.gradient = flat(gradient);
      args.step = step;
      backend.adam(args);
      for (size_t i = 0; i < p.size(); ++i) {
        double g = args.gradient_scale * static_cast<double>(gradient[i]);
        if (decoupled) {
          p[i] *= 1 - args.lr * args.decay;
        } else {
          g += args.decay * p[i];
        }
        m[i] = args.beta1 * m[i] + (1 - args.beta1) * g;
        v[i] = args.beta2 * v[i] + (1 - args.beta2) * g * g;
        const double corrected = v[i] / (1 - std::pow(args.beta2, step));
        p[i] -= args.lr * m[i] / (1 - std::pow(args.beta1, step)) / (std::sqrt(corrected) + args.eps);
      }
    }
    for (size_t i = 0; i < p.size(); ++i) {
      CHECK_NEAR(parameter[i], p[i], 5e-6);
      CHECK_NEAR(first[i], m[i], 1e-6);
      CHECK_NEAR(second[i], v[i], 1e-6);
    }
    append(parameter, first);
    append(parameter, second);
    return parameter;
  });
}

void test_sgd(double momentum, bool nesterov) {
  on_every_tier([=](Backend& backend) {
    Numbers numbers(37);
    std::vector<float> parameter = numbers.vector(30011), velocity(parameter.size());
    std::vector<double> p(parameter.begin(), parameter.end()), v(p.size());
    SgdArgs args;
    args.parameter = flat(parameter);
    args.gradient_scale = 2.0;
    args.lr = 0.1;
    args.momentum = momentum;
    args.decay = 0.01;
    args.nesterov = nesterov;
    if (momentum != 0) args.velocity = flat(velocity);
    for (int step = 0; step < 5; ++step) {
      std::vector<float> gradient = numbers.vector(30011);
      args.gradient = flat(gradient);
      backend.sgd(args);
      for (size_t i = 0; i < p.size(); ++i) {
        const double g = args.gradient_scale * static_cast<double>(gradient[i]) + args.decay * p[i];
        v[i] = momentum * v[i] + g;
        p[i] -= args.lr * (nesterov ? g + momentum * v[i] : v[i]);
      }
    }
    for (size_t i = 0; i < p.size(); ++i) CHECK_NEAR(parameter[i], p[i], 1e-5);
    append(parameter, velocity);
    return parameter;
  });
}

void test_sum_of_squares() {
  on_every_tier([](Backend& backend) {
    std::vector<float> sums;
    for (int64_t size : {int64_t{0}, int64_t{1}, int64_t{16383}, int64_t{100003}}) {
      std::vector<float> x = Numbers(41).vector(size);
      double expected = 0;
      for (float value : x) expected += static_cast<double>(value) * static_cast<double>(value);
      const double sum = backend.sum_of_squares(flat(x));
      CHECK_NEAR(sum, expected, 1e-12 * expected);
      sums.resize(sums.size() + 2);
      std::memcpy(sums.data() + sums.size() - 2, &sum, sizeof sum);
    }
    return sums;
  });
}

void test_copy_rows() {
  on_every_tier([](Backend& backend) {
    std::vector<float> all;
    for (const WeightType type : {WeightType{}, WeightType{Encoding::kBF16}, WeightType{Encoding::kF16},
                                  WeightType{Encoding::kInt5, 32}, WeightType{Encoding::kInt8Min, 64}}) {
      Numbers numbers(43);
      Grid from(90, 131, numbers), to(70, 131, numbers);
      const auto source = matrix_of(backend, from, type);
      const auto target = matrix_of(backend, to, type);
      Grid kept = read(backend, *source);
      Grid expected = read(backend, *target);
      // Rows 3, 4, 13, 14, ... of the source to 60, 61, ...
      const RowMap map{.begin = 3, .group = 2, .stride = 10};
      backend.copy_rows(*target, {.begin = 60}, *source, map, 9);
      for (int64_t i = 0; i < 9; ++i) {
        for (int64_t c = 0; c < 131; ++c) expected.at(60 + i, c) = kept.at(map(i), c);
      }
      Grid result = read(backend, *target);
      CHECK(same_bits(result.data, expected.data));
      append(all, result.data);
    }
    return all;
  });
}

void test_refusals() {
  const auto backend = make_cpu_backend(1, "");
  const auto f32 = backend->create_matrix(4, 5, {});
  const auto bf16 = backend->create_matrix(4, 5, {Encoding::kBF16});
  const auto wide = backend->create_matrix(4, 6, {});
  CHECK_ERROR(ErrorKind::kDType, "must be float32", backend->values(*bf16));
  CHECK_ERROR(ErrorKind::kDType, "bfloat16", backend->copy_rows(*f32, {}, *bf16, {}, 1));
  CHECK_ERROR(ErrorKind::kShape, "columns", backend->copy_rows(*f32, {}, *wide, {}, 1));
  CHECK_ERROR(ErrorKind::kShape, "row 3 belongs at row 4 of a matrix with 4 rows",
              backend->copy_rows(*f32, {.begin = 1}, *f32, {}, 4));
  CHECK(backend->values(*f32).size() == 32 * 5);
}

}  // namespace

void test_training_ops() {
  for (const auto& [rows, size] : std::vector<std::array<int64_t, 2>>{{0, 5}, {1, 1}, {3, 7}, {300, 69}, {70, 128}}) {
    test_swiglu(rows, size);
    test_rms_norm_backward(rows, size, false);
    test_rms_norm_backward(rows, size, true);
    test_cross_entropy_backward(rows, size);
    test_dropout_keeps_what_its_bits_say(rows, size, 0.3);
  }
  test_dropout_keeps_what_its_bits_say(40, 100, 0.0);
  test_cross_entropy_backward(7, 5003);
  test_embedding_backward();
  test_rope_inverse_undoes_rope();
  test_adam(true, 40001);
  test_adam(false, 3);
  test_sgd(0.0, false);
  test_sgd(0.9, false);
  test_sgd(0.9, true);
  test_sum_of_squares();
  test_copy_rows();
  test_refusals();
}

}  // namespace llama_ext::test
