#include "model/decode_loop.h"

#include <algorithm>
#include <bit>
#include <unordered_set>
#include <utility>

#include "backend/range.h"
#include "core/checked.h"

namespace llama_ext {
namespace {

// A recording is good for this many positions at least, and then for twice as many each time.
constexpr int64_t kLeastLimit = 256;
constexpr int64_t kLeastAhead = 64;

// Angles are computed for so many positions at a time: few, as the host does it while the device works.
constexpr int64_t kAngleBlock = 64;

std::vector<SampleSeat> sample_seats(const std::vector<DecodeSeat>& seats) {
  std::vector<SampleSeat> all;
  std::unordered_set<const KvCache*> caches;
  for (const DecodeSeat& seat : seats) {
    require(seat.cache != nullptr && seat.sample.position >= 0, ErrorKind::kInternal,
            "decode loop: a sequence needs a cache, and a position of at least 0");
    require(caches.insert(seat.cache).second, ErrorKind::kInternal, "decode loop: two sequences have one cache");
    all.push_back(seat.sample);
  }
  return all;
}

}  // namespace

DecodeLoop::DecodeLoop(std::shared_ptr<const Model> model, const SamplingOptions& options,
                       std::vector<DecodeSeat> seats)
    : model_(std::move(model)),
      seats_(std::move(seats)),
      state_(model_->backend(), options, sample_seats(seats_), model_->config().vocabulary, kMostInFlight) {
  require(!seats_.empty() && this->seats() <= kMostSeats, ErrorKind::kInternal, "decode loop: between 1 and ",
          kMostSeats, " sequences can decode together, got ", this->seats());
  for (int64_t i = 0; i < kMostInFlight; ++i) marks_.push_back(model_->backend().recorder()->create_mark());
}

DecodeLoop::~DecodeLoop() {
  try {
    model_->backend().synchronize();
  } catch (...) {  // NOLINT(bugprone-empty-catch): whoever asks the device next is told
  }
}

/// Makes a recording that is good for the next tokens at least, positions [0, needed) among them.
void DecodeLoop::record(int64_t needed) {
  const Range range(model_->backend(), "record decode ", seats(), seats() == 1 ? " row" : " rows");
  int64_t capacity = 0;
  for (const DecodeSeat& seat : seats_) capacity = std::max(capacity, seat.cache->shape().capacity);
  const auto wanted = static_cast<uint64_t>(checked_add(needed, kLeastAhead, "decode loop"));
  const int64_t limit = std::min(capacity, std::max(kLeastLimit, static_cast<int64_t>(std::bit_ceil(wanted))));

  if (before_.recording != nullptr) model_->backend().synchronize();
  Recorded next;
  next.limit = limit;
  next.workspace = make_workspace(*model_, {.rows = seats(), .head_rows = seats(), .angles = limit});
  next.has_angles.assign(static_cast<size_t>(ceil_div(limit, kAngleBlock)), false);
  for (int64_t i = 0; i < seats(); ++i) {
    const DecodeSeat& seat = seats_[static_cast<size_t>(i)];
    next.workspace.whole.segments.push_back(
        {.cache = seat.cache,
         .row = i,
         .tokens = 1,
         .position = std::min(limit, seat.cache->shape().capacity) - 1,
         .live_position = static_cast<const int32_t*>(state_.args().positions.data()) + i});
  }
  next.recording = model_->backend().recorder()->record([&] { run(next.workspace); });
  // Nobody waits: the old one is kept while it may run.
  before_ = std::move(now_);
  before_pushed_ = pushed_;
  now_ = std::move(next);
}

/// One token of every sequence.
void DecodeLoop::run(const Workspace& workspace) {
  const Pass& pass = workspace.whole;
  Backend& backend = model_->backend();
  backend.embedding(
      {.ids = state_.args().tokens, .table = &model_->weights().embedding(), .y = pass.x, .live_ids = true});
  for (int64_t layer = 0; layer < model_->config().layers; ++layer) block(*model_, layer, pass);
  MatmulArgs head;
  head.x = pass.x;
  head.norm = input_norm(*model_, model_->weights().final_norm());
  head.weight = &model_->weights().head();
  head.y = workspace.head;
  head.compute = model_->compute();
  backend.matmul(head);
  SampleNextArgs sampling = state_.args();
  sampling.logits = workspace.head;
  backend.recorder()->sample_next(sampling);
}

/// Angles of the positions that run next, where they are not there yet.
void DecodeLoop::prepare_angles() {
  const int64_t half = model_->config().head_dim / 2;
  for (const DecodeSeat& seat : seats_) {
    const int64_t block = (seat.sample.position + pushed_) / kAngleBlock;
    if (now_.has_angles[static_cast<size_t>(block)]) continue;
    const int64_t first = block * kAngleBlock;
    const int64_t count = std::min(kAngleBlock, now_.limit - first);
    std::vector<int64_t> positions(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) positions[static_cast<size_t>(i)] = first + i;
    const auto size = static_cast<size_t>(count * half);
    std::vector<float>& angles = now_.angles.emplace_back(2 * size);  // kept: the copies are not waited for
    rope_angles(model_->config().rope, model_->inverse_frequencies(), positions.data(), count, angles.data(),
                angles.data() + size);
    const Pass& pass = now_.workspace.whole;
    model_->backend().copy_to_device(pass.cos.row<float>(first), angles.data(), size * sizeof(float));
    model_->backend().copy_to_device(pass.sin.row<float>(first), angles.data() + size, size * sizeof(float));
    now_.has_angles[static_cast<size_t>(block)] = true;
  }
}

void DecodeLoop::push() {
  require(in_flight() < kMostInFlight, ErrorKind::kInternal, "decode loop: too many tokens are in flight");
  int64_t needed = 0;
  for (const DecodeSeat& seat : seats_) {
    const int64_t position = seat.sample.position + pushed_;
    require(position < seat.cache->shape().capacity, ErrorKind::kContextLength, "decode loop: position ", position,
            " does not fit into the KV cache's ", seat.cache->shape().capacity, " positions");
    needed = std::max(needed, position + 1);
  }
  if (needed > now_.limit) record(needed);
  prepare_angles();
  {
    const Range range(model_->backend(), "replay decode ", seats(), seats() == 1 ? " row" : " rows");
    now_.recording->replay();
  }
  marks_[static_cast<size_t>(pushed_ % kMostInFlight)]->set();
  ++pushed_;
}

std::span<const DecodeResult> DecodeLoop::fetch() {
  require(in_flight() > 0, ErrorKind::kInternal, "decode loop: nothing is in flight");
  const int64_t slot = fetched_ % kMostInFlight;
  marks_[static_cast<size_t>(slot)]->wait();
  ++fetched_;
  if (before_.recording != nullptr && fetched_ >= before_pushed_) before_ = {};
  return {state_.results(slot), static_cast<size_t>(seats())};
}

}  // namespace llama_ext
