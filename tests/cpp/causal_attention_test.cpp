// Attention of whole sequences and its gradient against plain loops in float64: odd shapes, blocks of rows and keys that are cut
// off, grouped heads, dropout, few long sequences that threads share, gradients in the place of their inputs.
#include <algorithm>
#include <cmath>

#include "core/interrupt.h"
#include "ops/dropout.h"
#include "training_inputs.h"

namespace llama_ext::test {
namespace {

struct Case {
  std::vector<RowRange> sequences;
  int64_t rows;
  int64_t heads;
  int64_t kv_heads;
  int64_t dim;
  double scale;
  double dropout = 0.0;
  bool in_place = false;
};

using Doubles2 = std::vector<double>;

struct Expected {
  Doubles2 y, log_sums, d_q, d_k, d_v;
};

Expected expected_of(const Case& c, const Grid& q, const Grid& k, const Grid& v, const Grid& d_y, uint64_t seed) {
  const auto size = [](int64_t count) { return static_cast<size_t>(count); };
  Expected e{Doubles2(size(c.rows * c.heads * c.dim)), Doubles2(size(c.rows * c.heads)),
             Doubles2(size(c.rows * c.heads * c.dim)), Doubles2(size(c.rows * c.kv_heads * c.dim)),
             Doubles2(size(c.rows * c.kv_heads * c.dim))};
  for (const RowRange& sequence : c.sequences) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const int64_t g = h / (c.heads / c.kv_heads);
      for (int64_t i = 0; i < sequence.tokens; ++i) {
        const int64_t row = sequence.row + i;
        Doubles2 s(size(i + 1)), p(size(i + 1)), dp(size(i + 1)), keep(size(i + 1), 1.0);
        double top = -1e300, total = 0, delta = 0;
        for (int64_t j = 0; j <= i; ++j) {
          for (int64_t d = 0; d < c.dim; ++d) {
            s[size(j)] += c.scale * q.d(row, h * c.dim + d) * k.d(sequence.row + j, g * c.dim + d);
            dp[size(j)] += d_y.d(row, h * c.dim + d) * v.d(sequence.row + j, g * c.dim + d);
          }
          top = std::max(top, s[size(j)]);
          const uint64_t index = (static_cast<uint64_t>(row * c.heads + h) << 20) + static_cast<uint64_t>(j);
          if (c.dropout > 0) {
            keep[size(j)] = dropout_bits(seed, index) >= dropout_threshold(c.dropout) ? 1 / (1 - c.dropout) : 0.0;
          }
        }
        for (int64_t j = 0; j <= i; ++j) total += std::exp(s[size(j)] - top);
        e.log_sums[size(row * c.heads + h)] = top + std::log(total);
        for (int64_t j = 0; j <= i; ++j) {
          p[size(j)] = std::exp(s[size(j)] - top) / total;
          delta += p[size(j)] * keep[size(j)] * dp[size(j)];
        }
        for (int64_t j = 0; j <= i; ++j) {
          const double ds = c.scale * p[size(j)] * (keep[size(j)] * dp[size(j)] - delta);
          const int64_t other = sequence.row + j;
          for (int64_t d = 0; d < c.dim; ++d) {
            const size_t at_q = size((row * c.heads + h) * c.dim + d);
            const size_t at_k = size((other * c.kv_heads + g) * c.dim + d);
            e.y[at_q] += p[size(j)] * keep[size(j)] * v.d(other, g * c.dim + d);
            e.d_q[at_q] += ds * k.d(other, g * c.dim + d);
            e.d_k[at_k] += ds * q.d(row, h * c.dim + d);
            e.d_v[at_k] += p[size(j)] * keep[size(j)] * d_y.d(row, h * c.dim + d);
          }
        }
      }
    }
  }
  return e;
}

bool belongs(const Case& c, int64_t row) {
  return std::any_of(c.sequences.begin(), c.sequences.end(),
                     [&](const RowRange& s) { return row >= s.row && row < s.row + s.tokens; });
}

void check_grid(const Case& c, const Grid& actual, const Doubles2& expected, const Grid& before) {
  double worst = 0, largest = 0;
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t i = 0; i < actual.columns; ++i) {
      if (!belongs(c, r)) {
        CHECK(actual.d(r, i) == before.d(r, i));
        continue;
      }
      const double wanted = expected[static_cast<size_t>(r * actual.columns + i)];
      worst = std::max(worst, std::fabs(actual.d(r, i) - wanted));
      largest = std::max(largest, std::fabs(wanted));
    }
  }
  CHECK_NEAR(worst, 0.0, 3e-6 * (1 + largest));
  CHECK(actual.gaps_are_untouched());
}

void test_case(const Case& c) {
  const uint64_t seed = dropout_seed(7, 3);
  Numbers numbers(static_cast<uint64_t>(c.rows * 31 + c.dim));
  const Grid q(c.rows, c.heads * c.dim, numbers), k(c.rows, c.kv_heads * c.dim, numbers),
      v(c.rows, c.kv_heads * c.dim, numbers), d_y(c.rows, c.heads * c.dim, numbers),
      other(c.rows, c.heads * c.dim, numbers);
  const Expected expected = expected_of(c, q, k, v, d_y, seed);
  on_every_tier([&](Backend& backend) {
    Grid own_q = q, own_k = k, own_v = v, own_d_y = d_y, y = other;
    std::vector<float> log_sums(static_cast<size_t>(c.rows * c.heads));
    const TensorView log_view(log_sums.data(), DType::kF32, {c.rows, c.heads});
    backend.causal_attention({.sequences = c.sequences,
                              .q = own_q.heads(c.heads),
                              .k = own_k.heads(c.kv_heads),
                              .v = own_v.heads(c.kv_heads),
                              .scale = c.scale,
                              .y = y.heads(c.heads),
                              .log_sums = log_view,
                              .dropout = c.dropout,
                              .seed = seed});
    check_grid(c, y, expected.y, other);
    for (size_t i = 0; i < log_sums.size(); ++i) {
      if (belongs(c, static_cast<int64_t>(i) / c.heads)) CHECK_NEAR(log_sums[i], expected.log_sums[i], 2e-5);
    }
    Grid d_q = other, d_k = k, d_v = v;
    Grid& to_q = c.in_place ? own_q : d_q;
    Grid& to_k = c.in_place ? own_k : d_k;
    Grid& to_v = c.in_place ? own_v : d_v;
    backend.causal_attention_backward({.sequences = c.sequences,
                                       .q = own_q.heads(c.heads),
                                       .k = own_k.heads(c.kv_heads),
                                       .v = own_v.heads(c.kv_heads),
                                       .scale = c.scale,
                                       .y = y.heads(c.heads),
                                       .log_sums = log_view,
                                       .d_y = own_d_y.heads(c.heads),
                                       .d_q = to_q.heads(c.heads),
                                       .d_k = to_k.heads(c.kv_heads),
                                       .d_v = to_v.heads(c.kv_heads),
                                       .dropout = c.dropout,
                                       .seed = seed});
    check_grid(c, to_q, expected.d_q, c.in_place ? q : other);
    check_grid(c, to_k, expected.d_k, k);
    check_grid(c, to_v, expected.d_v, v);
    std::vector<float> all = y.data;
    for (const Grid* grid : {&to_q, &to_k, &to_v}) all.insert(all.end(), grid->data.begin(), grid->data.end());
    all.insert(all.end(), log_sums.begin(), log_sums.end());
    return all;
  });
}

/// Wants to stop once it has been asked a few times.
class Stop final : public InterruptHandler {
 public:
  bool requested() override { return ++asked_ > 3; }

 private:
  int asked_ = 0;
};

void test_a_long_sequence_can_be_interrupted() {
  const int64_t tokens = 4000, dim = 16;
  Numbers numbers(3);
  Grid q(tokens, dim, numbers), k = q, v = q, y(tokens, dim);
  std::vector<float> log_sums(static_cast<size_t>(tokens));
  Stop stop;
  const InterruptScope scope(&stop);
  bool stopped = false;
  try {
    make_cpu_backend(1, "")->causal_attention({.sequences = {{0, tokens}},
                                               .q = q.heads(1),
                                               .k = k.heads(1),
                                               .v = v.heads(1),
                                               .y = y.heads(1),
                                               .log_sums = TensorView(log_sums.data(), DType::kF32, {tokens, 1})});
  } catch (const Interrupted&) {
    stopped = true;
  }
  CHECK(stopped);
}

}  // namespace

void test_causal_attention() {
  test_case({{{0, 1}}, 1, 1, 1, 1, 1.0});
  test_case({{}, 4, 2, 1, 5, 1.0});
  test_case({{{3, 5}, {9, 0}, {10, 1}}, 12, 3, 3, 7, 0.5});
  test_case({{{70, 61}, {0, 67}}, 140, 4, 2, 33, -0.2});
  test_case({{{0, 64}, {64, 64}, {128, 64}}, 192, 4, 4, 32, 0.17, 0.25, true});
  test_case({{{1, 259}}, 262, 2, 1, 64, 0.125});
  test_case({{{1, 259}}, 262, 6, 2, 20, 0.3, 0.1, true});
  test_case({{{0, 97}, {97, 200}, {300, 33}}, 333, 6, 3, 40, 0.2, 0.5});
  test_a_long_sequence_can_be_interrupted();
}

}  // namespace llama_ext::test
