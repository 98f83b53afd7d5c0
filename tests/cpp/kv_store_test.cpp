// kv_store: what it rotates on the way is what rope rotates by itself, for many segments, dtypes, threads and both backends.
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "reference/reference_backend.h"

namespace llama_ext::test {
namespace {

constexpr int64_t kRows = 75, kHeads = 6, kKvHeads = 2, kDim = 10, kCapacity = 90;

std::vector<float> numbers(int64_t count, double step) {
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = static_cast<float>(std::sin(step * static_cast<double>(i + 1)));
  return values;
}

TensorView view(std::vector<float>& values, std::initializer_list<int64_t> shape) {
  return TensorView(values.data(), DType::kF32, shape);
}

struct Inputs {
  std::vector<float> q = numbers(kRows * kHeads * kDim, 0.37);
  std::vector<float> k = numbers(kRows * kKvHeads * kDim, 0.53);
  std::vector<float> v = numbers(kRows * kKvHeads * kDim, 0.71);
  std::vector<float> cos = numbers(kRows * kDim / 2, 0.11);
  std::vector<float> sin = numbers(kRows * kDim / 2, 0.13);

  TensorView q_view() { return view(q, {kRows, kHeads, kDim}); }
  TensorView k_view() { return view(k, {kRows, kKvHeads, kDim}); }
  TensorView v_view() { return view(v, {kRows, kKvHeads, kDim}); }
  TensorView cos_view() { return view(cos, {kRows, kDim / 2}); }
  TensorView sin_view() { return view(sin, {kRows, kDim / 2}); }
};

std::vector<float> stored(Backend& backend, const KvCache& cache) {
  std::vector<float> all(static_cast<size_t>(2 * kCapacity * kKvHeads * kDim));
  float* values = all.data() + all.size() / 2;
  backend.kv_load({.cache = &cache,
                   .layer = 1,
                   .position = 0,
                   .k = TensorView(all.data(), DType::kF32, {kCapacity, kKvHeads, kDim}),
                   .v = TensorView(values, DType::kF32, {kCapacity, kKvHeads, kDim})});
  return all;
}

void test_rotates_as_rope_does(Backend& backend, DType dtype) {
  const auto make = [&] {
    return backend.create_kv_cache(
        {.layers = 2, .kv_heads = kKvHeads, .head_dim = kDim, .capacity = kCapacity, .dtype = dtype});
  };
  // Across panels of 32 positions, out of order, of odd length; rows 70 to 72 belong to nobody.
  const auto segments = [](KvCache& a, KvCache& b) {
    return std::vector<KvSegment>{{&a, 3, 67, 20}, {&b, 73, 2, 31}, {&b, 0, 3, 0}};
  };
  Inputs apart;
  const auto a1 = make();
  const auto b1 = make();
  for (const auto& [row, count] : {std::pair<int64_t, int64_t>{0, 70}, {73, 2}}) {
    const auto part = [&, r = row, n = count](const TensorView& all) { return all.slice_rows(r, n); };
    backend.rope({.x = part(apart.q_view()), .cos = part(apart.cos_view()), .sin = part(apart.sin_view())});
    backend.rope({.x = part(apart.k_view()), .cos = part(apart.cos_view()), .sin = part(apart.sin_view())});
  }
  backend.kv_store({.segments = segments(*a1, *b1), .layer = 1, .k = apart.k_view(), .v = apart.v_view()});

  Inputs together;
  const auto a2 = make();
  const auto b2 = make();
  backend.kv_store({.segments = segments(*a2, *b2),
                    .layer = 1,
                    .k = together.k_view(),
                    .v = together.v_view(),
                    .q = together.q_view(),
                    .cos = together.cos_view(),
                    .sin = together.sin_view()});
  CHECK(together.q == apart.q);
  CHECK(together.k == apart.k);
  CHECK(together.q != Inputs().q);
  CHECK(stored(backend, *a1) == stored(backend, *a2));
  CHECK(stored(backend, *b1) == stored(backend, *b2));
  CHECK(stored(backend, *a1) != stored(backend, *b1));
}

}  // namespace

void test_kv_store() {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
    test_rotates_as_rope_does(*make_reference_backend(), dtype);
    for (int threads : {1, 3}) test_rotates_as_rope_does(*make_cpu_backend(threads), dtype);
  }
}

}  // namespace llama_ext::test
