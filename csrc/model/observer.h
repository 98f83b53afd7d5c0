// What may look into a forward pass, and change what it finds there.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "backend/backend.h"

namespace llama_ext {

/// The places where a pass shows its values, in the order of computation, and the width of a row there.
enum class Site : uint8_t {
  kEmbedding,        // C; belongs to no layer, as kFinalNorm: layer is 0
  kResidualBefore,   // C: what the block reads
  kAttentionNorm,    // C: times the norm's weight
  kQ,                // H D
  kK,                // K D
  kV,                // K D
  kRotatedQ,         // H D
  kRotatedK,         // K D
  kAttended,         // H D
  kAttentionOut,     // C: what attention adds to the residual stream
  kResidualMiddle,   // C
  kFeedForwardNorm,  // C
  kGate,             // F: before silu
  kUp,               // F
  kActivation,       // F: silu(gate) * up
  kFeedForwardOut,   // C: what the feed-forward part adds to the residual stream
  kResidualAfter,    // C
  kFinalNorm,        // C
};
inline constexpr int kSiteCount = 18;

/// All but the first and the last, whose layer is 0.
constexpr bool is_of_a_layer(Site site) { return site != Site::kEmbedding && site != Site::kFinalNorm; }

std::string_view name_of(Site site);
/// Throws OptionError for a name that is none.
Site site_from_name(std::string_view name);

/// Is called by the thread that runs the pass.
class Observer {
 public:
  virtual ~Observer() = default;
  /// Whether `show` is to be called there. Values that an ordinary pass does not make are made for this alone.
  virtual bool wants(Site site, int64_t layer) const = 0;
  /// values: (M, the site's width) f32 in host memory, contiguous, a copy: whatever device computes. Returns whether it wrote to them;
  /// the pass goes on with what it wrote then. Throws what it likes, which ends the pass.
  virtual bool show(Site site, int64_t layer, const TensorView& values) = 0;
};

/// Rows [begin, begin + count).
struct RowRun {
  int64_t begin = 0;
  int64_t count = 0;
};

/// Brings the values of a pass from its device to an observer, and back.
class Observation {
 public:
  Observation(Backend& backend, Observer& observer) : backend_(backend), observer_(observer) {}

  bool wants(Site site, int64_t layer) const { return observer_.wants(site, layer); }
  /// Whether there is anything to show between two sites of a layer, these included.
  bool wants_any(int64_t layer, Site first = Site::kResidualBefore, Site last = Site::kResidualAfter) const;
  /// values: of the device, (M, N) f32, rows may be strided. Returns which rows were changed.
  std::vector<RowRun> show(Site site, int64_t layer, const TensorView& values);

 private:
  Backend& backend_;
  Observer& observer_;
  std::vector<float> host_;
  std::vector<float> before_;
  std::unique_ptr<Buffer> compact_;  // the device's: strided rows one after the other, as copies to the host want them
};

}  // namespace llama_ext
