// Numbers, frequencies and argument checks: everything of core/ and ops/ that needs no backend to be tested.
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "check.h"
#include "core/checked.h"
#include "core/half.h"
#include "reference/reference_backend.h"

namespace llama_ext::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

void test_bf16_round_trip_is_exact() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = bf16_to_f32(static_cast<uint16_t>(bits));
    const uint16_t back = f32_to_bf16(value);
    if (std::isnan(value)) {
      CHECK(std::isnan(bf16_to_f32(back)));
    } else {
      CHECK(back == bits);
    }
  }
}

void test_bf16_rounds_to_nearest_even() {
  for (uint32_t bits = 0; bits < 0x7f80; ++bits) {
    // The next float above the largest bfloat16 is 2^128: halfway there, float32 still has a number.
    const double low = static_cast<double>(bf16_to_f32(static_cast<uint16_t>(bits)));
    const double high = bits == 0x7f7f ? 0x1p128 : static_cast<double>(bf16_to_f32(static_cast<uint16_t>(bits + 1)));
    const float middle = static_cast<float>((low + high) / 2);
    for (uint32_t sign : {0u, 0x8000u}) {
      const float s = sign != 0 ? -1.0f : 1.0f;
      CHECK(f32_to_bf16(s * std::nextafter(middle, 0.0f)) == (bits | sign));
      CHECK(f32_to_bf16(s * middle) == ((bits + (bits & 1)) | sign));
      CHECK(f32_to_bf16(s * std::nextafter(middle, kInf)) == ((bits + 1) | sign));
    }
  }
}

void test_f16_widens_exactly() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = f16_to_f32(static_cast<uint16_t>(bits));
    const int exponent = static_cast<int>((bits >> 10) & 0x1f);
    const double mantissa = bits & 0x3ff;
    CHECK(std::signbit(value) == ((bits & 0x8000) != 0));
    if (exponent == 31) {
      CHECK(mantissa == 0 ? std::isinf(value) : std::isnan(value));
    } else {
      const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
      CHECK(std::fabs(static_cast<double>(value)) == magnitude);
    }
  }
}

void test_checked_arithmetic_refuses_to_wrap() {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  CHECK(checked_mul(3, 4, "size") == 12);
  CHECK(checked_mul(0, kMax, "size") == 0);
  CHECK(checked_add(kMax - 1, 1, "size") == kMax);
  CHECK_ERROR(ErrorKind::kLimit, "size: 4294967296 x 4294967296",
              checked_mul(int64_t{1} << 32, int64_t{1} << 32, "size"));
  CHECK_ERROR(ErrorKind::kLimit, "out of range", checked_mul(-1, 2, "size"));
  CHECK_ERROR(ErrorKind::kLimit, "out of range", checked_add(kMax, 1, "size"));
  CHECK(ceil_div(33, 32) == 2 && round_up(33, 32) == 64 && round_up(64, 32) == 64 && round_up(0, 32) == 0);
}

void check_frequencies(const RopeConfig& config, const std::vector<double>& expected) {
  const std::vector<double> frequencies = rope_inverse_frequencies(config);
  CHECK(frequencies.size() == expected.size());
  for (size_t i = 0; i < expected.size() && i < frequencies.size(); ++i) {
    CHECK_NEAR(frequencies[i], expected[i], 1e-14 * expected[i]);
  }
}

void test_rope_frequencies() {
  RopeConfig config{.head_dim = 8, .theta = 10000.0};
  check_frequencies(config, {1.0, 0.1, 0.01, 0.001});
  config.kind = RopeKind::kLinear;
  config.factor = 4.0;
  check_frequencies(config, {0.25, 0.025, 0.0025, 0.00025});

  // Wavelengths 2 pi {1, 10, 100, 1000} against the band [100 / 4, 100 / 1]: kept, blended, divided, divided. The
  // blend's share is (100 / (20 pi) - 1) / (4 - 1) = 0.19718314...
  config = {.kind = RopeKind::kLlama3, .head_dim = 8, .factor = 8.0, .original_context = 100};
  check_frequencies(config, {1.0, 0.029753525068469477, 0.01 / 8, 0.001 / 8});

  // 16 ln(4096 / (32 * 2 pi)) / (2 ln 10000) = 2.618... and, for one rotation, 5.628...: the ramp runs from pair 2 to
  // 6.
  config = {.kind = RopeKind::kYarn, .head_dim = 16, .factor = 4.0, .original_context = 4096};
  const auto blend = [](int pair, double ramp) { return std::pow(10.0, -0.5 * pair) * (1.0 - ramp + ramp / 4.0); };
  check_frequencies(config,
                    {1.0, blend(1, 0), 0.1, blend(3, 0.25), 0.01 * 0.625, blend(5, 0.75), 0.00025, blend(7, 1)});
  config.truncate = false;
  check_frequencies(config, {1.0, blend(1, 0), 0.1, blend(3, 0.12687765436067255), blend(4, 0.45907046384940875),
                             blend(5, 0.791263273338145), 0.00025, blend(7, 1)});
  // Ends 5 and 9, beyond the last pair but within D - 1.
  config.truncate = true;
  config.original_context = 68700;
  check_frequencies(config, {1.0, blend(1, 0), 0.1, blend(3, 0), 0.01, blend(5, 0), blend(6, 0.25), blend(7, 0.5)});
  // Both ends of the ramp clamp to 0: it becomes a step after pair 0.
  config.original_context = 4;
  check_frequencies(config,
                    {1.0, blend(1, 1), blend(2, 1), blend(3, 1), blend(4, 1), blend(5, 1), blend(6, 1), blend(7, 1)});
}

void test_rope_angles() {
  RopeConfig config{.head_dim = 4, .theta = 10000.0, .attention_factor = 2.0};
  const std::vector<double> frequencies = rope_inverse_frequencies(config);
  const int64_t positions[] = {0, 100000};
  float cos[4];
  float sin[4];
  rope_angles(config, frequencies, positions, 2, cos, sin);
  CHECK(cos[0] == 1.0f && cos[1] == 1.0f && sin[0] == 0.0f && sin[1] == 0.0f);
  // A float32 angle of 100000 would be off by thousandths here.
  CHECK(cos[2] == static_cast<float>(std::cos(100000.0)) && sin[3] == static_cast<float>(std::sin(100000.0 * 0.01)));
  config.kind = RopeKind::kYarn;
  rope_angles(config, frequencies, positions, 2, cos, sin);
  CHECK(cos[0] == 2.0f && sin[2] == static_cast<float>(2.0 * std::sin(100000.0)));
}

void test_rope_config_errors() {
  const RopeConfig good{.kind = RopeKind::kYarn, .head_dim = 8, .factor = 2.0, .original_context = 64};
  const auto refuse = [&](const char* text, auto&& change) {
    RopeConfig config = good;
    change(config);
    CHECK_ERROR(ErrorKind::kOption, text, rope_inverse_frequencies(config));
  };
  refuse("head_dim must be even", [](RopeConfig& c) { c.head_dim = 7; });
  refuse("head_dim must be even", [](RopeConfig& c) { c.head_dim = 0; });
  refuse("theta must be a number above 0, got -1", [](RopeConfig& c) { c.theta = -1; });
  refuse("theta above 1", [](RopeConfig& c) { c.theta = 1; });
  refuse("factor must be", [](RopeConfig& c) { c.factor = std::nan(""); });
  refuse("original_context", [](RopeConfig& c) { c.original_context = 0; });
  refuse("beta_fast", [](RopeConfig& c) { c.beta_fast = 0; });
  refuse("attention_factor", [](RopeConfig& c) { c.attention_factor = 0; });
  refuse("high_freq_factor must be above", [](RopeConfig& c) {
    c.kind = RopeKind::kLlama3;
    c.low_freq_factor = c.high_freq_factor;
  });
  refuse("is not finite", [](RopeConfig& c) {
    c.kind = RopeKind::kDefault;
    c.head_dim = 128;
    c.theta = 1e-320;
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Argument checks: one good call per operation, and every way to spoil it.

struct Tensors {
  std::vector<float> memory = std::vector<float>(4096, 0.0f);
  /// A view that starts `offset` floats into the memory.
  TensorView at(int64_t offset, std::initializer_list<int64_t> shape, int64_t row_stride = -1) {
    return {static_cast<void*>(memory.data() + offset), DType::kF32, shape, row_stride};
  }
};

void test_matmul_check() {
  const auto backend = make_reference_backend();
  Tensors t;
  const auto weight = backend->create_matrix(5, 3, {Encoding::kF32, 0});
  const MatmulArgs good{.x = t.at(0, {2, 3}), .weight = weight.get(), .bias = t.at(100, {5}), .y = t.at(200, {2, 5})};
  check(good);
  const auto refuse = [&](ErrorKind kind, const char* text, auto&& change) {
    MatmulArgs args = good;
    change(args);
    CHECK_ERROR(kind, text, check(args));
  };
  refuse(ErrorKind::kShape, "matmul: x must have shape (any, 3), got (2, 4)", [&](auto& a) { a.x = t.at(0, {2, 4}); });
  refuse(ErrorKind::kShape, "matmul: bias must have shape (5,), got (4,). Was it loaded for another model?",
         [&](auto& a) { a.bias = t.at(0, {4}); });
  refuse(ErrorKind::kShape, "y must have shape (2, 5)", [&](auto& a) { a.y = t.at(0, {3, 5}); });
  refuse(ErrorKind::kShape, "y must not overlap x", [&](auto& a) { a.y = t.at(5, {2, 5}); });
  refuse(ErrorKind::kShape, "rows of x have 3 elements but start 2 apart", [&](auto& a) { a.x = t.at(0, {2, 3}, 2); });
  refuse(ErrorKind::kDType, "x must be float32, got bfloat16",
         [&](auto& a) { a.x = {static_cast<void*>(t.memory.data()), DType::kBF16, {2, 3}}; });
  refuse(ErrorKind::kInternal, "weight is missing", [](auto& a) { a.weight = nullptr; });
  refuse(ErrorKind::kInternal, "x has no memory",
         [](auto& a) { a.x = {static_cast<void*>(nullptr), DType::kF32, {2, 3}}; });

  MatmulArgs args = good;
  args.bias = {};
  check(args);
  // x and y as column slices of one buffer, interleaved but disjoint; then one column too many.
  args.x = t.at(0, {2, 3}, 8);
  args.y = t.at(3, {2, 5}, 8);
  check(args);
  args.y = t.at(2, {2, 5}, 8);
  CHECK_ERROR(ErrorKind::kShape, "overlap", check(args));
  args.y = t.at(4, {2, 5}, 8);
  CHECK_ERROR(ErrorKind::kShape, "overlap", check(args));
  // Nothing to do is legal, and needs no memory.
  args.x = {static_cast<void*>(nullptr), DType::kF32, {0, 3}};
  args.y = {static_cast<void*>(nullptr), DType::kF32, {0, 5}};
  check(args);
}

void test_embedding_check() {
  const auto backend = make_reference_backend();
  Tensors t;
  std::vector<int32_t> ids = {0, 3};
  const auto table = backend->create_matrix(4, 3, {Encoding::kBF16, 0});
  EmbeddingArgs args{
      .ids = {static_cast<void*>(ids.data()), DType::kI32, {2}}, .table = table.get(), .y = t.at(0, {2, 3})};
  check(args);
  for (int32_t bad : {4, -1, std::numeric_limits<int32_t>::max()}) {
    ids[1] = bad;
    CHECK_ERROR(ErrorKind::kTokenId, cat("token id ", bad, " at index 1 is out of range"), check(args));
  }
  args.y = t.at(0, {2, 3}, 4);
  CHECK_ERROR(ErrorKind::kShape, "y must be contiguous", check(args));
}

void test_row_op_checks() {
  Tensors t;
  RmsNormArgs norm{.x = t.at(0, {2, 4}), .weight = t.at(50, {4}), .eps = 1e-6, .y = t.at(100, {2, 4}), .inv_rms = {}};
  check(norm);
  norm.y = norm.x;
  check(norm);
  norm.inv_rms = t.at(200, {2});
  CHECK_ERROR(ErrorKind::kShape, "must not overlap x when inv_rms is saved", check(norm));
  norm.inv_rms = {};
  norm.y = t.at(1, {2, 4});
  CHECK_ERROR(ErrorKind::kShape, "must be x itself or not overlap it", check(norm));
  norm.y = t.at(100, {2, 4});
  norm.weight = t.at(50, {2});
  CHECK_ERROR(ErrorKind::kShape, "rms_norm: weight must have shape (4,), got (2,). Was it loaded for another model?",
              check(norm));
  norm.weight = t.at(50, {4});
  norm.eps = 0;
  CHECK_ERROR(ErrorKind::kOption, "eps must be a number above 0", check(norm));

  SoftmaxArgs softmax{.x = t.at(0, {2, 4}), .y = t.at(0, {2, 4})};
  check(softmax);
  softmax.y = t.at(0, {2, 4}, 5);
  CHECK_ERROR(ErrorKind::kShape, "must be x itself", check(softmax));
  softmax.y = t.at(100, {2, 5});
  CHECK_ERROR(ErrorKind::kShape, "softmax: y must have shape (2, 4), got (2, 5)", check(softmax));

  RopeArgs rope{.x = t.at(0, {2, 3, 4}), .cos = t.at(100, {2, 2}), .sin = t.at(200, {2, 2})};
  check(rope);
  rope.x = t.at(0, {2, 3, 5});
  CHECK_ERROR(ErrorKind::kShape, "must be even, got 5", check(rope));
  rope.x = t.at(0, {2, 12});
  CHECK_ERROR(ErrorKind::kShape, "rope: x must have shape (any, any, any), got (2, 12)", check(rope));

  std::vector<int32_t> labels = {kIgnoreLabel, 3};
  CrossEntropyArgs loss{.logits = t.at(0, {2, 4}),
                        .labels = {static_cast<void*>(labels.data()), DType::kI32, {2}},
                        .losses = t.at(100, {2})};
  check(loss);
  labels[1] = 4;
  CHECK_ERROR(ErrorKind::kTokenId, "label 4 at index 1 must be in [0, 4)", check(loss));
}

void test_attention_checks() {
  const auto backend = make_reference_backend();
  Tensors t;
  const auto cache = backend->create_kv_cache({.layers = 2, .kv_heads = 2, .head_dim = 4, .capacity = 8});
  const KvStoreArgs store{
      .segments = {{cache.get(), 0, 3, 5}}, .layer = 1, .k = t.at(0, {3, 2, 4}), .v = t.at(100, {3, 2, 4})};
  check(store);
  const auto refuse_store = [&](ErrorKind kind, const char* text, auto&& change) {
    KvStoreArgs args = store;
    change(args);
    CHECK_ERROR(kind, text, check(args));
  };
  refuse_store(ErrorKind::kContextLength, "3 tokens from position 6 on do not fit",
               [](auto& a) { a.segments[0].position = 6; });
  refuse_store(ErrorKind::kContextLength, "do not fit", [](auto& a) { a.segments[0].position = -1; });
  refuse_store(ErrorKind::kContextLength, "do not fit", [](auto& a) { a.segments[0].position = INT64_MAX; });
  refuse_store(ErrorKind::kShape, "layer 2 does not exist", [](auto& a) { a.layer = 2; });
  refuse_store(ErrorKind::kShape, "v must have shape (3, 2, 4)", [&](auto& a) { a.v = t.at(0, {2, 2, 4}); });
  refuse_store(ErrorKind::kInternal, "has no cache", [](auto& a) { a.segments[0].cache = nullptr; });
  refuse_store(ErrorKind::kShape, "covers rows [1", [](auto& a) { a.segments[0].row = 1; });
  refuse_store(ErrorKind::kShape, "row 1 belongs to two segments",
               [](auto& a) { a.segments = {{a.segments[0].cache, 0, 2, 0}, {a.segments[0].cache, 1, 1, 4}}; });
  refuse_store(ErrorKind::kShape, "k has 1 heads", [&](auto& a) { a.k = a.v = t.at(0, {3, 1, 4}); });
  refuse_store(ErrorKind::kShape, "cos must have shape (3, 2)", [&](auto& a) { a.cos = t.at(0, {3, 4}); });
  refuse_store(ErrorKind::kShape, "q must not overlap k", [&](auto& a) {
    a.cos = a.sin = t.at(200, {3, 2});
    a.q = a.k;
  });
  const KvLoadArgs load{
      .cache = cache.get(), .layer = 0, .position = 0, .k = t.at(0, {3, 2, 4}), .v = t.at(8, {3, 2, 4})};
  CHECK_ERROR(ErrorKind::kShape, "v must not overlap k", check(load));

  const AttentionArgs good{.q = t.at(0, {3, 4, 4}),
                           .segments = {{cache.get(), 0, 2, 6}, {cache.get(), 2, 1, 0}},
                           .layer = 0,
                           .scale = 0.5,
                           .y = t.at(100, {3, 4, 4})};
  check(good);
  const auto refuse = [&](ErrorKind kind, const char* text, auto&& change) {
    AttentionArgs args = good;
    change(args);
    CHECK_ERROR(kind, text, check(args));
  };
  refuse(ErrorKind::kShape, "y must not overlap q", [](auto& a) { a.y = a.q; });
  refuse(ErrorKind::kShape, "row 1 belongs to two segments", [](auto& a) { a.segments[1].row = 1; });
  refuse(ErrorKind::kShape, "covers rows [3", [](auto& a) { a.segments[1].row = 3; });
  refuse(ErrorKind::kContextLength, "do not fit in a cache of 8", [](auto& a) { a.segments[0].position = 7; });
  refuse(ErrorKind::kInternal, "segment 0 has no cache", [](auto& a) { a.segments[0].cache = nullptr; });
  refuse(ErrorKind::kOption, "scale must be finite", [](auto& a) { a.scale = std::nan(""); });
  refuse(ErrorKind::kShape, "3 heads of q are not a multiple of the 2", [&](auto& a) {
    a.q = t.at(0, {3, 3, 4});
    a.y = t.at(100, {3, 3, 4});
  });

  check_projection(good, t.at(100, {3, 16}));
  CHECK_ERROR(ErrorKind::kShape, "the product's x must have shape (3, 16)", check_projection(good, t.at(100, {4, 16})));
  CHECK_ERROR(ErrorKind::kShape, "must be what attention gives", check_projection(good, t.at(200, {3, 16})));
}

void test_feed_forward_check() {
  const auto backend = make_reference_backend();
  Tensors t;
  const auto gate_up = backend->create_matrix(gate_up_size(17), 3, {Encoding::kF32, 0});
  const auto down = backend->create_matrix(3, 17, {Encoding::kF32, 0});
  FeedForwardArgs args{.x = t.at(0, {2, 3}),
                       .gate_up = gate_up.get(),
                       .gate_up_bias = t.at(300, {64}),
                       .down = down.get(),
                       .down_bias = t.at(400, {3}),
                       .y = t.at(100, {2, 3})};
  CHECK(gate_up_size(17) == 64);
  check(args);
  args.y = args.x;  // a residual connection
  check(args);
  args.y = t.at(1, {2, 3});
  CHECK_ERROR(ErrorKind::kShape, "y must be x itself or not overlap it", check(args));
  args.y = t.at(100, {2, 3});
  args.gate_up_bias = t.at(300, {34});
  CHECK_ERROR(ErrorKind::kShape, "gate_up_bias must have shape (64,), got (34,)", check(args));
  args.gate_up_bias = {};
  const auto wrong = backend->create_matrix(3, 33, {Encoding::kF32, 0});
  args.down = wrong.get();
  CHECK_ERROR(ErrorKind::kShape, "gate_up must have shape (96, 3), got (64, 3)", check(args));
}

}  // namespace
}  // namespace llama_ext::test

int main() {
  using namespace llama_ext::test;
  test_bf16_round_trip_is_exact();
  test_bf16_rounds_to_nearest_even();
  test_f16_widens_exactly();
  test_checked_arithmetic_refuses_to_wrap();
  test_rope_frequencies();
  test_rope_angles();
  test_rope_config_errors();
  test_matmul_check();
  test_embedding_check();
  test_row_op_checks();
  test_attention_checks();
  test_feed_forward_check();
  test_sample();
  test_reference();
  test_matrix_values();
  test_generate();
  test_quant();
  test_codes();
  test_kv_store();
  test_rope_table();
  test_threads();
  test_matmul_backward();
  test_training_ops();
  test_causal_attention();
  test_trainer();
  test_observer();
  test_cgroup();
  std::printf("%s: %d failed\n", failures == 0 ? "ok" : "FAILED", failures);
  return failures == 0 ? 0 : 1;
}
