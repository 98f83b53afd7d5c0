// Passes that are looked at, for the sanitisers to watch: what is seen is proven from Python (tests/interpret).
#include "model/observer.h"

#include <cstring>
#include <functional>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "model/observed_sequence.h"
#include "model/read_out.h"
#include "odd_model.h"
#include "reference/reference_backend.h"

namespace llama_ext::test {
namespace {

using Floats = std::vector<float>;

/// Sees every site, or one of them, and does what it was given.
class Watcher : public Observer {
 public:
  using See = std::function<bool(Site, int64_t, const TensorView&)>;
  explicit Watcher(See see) : see_(std::move(see)) {}
  bool wants(Site, int64_t) const override { return true; }
  bool show(Site site, int64_t layer, const TensorView& values) override { return see_(site, layer, values); }

 private:
  See see_;
};

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

Floats ordinary(const Model& model, const std::vector<int32_t>& tokens, const Adapter* adapter) {
  const auto count = static_cast<int64_t>(tokens.size());
  const auto cache = model.backend().create_kv_cache(model.kv_shape(count, DType::kF32));
  Floats logits(tokens.size() * static_cast<size_t>(model.config().outputs()));
  forward(model,
          {{.cache = cache.get(),
            .position = 0,
            .tokens = tokens.data(),
            .count = count,
            .logits = LogitsRows::kAll,
            .adapter = adapter}},
          logits.data());
  return logits;
}

Floats observed(const Model& model, const std::vector<int32_t>& tokens, const Adapter* adapter, Watcher::See see) {
  Floats logits(tokens.size() * static_cast<size_t>(model.config().outputs()));
  Watcher watcher(std::move(see));
  ObservedSequence(model, tokens, adapter, {}).run(watcher, LogitsRows::kAll, logits.data());
  return logits;
}

int64_t width_of(const ModelConfig& config, Site site) {
  switch (site) {
    case Site::kQ:
    case Site::kRotatedQ:
    case Site::kAttended:
      return config.q_size();
    case Site::kK:
    case Site::kV:
    case Site::kRotatedK:
      return config.kv_size();
    case Site::kGate:
    case Site::kUp:
    case Site::kActivation:
      return config.ffn_width;
    default:
      return config.width;
  }
}

const std::vector<int32_t> kTokens = {3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9, 7, 9, 32};

void test_looking_changes_no_bit(const Model& model, const Adapter* adapter) {
  const Floats expected = ordinary(model, kTokens, adapter);
  std::set<std::pair<Site, int64_t>> seen;
  Floats last;
  const Floats got = observed(model, kTokens, adapter, [&](Site site, int64_t layer, const TensorView& values) {
    seen.emplace(site, layer);
    CHECK(values.rows() == 15 && values.inner_size() == width_of(model.config(), site));
    if (site == Site::kResidualAfter) last.assign(values.f32(), values.f32() + values.size());
    return values.rows() % 2 == 1;  // it says that it wrote, and wrote the same
  });
  CHECK(same_bits(got, expected));
  CHECK(seen.size() == 2 + 16 * static_cast<size_t>(model.config().layers));
  Floats read(expected.size());
  read_out(model, last.data(), 15, read.data());
  CHECK(same_bits(read, expected));
  read_out(model, last.data(), 0, read.data());
}

/// Rows before the changed one keep their bits, wherever it was changed; the changed one does not.
void test_a_change_stays_in_its_row(const Model& model, const Adapter* adapter) {
  const Floats expected = observed(model, kTokens, adapter, [](Site, int64_t, const TensorView&) { return false; });
  const size_t outputs = static_cast<size_t>(model.config().outputs());
  const size_t row = 11;
  for (int i = 0; i < kSiteCount; ++i) {
    const Site place = static_cast<Site>(i);
    const Floats got = observed(model, kTokens, adapter, [&](Site site, int64_t layer, const TensorView& values) {
      if (site != place || layer != 0) return false;
      values.slice_rows(static_cast<int64_t>(row), 1).f32()[1] += 0.5f;
      return true;
    });
    CHECK(std::memcmp(got.data(), expected.data(), row * outputs * sizeof(float)) == 0);
    CHECK(std::memcmp(got.data() + row * outputs, expected.data() + row * outputs, outputs * sizeof(float)) != 0);
  }
}

/// Copies from inside end as runs of the whole sequence do, side by side and wherever they begin.
void test_copies_begin_inside(const Model& model, const Adapter* adapter) {
  const size_t outputs = static_cast<size_t>(model.config().outputs());
  ObservedSequence sequence(model, kTokens, adapter, {1, 0});
  Watcher blind([](Site, int64_t, const TensorView&) { return false; });
  Floats whole(kTokens.size() * outputs);
  sequence.run(blind, LogitsRows::kAll, whole.data());
  for (const int64_t layer : {0, 1}) {
    Floats last(3 * outputs);
    sequence.run_from(layer, {14, 0, 7}, blind, LogitsRows::kLast, last.data());
    Floats all((1 + 15 + 8) * outputs);
    Watcher changes([&](Site site, int64_t at, const TensorView& values) {
      if (site != Site::kV || at != 1) return false;
      CHECK(values.rows() == 1 + 15 + 8);
      values.slice_rows(1, 1).f32()[0] += 0.5f;  // of the second copy
      return true;
    });
    sequence.run_from(layer, {14, 0, 7}, changes, LogitsRows::kAll, all.data());
    const size_t bytes = outputs * sizeof(float);
    const float* end = whole.data() + 14 * outputs;
    for (size_t copy = 0; copy < 3; ++copy) CHECK(std::memcmp(last.data() + copy * outputs, end, bytes) == 0);
    CHECK(std::memcmp(all.data(), end, bytes) == 0);
    CHECK(std::memcmp(all.data() + outputs, whole.data(), bytes) != 0);
    CHECK(std::memcmp(all.data() + 16 * outputs, whole.data() + 7 * outputs, 8 * bytes) == 0);
  }
}

void test_what_an_observer_throws_ends_the_pass(const Model& model) {
  bool caught = false;
  try {
    observed(model, kTokens, nullptr, [](Site site, int64_t layer, const TensorView&) -> bool {
      if (site == Site::kActivation && layer == 1) throw std::runtime_error("enough");
      return false;
    });
  } catch (const std::runtime_error& error) {
    caught = std::string_view(error.what()) == "enough";
  }
  CHECK(caught);
}

}  // namespace

void test_observer() {
  for (int i = 0; i < kSiteCount; ++i) CHECK(site_from_name(name_of(static_cast<Site>(i))) == static_cast<Site>(i));
  CHECK_ERROR(ErrorKind::kOption, "no site 'nowhere'", site_from_name("nowhere"));
  for (const bool is_reference : {false, true}) {
    const std::shared_ptr<Backend> backend = is_reference ? make_reference_backend() : make_cpu_backend(2);
    const auto joined = make_model(backend, 0, /*separate_gate_up=*/false);
    const auto apart = make_model(backend, 0);
    const auto adapter = make_adapter(*apart);
    for (const auto& [model, added] : std::vector<std::pair<const Model*, const Adapter*>>{
             {joined.get(), nullptr}, {apart.get(), nullptr}, {apart.get(), adapter.get()}}) {
      // The reference rounds a fused step once, and its parts one by one.
      if (!is_reference) {
        test_looking_changes_no_bit(*model, added);
        test_copies_begin_inside(*model, added);
      }
      test_a_change_stays_in_its_row(*model, added);
    }
    test_what_an_observer_throws_ends_the_pass(*joined);
    CHECK_ERROR(ErrorKind::kOption, "without a token",
                observed(*joined, {}, nullptr, [](Site, int64_t, const TensorView&) { return false; }));
    CHECK_ERROR(ErrorKind::kContextLength, "allows 1 to 70",
                observed(*joined, std::vector<int32_t>(71, 1), nullptr,
                         [](Site, int64_t, const TensorView&) { return false; }));
    CHECK_ERROR(ErrorKind::kUnsupported, "separate",
                observed(*joined, kTokens, adapter.get(), [](Site, int64_t, const TensorView&) { return false; }));
  }
}

}  // namespace llama_ext::test
