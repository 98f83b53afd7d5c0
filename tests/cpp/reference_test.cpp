// The reference backend on cases small enough to be worked out by hand.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "check.h"
#include "core/half.h"
#include "core/interrupt.h"
#include "reference/reference_backend.h"

namespace llama_ext::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::nanf("");

template <typename T>
TensorView view(std::vector<T>& data, DType dtype, std::initializer_list<int64_t> shape, int64_t row_stride = -1) {
  return {static_cast<void*>(data.data()), dtype, shape, row_stride};
}
TensorView view(std::vector<float>& data, std::initializer_list<int64_t> shape, int64_t row_stride = -1) {
  return view(data, DType::kF32, shape, row_stride);
}

std::unique_ptr<Matrix> matrix_of(Backend& backend, int64_t rows, int64_t cols, std::vector<float> values,
                                  DType dtype = DType::kF32) {
  auto matrix = backend.create_matrix(rows, cols, weight_type(dtype, "matrix"));
  backend.write_rows(*matrix, {}, view(values, {rows, cols}), {});
  return matrix;
}

void test_memory(Backend& backend) {
  CHECK(backend.device() == "reference" && backend.isa() == "float64" && backend.threads() == 1);
  for (size_t nbytes : {size_t{0}, size_t{1}, size_t{1000}}) {
    const auto buffer = backend.allocate(nbytes);
    CHECK(buffer->nbytes() == nbytes && reinterpret_cast<uintptr_t>(buffer->data()) % 64 == 0);
    std::vector<char> bytes(nbytes, 1);
    backend.copy_to_host(bytes.data(), buffer->data(), nbytes);
    CHECK(bytes == std::vector<char>(nbytes, 0));
    bytes.assign(nbytes, 7);
    backend.copy_to_device(buffer->data(), bytes.data(), nbytes);
    CHECK(nbytes == 0 || std::memcmp(buffer->data(), bytes.data(), nbytes) == 0);
  }
  CHECK_ERROR(ErrorKind::kOutOfMemory, "cannot allocate", backend.allocate(SIZE_MAX));
  CHECK_ERROR(ErrorKind::kDType, "weights are not kept as float64", weight_type(DType::kF64, "matrix"));
  CHECK_ERROR(ErrorKind::kLimit, "out of range",
              backend.create_matrix(int64_t{1} << 32, int64_t{1} << 32, {Encoding::kF32, 0}));
  CHECK(backend.create_matrix(0, 5, {Encoding::kF32, 0})->nbytes() == 0);
}

void test_write_rows_rounds_once(Backend& backend) {
  // Around the middle between every two neighbours: through float32, the outer two would round to the middle and then
  // to even.
  std::vector<double> source;
  std::vector<uint16_t> expected;
  for (uint32_t bits = 0; bits < 0x7f80; ++bits) {
    const double low = static_cast<double>(bf16_to_f32(static_cast<uint16_t>(bits)));
    const double high = bits == 0x7f7f ? 0x1p128 : static_cast<double>(bf16_to_f32(static_cast<uint16_t>(bits + 1)));
    const double middle = (low + high) / 2;
    for (uint32_t sign : {0u, 0x8000u}) {
      const double s = sign != 0 ? -1.0 : 1.0;
      source.insert(source.end(),
                    {s * low, s * std::nextafter(middle, 0.0), s * middle, s * std::nextafter(middle, 1e300)});
      for (uint32_t rounded : {bits, bits, bits + (bits & 1), bits + 1}) {
        expected.push_back(static_cast<uint16_t>(rounded | sign));
      }
    }
  }
  source.insert(source.end(), {1e300, -1e300, HUGE_VAL, 1e-300});
  expected.insert(expected.end(), {0x7f80, 0xff80, 0x7f80, 0});
  const int64_t count = static_cast<int64_t>(source.size());
  const auto matrix = backend.create_matrix(1, count, {Encoding::kBF16, 0});
  backend.write_rows(*matrix, {}, view(source, DType::kF64, {1, count}), {});
  std::vector<uint16_t> read(source.size());
  backend.read_rows(*matrix, {}, view(read, DType::kBF16, {1, count}));
  CHECK(read == expected);

  std::vector<double> nan = {std::nan("")};
  const auto one = backend.create_matrix(1, 1, {Encoding::kBF16, 0});
  backend.write_rows(*one, {}, view(nan, DType::kF64, {1, 1}), {});
  std::vector<float> widened = {0.0f};
  backend.read_rows(*one, {}, view(widened, {1, 1}));
  CHECK(std::isnan(widened[0]));
}

void test_rows_are_mapped(Backend& backend) {
  const auto matrix = backend.create_matrix(6, 1, {Encoding::kF32, 0});
  std::vector<uint16_t> halves = {0x3c00, 0x4000, 0xc200};  // float16: 1, 2, -3
  backend.write_rows(*matrix, {.begin = 1, .group = 2, .stride = 3}, view(halves, DType::kF16, {3, 1}), {});
  std::vector<float> read(6);
  backend.read_rows(*matrix, {}, view(read, {6, 1}));
  CHECK(read == (std::vector<float>{0, 1, 2, 0, -3, 0}));
  std::vector<float> mapped(3);
  backend.read_rows(*matrix, {.begin = 1, .group = 2, .stride = 3}, view(mapped, {3, 1}));
  CHECK(mapped == (std::vector<float>{1, 2, -3}));
  CHECK_ERROR(ErrorKind::kShape, "row 0 belongs at row 6",
              backend.write_rows(*matrix, {.begin = 6}, view(mapped, {3, 1}), {}));
  CHECK_ERROR(ErrorKind::kShape, "source must have shape (any, 1)",
              backend.write_rows(*matrix, {}, view(mapped, {1, 3}), {}));
  CHECK_ERROR(ErrorKind::kLimit, "out of range",
              backend.write_rows(*matrix, {.begin = INT64_MAX}, view(mapped, {3, 1}), {}));
  std::vector<int32_t> integers = {1};
  CHECK_ERROR(ErrorKind::kDType, "got int32", backend.write_rows(*matrix, {}, view(integers, DType::kI32, {1, 1}), {}));
  CHECK_ERROR(ErrorKind::kDType, "read_rows", backend.read_rows(*matrix, {}, view(halves, DType::kBF16, {3, 1})));
}

void test_embedding(Backend& backend) {
  const auto table = matrix_of(backend, 3, 2, {1, 2, 3, 4, 5, 6}, DType::kBF16);
  std::vector<int32_t> ids = {2, 0, 2};
  std::vector<float> y(6, kNan);
  backend.embedding({.ids = view(ids, DType::kI32, {3}), .table = table.get(), .y = view(y, {3, 2})});
  CHECK(y == (std::vector<float>{5, 6, 1, 2, 5, 6}));
}

void test_matmul(Backend& backend) {
  const auto weight = matrix_of(backend, 3, 2, {1, 2, 3, 4, -1, 0.5f});
  std::vector<float> x = {1, 1, 99, 2, -1, 99};  // rows of 2, three apart
  std::vector<float> bias = {10, 20, 30};
  std::vector<float> y(8, kNan);
  MatmulArgs args{.x = view(x, {2, 2}, 3), .weight = weight.get(), .bias = view(bias, {3}), .y = view(y, {2, 3}, 4)};
  backend.matmul(args);
  CHECK(y[0] == 13 && y[1] == 27 && y[2] == 29.5f && y[4] == 10 && y[5] == 22 && y[6] == 27.5f);
  CHECK(std::isnan(y[3]));  // between rows nothing is written
  args.accumulate = true;
  args.bias = {};
  backend.matmul(args);
  CHECK(y[0] == 16 && y[1] == 34 && y[6] == 25);
  // No inputs: the bias alone.
  const auto empty = backend.create_matrix(3, 0, {Encoding::kF32, 0});
  std::vector<float> z(3, kNan);
  backend.matmul({.x = view(x, {1, 0}), .weight = empty.get(), .bias = view(bias, {3}), .y = view(z, {1, 3})});
  CHECK(z == bias);
  // 2^24 + 1 - 2^24: lost in float32.
  const auto ones = matrix_of(backend, 1, 3, {1, 1, 1});
  std::vector<float> cancelling = {16777216.0f, 1.0f, -16777216.0f};
  backend.matmul({.x = view(cancelling, {1, 3}), .weight = ones.get(), .bias = {}, .y = view(z, {1, 1})});
  CHECK(z[0] == 1.0f);
}

void test_rms_norm(Backend& backend) {
  std::vector<float> x = {3, 4, 0, 0};
  std::vector<float> weight = {1, 2};
  std::vector<float> inv_rms(2, kNan);
  std::vector<float> y(4, kNan);
  backend.rms_norm({.x = view(x, {2, 2}),
                    .weight = view(weight, {2}),
                    .eps = 0.5,
                    .y = view(y, {2, 2}),
                    .inv_rms = view(inv_rms, {2})});
  CHECK_NEAR(inv_rms[0], 1 / std::sqrt(13.0), 1e-8);  // mean (9 + 16) / 2, plus 0.5
  CHECK_NEAR(y[0], 3 / std::sqrt(13.0), 1e-7);
  CHECK_NEAR(y[1], 8 / std::sqrt(13.0), 2e-7);
  CHECK(y[2] == 0 && y[3] == 0);
  backend.rms_norm(
      {.x = view(x, {2, 2}), .weight = view(weight, {2}), .eps = 0.5, .y = view(x, {2, 2}), .inv_rms = {}});
  CHECK(x == y);
}

void test_rope(Backend& backend) {
  std::vector<float> x = {1, 2, 3, 4, 5, 6, 7, 8};  // two heads of 4
  std::vector<float> cos = {0, 1};
  std::vector<float> sin = {1, 0};
  backend.rope({.x = view(x, {1, 2, 4}), .cos = view(cos, {1, 2}), .sin = view(sin, {1, 2})});
  CHECK(x == (std::vector<float>{-3, 2, 1, 4, -7, 6, 5, 8}));  // pair 0 turns by 90 degrees, pair 1 stays
}

void test_kv_cache(Backend& backend) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    const auto cache =
        backend.create_kv_cache({.layers = 2, .kv_heads = 1, .head_dim = 2, .capacity = 4, .dtype = dtype});
    CHECK(cache->nbytes() == 2 * 2 * 4 * 2 * static_cast<int64_t>(size_of(dtype)));
    std::vector<float> k = {1, 2, 3, 4};
    std::vector<float> v = {5, 6, 7, 8.001953125f};  // 8 + 2^-9 rounds to 8 in bfloat16
    backend.kv_store(
        {.segments = {{cache.get(), 0, 2, 2}}, .layer = 1, .k = view(k, {2, 1, 2}), .v = view(v, {2, 1, 2})});
    std::vector<float> k2(8, kNan);
    std::vector<float> v2(8, kNan);
    const auto load = [&](const KvCache& from, int64_t layer) {
      backend.kv_load(
          {.cache = &from, .layer = layer, .position = 0, .k = view(k2, {4, 1, 2}), .v = view(v2, {4, 1, 2})});
    };
    load(*cache, 1);
    CHECK(k2 == (std::vector<float>{0, 0, 0, 0, 1, 2, 3, 4}));
    CHECK(v2 == (std::vector<float>{0, 0, 0, 0, 5, 6, 7, dtype == DType::kF32 ? v[3] : 8.0f}));
    load(*cache, 0);
    CHECK(k2 == std::vector<float>(8, 0.0f));

    const auto copy =
        backend.create_kv_cache({.layers = 2, .kv_heads = 1, .head_dim = 2, .capacity = 9, .dtype = dtype});
    backend.copy_kv_cache(*copy, *cache, 3);
    load(*copy, 1);
    CHECK(k2 == (std::vector<float>{0, 0, 0, 0, 1, 2, 0, 0}));  // position 3 was not asked for
    CHECK_ERROR(ErrorKind::kContextLength, "5 positions do not fit", backend.copy_kv_cache(*copy, *cache, 5));
    const auto other =
        backend.create_kv_cache({.layers = 1, .kv_heads = 1, .head_dim = 2, .capacity = 9, .dtype = dtype});
    CHECK_ERROR(ErrorKind::kShape, "may differ in capacity only", backend.copy_kv_cache(*other, *cache, 1));
  }
  CHECK_ERROR(ErrorKind::kDType, "a KV cache must be", backend.create_kv_cache({.dtype = DType::kF16}));
}

void test_attention(Backend& backend) {
  // Keys so that the scores of head 0 are 0 and log 3: weights 1/4 and 3/4. Heads 0 and 1 share key/value head 0.
  const auto cache = backend.create_kv_cache({.layers = 1, .kv_heads = 1, .head_dim = 2, .capacity = 2});
  std::vector<float> k = {0, 0, 2 * std::log(3.0f), 0};
  std::vector<float> v = {4, 8, 0, -8};
  backend.kv_store(
      {.segments = {{cache.get(), 0, 2, 0}}, .layer = 0, .k = view(k, {2, 1, 2}), .v = view(v, {2, 1, 2})});
  std::vector<float> q = {1, 0, 0, 1, 1, 0, 0, 1};  // (2 tokens, 2 heads, 2)
  std::vector<float> y(8, kNan);
  AttentionArgs args{
      .q = view(q, {2, 2, 2}), .segments = {{cache.get(), 0, 2, 0}}, .layer = 0, .scale = 0.5, .y = view(y, {2, 2, 2})};
  backend.attention(args);
  const std::vector<float> expected = {4, 8,  4, 8,
                                       1, -4, 2, 0};  // token 0 sees key 0 alone; head 1 weighs both equally
  for (size_t i = 0; i < 8; ++i) CHECK_NEAR(y[i], expected[i], 1e-6);
  // The same two tokens as two segments, in the other order of rows; a row of no segment is left alone.
  std::vector<float> q3 = {1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1};
  std::vector<float> y3(12, kNan);
  args.q = view(q3, {3, 2, 2});
  args.y = view(y3, {3, 2, 2});
  args.segments = {{cache.get(), 2, 1, 1}, {cache.get(), 0, 1, 0}};
  backend.attention(args);
  CHECK(std::isnan(y3[4]) && std::isnan(y3[7]));
  for (size_t i = 0; i < 4; ++i) CHECK(y3[i] == y[i] && y3[8 + i] == y[4 + i]);
}

void test_feed_forward(Backend& backend) {
  // F = 17 crosses into a second group of 16, most of which is padding. Only widths 0 and 16 are in use.
  const auto gate_up = backend.create_matrix(gate_up_size(17), 1, {Encoding::kF32, 0});
  std::vector<float> gate(17, 0.0f);
  std::vector<float> up(17, 0.0f);
  gate[0] = 1;
  up[0] = 3;
  gate[16] = -1;
  up[16] = 5;
  backend.write_rows(*gate_up, gate_rows(), view(gate, {17, 1}), {});
  backend.write_rows(*gate_up, up_rows(), view(up, {17, 1}), {});
  std::vector<float> weights(17, 1.0f);
  const auto down = matrix_of(backend, 1, 17, weights);
  std::vector<float> gate_up_bias(64, 0.0f);
  gate_up_bias[static_cast<size_t>(gate_rows()(0))] = 0.5f;
  std::vector<float> down_bias = {7};
  std::vector<float> x = {2};
  std::vector<float> y = {100};
  FeedForwardArgs args{.x = view(x, {1, 1}),
                       .gate_up = gate_up.get(),
                       .gate_up_bias = view(gate_up_bias, {64}),
                       .down = down.get(),
                       .down_bias = view(down_bias, {1}),
                       .y = view(y, {1, 1})};
  const auto silu = [](double z) { return z / (1 + std::exp(-z)); };
  const double expected = silu(2.5) * 6 + silu(-2.0) * 10 + 7;
  backend.feed_forward(args);
  CHECK_NEAR(y[0], expected, 1e-6);
  args.accumulate = true;
  backend.feed_forward(args);
  CHECK_NEAR(y[0], 2 * expected, 2e-6);
}

void test_softmax(Backend& backend) {
  const float log3 = std::log(3.0f);
  std::vector<float> x = {0, log3, -kInf, 1000, 1000, -kInf, -kInf, -kInf, -kInf, 0, kNan, 0, kInf, 0, 0};
  std::vector<float> y(15, 7.0f);
  backend.softmax({.x = view(x, {5, 3}), .y = view(y, {5, 3})});
  CHECK_NEAR(y[0], 0.25, 1e-7);
  CHECK_NEAR(y[1], 0.75, 1e-7);
  CHECK(y[2] == 0 && y[3] == 0.5f && y[4] == 0.5f && y[5] == 0);
  for (size_t i = 6; i < 15; ++i) CHECK(std::isnan(y[i]));
  backend.softmax({.x = view(x, {5, 3}), .y = view(x, {5, 3})});
  CHECK(x[0] == y[0] && x[1] == y[1] && x[4] == y[4]);
}

void test_cross_entropy(Backend& backend) {
  std::vector<float> logits = {0, std::log(3.0f), 1000, 0, 5, 5};
  std::vector<int32_t> labels = {1, 1, kIgnoreLabel};
  std::vector<float> losses(3, kNan);
  backend.cross_entropy(
      {.logits = view(logits, {3, 2}), .labels = view(labels, DType::kI32, {3}), .losses = view(losses, {3})});
  CHECK_NEAR(losses[0], std::log(4.0 / 3.0), 1e-7);
  CHECK(losses[1] == 1000.0f && losses[2] == 0.0f);
}

void test_sample_is_the_hosts(Backend& backend) {
  std::vector<float> logits = {1, 3, 2, 5, 4, 0};
  const SamplingOptions options;
  std::vector<SampleArgs> rows(2);
  for (size_t row = 0; row < 2; ++row) {
    rows[row].logits = view(logits, {6}).slice_rows(static_cast<int64_t>(3 * row), 3);
    rows[row].options = &options;
  }
  std::vector<SampleResult> results(2);
  backend.sample(rows, results);
  CHECK(results[0].token == 1 && results[1].token == 0);
  std::vector<LogSumExp> sums(2);
  backend.log_sum_exp({.logits = view(logits, {2, 3}), .out = sums.data()});
  for (size_t row = 0; row < 2; ++row) {
    const float largest = logits[3 * row + static_cast<size_t>(sums[row].argmax)];
    CHECK(sums[row].argmax == results[row].token);
    CHECK(static_cast<float>(static_cast<double>(largest) - sums[row].value) == results[row].logprob);
  }
  CHECK_ERROR(ErrorKind::kInternal, "2 rows, but 1 results", backend.sample(rows, {results.data(), 1}));
}

void test_long_operations_can_be_interrupted(Backend& backend) {
  struct Handler final : InterruptHandler {
    int calls = 0;
    bool requested() override { return ++calls == 2; }
  } handler;
  const auto weight = backend.create_matrix(2048, 1024, {Encoding::kF32, 0});
  std::vector<float> x(256 * 1024, 0.0f);
  std::vector<float> y(256 * 2048, 0.0f);
  const InterruptScope scope(&handler);
  bool was_interrupted = false;
  try {
    backend.matmul({.x = view(x, {256, 1024}), .weight = weight.get(), .bias = {}, .y = view(y, {256, 2048})});
  } catch (const Interrupted&) {
    was_interrupted = true;
  }
  CHECK(was_interrupted && handler.calls == 2);
}

void test_matrices_of_another_backend_are_refused(Backend& backend) {
  struct Foreign final : Matrix {
    Foreign() : Matrix(1, 1, {Encoding::kF32, 0}) {}
    int64_t nbytes() const override { return 0; }
  } foreign;
  std::vector<float> x = {1};
  std::vector<float> y = {1};
  CHECK_ERROR(ErrorKind::kDevice, "belongs to another backend",
              backend.matmul({.x = view(x, {1, 1}), .weight = &foreign, .bias = {}, .y = view(y, {1, 1})}));
}

}  // namespace

void test_reference() {
  const std::unique_ptr<Backend> backend = make_reference_backend();
  for (auto* test : {test_memory, test_write_rows_rounds_once, test_rows_are_mapped, test_embedding, test_matmul,
                     test_rms_norm, test_rope, test_kv_cache, test_attention, test_feed_forward, test_softmax,
                     test_cross_entropy, test_sample_is_the_hosts, test_long_operations_can_be_interrupted,
                     test_matrices_of_another_backend_are_refused}) {
    test(*backend);
  }
}

}  // namespace llama_ext::test
