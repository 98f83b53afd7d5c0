#include "model/decode_loop.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <set>
#include <utility>

#include "core/checked.h"

namespace llama_ext {
namespace {

// A recording is good for this many positions at least, and then for twice as many each time.
constexpr int64_t kLeastLimit = 256;
constexpr int64_t kLeastAhead = 64;

// Angles are computed for so many positions at a time: few, as the host does it while the device works.
constexpr int64_t kAngleBlock = 64;

constexpr int64_t kAlignment = 256;

}  // namespace

bool DecodeLoop::is_possible(const Model& model, const SamplingOptions& options) {
  if (model.backend().recorder() == nullptr) return false;
  // Biases of one token are added one after the other; here a token has one.
  std::set<int32_t> tokens;
  for (const auto& [token, bias] : options.logit_bias) tokens.insert(token);
  return tokens.size() == options.logit_bias.size();
}

DecodeLoop::DecodeLoop(std::shared_ptr<const Model> model, const SamplingOptions& options,
                       std::vector<DecodeSeat> seats)
    : model_(std::move(model)), recorder_(*model_->backend().recorder()), options_(options), seats_(std::move(seats)) {
  require(!seats_.empty() && this->seats() <= kMostSeats, ErrorKind::kInternal, "decode loop: between 1 and ",
          kMostSeats, " sequences can decode together, got ", this->seats());
  results_ = recorder_.allocate_visible(static_cast<size_t>(kMostInFlight * this->seats()) * sizeof(DecodeResult));
  for (int64_t i = 0; i < kMostInFlight; ++i) marks_.push_back(recorder_.create_mark());
  make_state(options_);
}

DecodeLoop::~DecodeLoop() {
  try {
    model_->backend().synchronize();
  } catch (...) {  // NOLINT(bugprone-empty-catch): whoever asks the device next is told
  }
}

void DecodeLoop::make_state(const SamplingOptions& options) {
  const int64_t vocabulary = model_->config().vocabulary;
  int64_t end = 0;
  const auto region = [&end](int64_t count, size_t each) {
    const int64_t begin = end;
    end = checked_add(
        end, round_up(checked_mul(count, static_cast<int64_t>(each), "decode loop"), kAlignment), "decode loop");
    return begin;
  };
  const bool has_bias = !options.logit_bias.empty();
  const bool has_occurrences = has_penalties(options);
  const int64_t tokens = region(seats(), sizeof(int32_t));
  const int64_t positions = region(seats(), sizeof(int32_t));
  const int64_t rows = region(seats(), sizeof(DecodeRow));
  const int64_t bias = region(has_bias ? vocabulary : 0, sizeof(float));
  const int64_t occurrences = region(has_occurrences ? checked_mul(seats(), vocabulary, "decode loop") : 0, 4);

  first_state_.assign(static_cast<size_t>(end), 0);
  const auto put = [this](int64_t region_begin, int64_t index, const auto& value) {
    std::memcpy(first_state_.data() + region_begin + index * static_cast<int64_t>(sizeof value), &value, sizeof value);
  };
  for (int64_t i = 0; i < seats(); ++i) {
    const DecodeSeat& seat = seats_[static_cast<size_t>(i)];
    require(seat.cache != nullptr && seat.position >= 0 && seat.position < seat.cache->shape().capacity,
            ErrorKind::kContextLength, "decode loop: a token at position ", seat.position, " does not fit its KV cache");
    check_token_ids(&seat.token, 1, vocabulary);
    put(tokens, i, seat.token);
    put(positions, i, static_cast<int32_t>(seat.position));
    DecodeRow row;
    row.key = seat.key;
    put(rows, i, row);
    if (!has_occurrences) continue;
    auto* counts = reinterpret_cast<int32_t*>(first_state_.data() + occurrences) + i * vocabulary;
    if (seat.prompt != nullptr) {
      check_token_ids(seat.prompt->data(), static_cast<int64_t>(seat.prompt->size()), vocabulary);
      for (int32_t token : *seat.prompt) counts[token] = kInPrompt;
    }
    if (seat.output != nullptr) {
      for (int32_t token : *seat.output) ++counts[token];
    }
  }
  for (const auto& [token, value] : options.logit_bias) put(bias, token, value);

  state_ = model_->backend().allocate(first_state_.size());
  auto* base = static_cast<unsigned char*>(state_->data());
  model_->backend().copy_to_device(base, first_state_.data(), first_state_.size());
  sampling_.options = &options_;
  sampling_.tokens = TensorView(base + tokens, DType::kI32, {seats()});
  sampling_.positions = TensorView(base + positions, DType::kI32, {seats()});
  sampling_.rows = reinterpret_cast<DecodeRow*>(base + rows);
  sampling_.results = static_cast<DecodeResult*>(results_->data());
  sampling_.slots = kMostInFlight;
  if (has_bias) sampling_.bias = TensorView(base + bias, DType::kF32, {vocabulary});
  if (has_occurrences) sampling_.occurrences = TensorView(base + occurrences, DType::kI32, {seats(), vocabulary});
}

/// Makes a recording that is good for the next tokens at least, positions [0, needed) among them.
void DecodeLoop::record(int64_t needed) {
  int64_t capacity = 0;
  for (const DecodeSeat& seat : seats_) capacity = std::max(capacity, seat.cache->shape().capacity);
  const auto wanted = static_cast<uint64_t>(checked_add(needed, kLeastAhead, "decode loop"));
  const int64_t limit = std::min(capacity, std::max(kLeastLimit, static_cast<int64_t>(std::bit_ceil(wanted))));

  if (in_flight() > 0) model_->backend().synchronize();  // the old one may still run
  recording_.reset();
  limit_ = 0;
  workspace_ = {};
  workspace_ = make_workspace(*model_, {.rows = seats(), .head_rows = seats(), .angles = limit});
  angles_.clear();
  has_angles_.assign(static_cast<size_t>(ceil_div(limit, kAngleBlock)), false);
  Pass& pass = workspace_.whole;
  pass.segments.clear();
  for (int64_t i = 0; i < seats(); ++i) {
    const DecodeSeat& seat = seats_[static_cast<size_t>(i)];
    pass.segments.push_back({.cache = seat.cache,
                             .row = i,
                             .tokens = 1,
                             .position = std::min(limit, seat.cache->shape().capacity) - 1,
                             .live_position = static_cast<const int32_t*>(sampling_.positions.data()) + i});
  }
  sampling_.logits = workspace_.head;
  recording_ = recorder_.record([&] { run(pass); });
  limit_ = limit;
}

/// One token of every sequence.
void DecodeLoop::run(const Pass& pass) {
  Backend& backend = model_->backend();
  backend.embedding(
      {.ids = sampling_.tokens, .table = &model_->weights().embedding(), .y = pass.x, .live_ids = true});
  for (int64_t layer = 0; layer < model_->config().layers; ++layer) block(*model_, layer, pass);
  normalize(*model_, pass.x, model_->weights().final_norm(), pass.normed);
  MatmulArgs head;
  head.x = pass.normed;
  head.weight = &model_->weights().head();
  head.y = workspace_.head;
  head.compute = model_->compute();
  backend.matmul(head);
  recorder_.sample_next(sampling_);
}

/// Angles of the positions that run next, where they are not there yet.
void DecodeLoop::prepare_angles() {
  const int64_t half = model_->config().head_dim / 2;
  for (const DecodeSeat& seat : seats_) {
    const int64_t block = (seat.position + pushed_) / kAngleBlock;
    if (has_angles_[static_cast<size_t>(block)]) continue;
    const int64_t first = block * kAngleBlock;
    const int64_t count = std::min(kAngleBlock, limit_ - first);
    std::vector<int64_t> positions(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) positions[static_cast<size_t>(i)] = first + i;
    const auto size = static_cast<size_t>(count * half);
    std::vector<float>& angles = angles_.emplace_back(2 * size);  // kept: the copies are not waited for
    rope_angles(model_->config().rope, model_->inverse_frequencies(), positions.data(), count, angles.data(),
                angles.data() + size);
    const Pass& pass = workspace_.whole;
    model_->backend().copy_to_device(pass.cos.row<float>(first), angles.data(), size * sizeof(float));
    model_->backend().copy_to_device(pass.sin.row<float>(first), angles.data() + size, size * sizeof(float));
    has_angles_[static_cast<size_t>(block)] = true;
  }
}

void DecodeLoop::push() {
  require(in_flight() < kMostInFlight, ErrorKind::kInternal, "decode loop: too many tokens are in flight");
  int64_t needed = 0;
  for (const DecodeSeat& seat : seats_) {
    const int64_t position = seat.position + pushed_;
    require(position < seat.cache->shape().capacity, ErrorKind::kContextLength, "decode loop: position ", position,
            " does not fit into the KV cache's ", seat.cache->shape().capacity, " positions");
    needed = std::max(needed, position + 1);
  }
  if (needed > limit_) record(needed);
  prepare_angles();
  recording_->replay();
  marks_[static_cast<size_t>(pushed_ % kMostInFlight)]->set();
  ++pushed_;
}

std::span<const DecodeResult> DecodeLoop::fetch() {
  require(in_flight() > 0, ErrorKind::kInternal, "decode loop: nothing is in flight");
  const int64_t slot = fetched_ % kMostInFlight;
  marks_[static_cast<size_t>(slot)]->wait();
  ++fetched_;
  return {static_cast<const DecodeResult*>(results_->data()) + slot * seats(), static_cast<size_t>(seats())};
}

}  // namespace llama_ext
