#include "model/observer.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace llama_ext {
namespace {

constexpr std::array<std::string_view, kSiteCount> kNames = {"embedding",
                                                             "residual_before",
                                                             "attention_norm",
                                                             "q",
                                                             "k",
                                                             "v",
                                                             "rotated_q",
                                                             "rotated_k",
                                                             "attended",
                                                             "attention_out",
                                                             "residual_middle",
                                                             "feed_forward_norm",
                                                             "gate",
                                                             "up",
                                                             "activation",
                                                             "feed_forward_out",
                                                             "residual_after",
                                                             "final_norm"};

}  // namespace

std::string_view name_of(Site site) { return kNames[static_cast<size_t>(site)]; }

Site site_from_name(std::string_view name) {
  const auto* found = std::find(kNames.begin(), kNames.end(), name);
  require(found != kNames.end(), ErrorKind::kOption, "forward: there is no site '", name, "' in a pass");
  return static_cast<Site>(found - kNames.begin());
}

bool Observation::wants_any(int64_t layer, Site first, Site last) const {
  for (int site = static_cast<int>(first); site <= static_cast<int>(last); ++site) {
    if (wants(static_cast<Site>(site), layer)) return true;
  }
  return false;
}

std::vector<RowRun> Observation::show(Site site, int64_t layer, const TensorView& values) {
  if (!observer_.wants(site, layer)) return {};
  const int64_t width = values.inner_size();
  const size_t nbytes = static_cast<size_t>(values.size()) * sizeof(float);
  TensorView whole = values;
  if (!values.is_contiguous()) {
    if (compact_ == nullptr || compact_->nbytes() < nbytes) compact_ = backend_.allocate(nbytes);
    whole = TensorView(compact_->data(), DType::kF32, {values.rows(), width});
    backend_.copy(whole, values);
  }
  host_.resize(static_cast<size_t>(values.size()));
  backend_.copy_to_host(host_.data(), whole.data(), nbytes);
  backend_.synchronize();
  before_ = host_;
  if (!observer_.show(site, layer, TensorView(host_.data(), DType::kF32, {values.rows(), width}))) return {};
  backend_.copy_to_device(whole.data(), host_.data(), nbytes);
  if (whole.data() != values.data()) backend_.copy(values, whole);
  backend_.synchronize();  // the next values take the place of these in host memory

  std::vector<RowRun> changed;
  for (int64_t row = 0; row < values.rows(); ++row) {
    // Bits, not numbers: a zero that changes its sign is a change, a NaN that stays is none.
    if (std::memcmp(host_.data() + row * width, before_.data() + row * width,
                    static_cast<size_t>(width) * sizeof(float)) == 0)
      continue;
    if (!changed.empty() && changed.back().begin + changed.back().count == row) {
      ++changed.back().count;
    } else {
      changed.push_back({.begin = row, .count = 1});
    }
  }
  return changed;
}

}  // namespace llama_ext
