#include "cpu/panels.h"

#include <cstring>
#include <utility>

namespace llama_ext {
namespace {

constexpr bool formats_match() {
  for (const EncodingInfo& info : kEncodings) {
    if (info.encoding < Encoding::kInt8) continue;
    const CodeFormat& format = kCodeFormats[code_index(info.encoding)];
    if (format.bits != info.bits || format.zero != info.zero || format.has_min != info.has_min ||
        format.group != info.group || format.has_superblocks != (info.superblock != 0)) {
      return false;
    }
  }
  return code_index(kEncodings.back().encoding) + 1 == kCodeFormatCount;
}
static_assert(formats_match(), "kCodeFormats must follow Encoding");

struct Measures {
  int64_t unit;
  int64_t unit_bytes;
  int64_t k_multiple;
};

Measures measures_of(WeightType type) {
  switch (type.encoding) {
    case Encoding::kF32:
      return {1, 4 * kPanel, 1};
    case Encoding::kF16:
      return {1, 2 * kPanel, 1};
    case Encoding::kBF16:
      return {2, 4 * kPanel, kPanel};
    default: {
      const CodeFormat& format = kCodeFormats[code_index(type.encoding)];
      return {type.unit(), format.unit_bytes(type.group), type.unit()};
    }
  }
}

/// Calls function(byte of the panel, shift, bits, bit of the code where they belong) for each part of the code of k of a lane.
template <typename Function>
void visit_code(const CodeFormat& format, int64_t strip, int64_t k, int64_t lane, const Function& function) {
  const int64_t quad = k / 4;
  const int64_t place = 4 * lane + k % 4;
  if (format.bits == 8) {
    function(strip + quad * 4 * kPanel + place, 0, 8, 0);
    return;
  }
  function(strip + quad / 2 * 4 * kPanel + place, static_cast<int>(quad % 2) * 4, 4, 0);
  const int64_t high = strip + 16 * kPanel;
  if (format.bits == 5) function(high + place, static_cast<int>(quad), 1, 4);
  if (format.bits == 6) function(high + quad / 4 * 4 * kPanel + place, static_cast<int>(quad % 4) * 2, 2, 4);
}

/// Calls codes(k, lane's strip offset), and header(kind, index in the row, byte offset) for a row of a quantised panel.
template <typename Header, typename Code>
void visit_row(const CodeFormat& format, const WeightType& type, int64_t k_padded, int64_t lane, const Header& header,
               const Code& code) {
  const int64_t unit = type.unit();
  const int64_t subs = format.has_superblocks ? unit / format.group : 0;
  for (int64_t u = 0; u < k_padded / unit; ++u) {
    const int64_t begin = u * format.unit_bytes(type.group);
    header(begin, u, subs);
    for (int64_t k = 0; k < unit; ++k) {
      const int64_t strip = begin + format.header_bytes() + k / kStrip * format.strip_bytes();
      visit_code(format, strip, k % kStrip, lane,
                 [&](int64_t byte, int shift, int bits, int to) { code(u * unit + k, byte, shift, bits, to); });
    }
  }
}

int64_t head_elements(const KvCacheShape& shape) {
  const int64_t per_position = checked_add(shape.head_dim, round_up(shape.head_dim, kPanel), "KV cache");
  return checked_mul(round_up(shape.capacity, kPanel), per_position, "KV cache");
}

}  // namespace

int64_t PanelMatrix::nbytes_for(int64_t rows, int64_t cols, WeightType type) {
  const Measures measures = measures_of(type);
  const int64_t padded = checked_add(cols, measures.k_multiple, "matrix") - 1;
  const int64_t panel =
      checked_mul(padded / measures.k_multiple * (measures.k_multiple / measures.unit), measures.unit_bytes, "matrix");
  return checked_mul(ceil_div(rows, kPanel), panel, "matrix");
}

PanelMatrix::PanelMatrix(int64_t rows, int64_t cols, WeightType type) : Matrix(rows, cols, type) {
  measure();
  buffer_ = std::make_unique<HostBuffer>(static_cast<size_t>(nbytes_for(rows, cols, type)), "a weight matrix");
  data_ = static_cast<const std::byte*>(buffer_->data());
}

PanelMatrix::PanelMatrix(int64_t rows, int64_t cols, WeightType type, std::span<const std::byte> packed,
                         std::shared_ptr<const void> owner)
    : Matrix(rows, cols, type), owner_(std::move(owner)), data_(packed.data()) {
  const int64_t expected = nbytes_for(rows, cols, type);
  require(static_cast<int64_t>(packed.size()) == expected, ErrorKind::kCheckpoint, "packed weights of shape ",
          shape_text({rows, cols}), " as ", type.text(), " take ", expected, " bytes, got ", packed.size());
  require(reinterpret_cast<uintptr_t>(packed.data()) % 64 == 0, ErrorKind::kCheckpoint,
          "packed weights must start on a cache line: at a multiple of 64 bytes");
  measure();
}

void PanelMatrix::measure() {
  const Measures measures = measures_of(type());
  unit_ = measures.unit;
  unit_bytes_ = measures.unit_bytes;
  k_padded_ = round_up(cols(), measures.k_multiple);
  panel_bytes_ = bytes_of(k_padded_);
}

void PanelMatrix::store_row(int64_t row, const QuantizedRow& from) {
  const CodeFormat& format = kCodeFormats[code_index(type().encoding)];
  const int64_t lane = row % kPanel;
  auto* bytes = panel<uint8_t>(row / kPanel);
  visit_row(
      format, type(), k_padded_, lane,
      [&](int64_t begin, int64_t unit, int64_t subs) {
        const size_t at = static_cast<size_t>(unit);
        std::memcpy(bytes + begin + 2 * lane, &from.scales[at], 2);
        if (format.has_min) std::memcpy(bytes + begin + 2 * (kPanel + lane), &from.mins[at], 2);
        for (int64_t s = 0; s < subs; ++s) {
          uint8_t* sub = bytes + begin + format.halves_bytes() + s * kPanel + lane;
          const size_t index = static_cast<size_t>(unit * subs + s);
          *sub = from.sub_scales[index];
          if (format.has_min) sub[format.sub_bytes()] = from.sub_mins[index];
        }
      },
      [&](int64_t k, int64_t byte, int shift, int bits, int to) {
        const unsigned mask = (1u << bits) - 1u;
        const unsigned part = from.codes[static_cast<size_t>(k)] >> to & mask;
        bytes[byte] = static_cast<uint8_t>((bytes[byte] & ~(mask << shift)) | part << shift);
      });
}

void PanelMatrix::load_row(int64_t row, QuantizedRow& to) const {
  const CodeFormat& format = kCodeFormats[code_index(type().encoding)];
  const int64_t lane = row % kPanel;
  const auto* bytes = panel<uint8_t>(row / kPanel);
  to.resize(type(), cols());
  to.codes.assign(to.codes.size(), 0);
  visit_row(
      format, type(), k_padded_, lane,
      [&](int64_t begin, int64_t unit, int64_t subs) {
        const size_t at = static_cast<size_t>(unit);
        std::memcpy(&to.scales[at], bytes + begin + 2 * lane, 2);
        if (format.has_min) std::memcpy(&to.mins[at], bytes + begin + 2 * (kPanel + lane), 2);
        for (int64_t s = 0; s < subs; ++s) {
          const uint8_t* sub = bytes + begin + format.halves_bytes() + s * kPanel + lane;
          const size_t index = static_cast<size_t>(unit * subs + s);
          to.sub_scales[index] = *sub;
          if (format.has_min) to.sub_mins[index] = sub[format.sub_bytes()];
        }
      },
      [&](int64_t k, int64_t byte, int shift, int bits, int place) {
        const unsigned part = static_cast<unsigned>(bytes[byte]) >> shift & ((1u << bits) - 1u);
        uint8_t& code = to.codes[static_cast<size_t>(k)];
        code = static_cast<uint8_t>(code | part << place);
      });
}

PanelKvCache::PanelKvCache(const KvCacheShape& shape)
    : KvCache(shape),
      positions_(round_up(shape.capacity, kPanel)),
      head_size_(head_elements(shape)),
      buffer_(static_cast<size_t>(nbytes_for(shape)), "the KV cache") {}

int64_t PanelKvCache::nbytes_for(const KvCacheShape& shape) {
  const int64_t heads = checked_mul(shape.layers, shape.kv_heads, "KV cache");
  const int64_t elements = checked_mul(heads, head_elements(shape), "KV cache");
  return checked_mul(elements, static_cast<int64_t>(size_of(shape.dtype)), "KV cache");
}

}  // namespace llama_ext
