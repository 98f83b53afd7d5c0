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

// A lane's four codes of a quad, as one number: byte i is k = 4 quad + i.
uint32_t load_quad(const uint8_t* from) {
  uint32_t quad = 0;
  std::memcpy(&quad, from, sizeof quad);
  return quad;
}
void store_quad(uint8_t* to, uint32_t quad) { std::memcpy(to, &quad, sizeof quad); }

constexpr int64_t kQuadBytes = 4 * kPanel;        // a quad of all columns
constexpr int64_t kNibbleBytes = 4 * kQuadBytes;  // the nibbles of a strip
constexpr uint32_t kEach = 0x01010101u;

/// One lane of a strip: 32 codes. strip: its first byte for this lane.
void store_strip(int bits, uint8_t* strip, const uint8_t* codes) {
  if (bits == 8) {
    for (int64_t quad = 0; quad < 8; ++quad) store_quad(strip + quad * kQuadBytes, load_quad(codes + 4 * quad));
    return;
  }
  for (int64_t pair = 0; pair < 4; ++pair) {
    const uint32_t low = load_quad(codes + 8 * pair) & 15u * kEach;
    const uint32_t high = load_quad(codes + 8 * pair + 4) & 15u * kEach;
    store_quad(strip + pair * kQuadBytes, low | high << 4);
  }
  const int width = bits - 4;  // of what does not fit into nibbles
  const int per_byte = width == 1 ? 8 : 4;
  for (int first = 0; width > 0 && first < 8; first += per_byte) {
    uint32_t packed = 0;
    for (int i = 0; i < per_byte; ++i) {
      const uint32_t rest = load_quad(codes + 4 * (first + i)) >> 4 & ((1u << width) - 1u) * kEach;
      packed |= rest << (width * i);
    }
    store_quad(strip + kNibbleBytes + first / per_byte * kQuadBytes, packed);
  }
}

void load_strip(int bits, const uint8_t* strip, uint8_t* codes) {
  if (bits == 8) {
    for (int64_t quad = 0; quad < 8; ++quad) store_quad(codes + 4 * quad, load_quad(strip + quad * kQuadBytes));
    return;
  }
  const int width = bits - 4;
  const int per_byte = width == 1 ? 8 : 4;
  for (int quad = 0; quad < 8; ++quad) {
    uint32_t code = load_quad(strip + quad / 2 * kQuadBytes) >> (quad % 2 * 4) & 15u * kEach;
    if (width > 0) {
      const uint32_t packed = load_quad(strip + kNibbleBytes + quad / per_byte * kQuadBytes);
      code |= (packed >> (width * (quad % per_byte)) & ((1u << width) - 1u) * kEach) << 4;
    }
    store_quad(codes + 4 * quad, code);
  }
}

/// Calls visit(unit's first byte, index of the unit, its groups with scales of their own) and strip(its first byte for the lane,
/// its first k) for a row of a quantised panel.
template <typename Unit, typename Strip>
void visit_row(const CodeFormat& format, const WeightType& type, int64_t k_padded, int64_t lane, const Unit& visit,
               const Strip& strip) {
  const int64_t unit = type.unit();
  const int64_t subs = format.has_superblocks ? unit / format.group : 0;
  for (int64_t u = 0; u < k_padded / unit; ++u) {
    const int64_t begin = u * format.unit_bytes(type.group);
    visit(begin, u, subs);
    for (int64_t k = 0; k < unit; k += kStrip) {
      strip(begin + format.header_bytes() + k / kStrip * format.strip_bytes() + 4 * lane, u * unit + k);
    }
  }
}

/// Bytes of one head's keys and values, then of their scales.
struct HeadBytes {
  int64_t elements;
  int64_t scales;
};

HeadBytes head_bytes(const KvCacheShape& shape) {
  const int64_t positions = round_up(shape.capacity, kPanel);
  const int64_t key_dim =
      shape.dtype == DType::kF32 ? shape.head_dim : checked_add(shape.head_dim, 1, "KV cache") / 2 * 2;
  const int64_t per_position = checked_add(key_dim, round_up(shape.head_dim, kPanel), "KV cache");
  const int64_t elements = checked_mul(positions, per_position, "KV cache");
  const int64_t scales = shape.dtype == DType::kI8 ? checked_mul(positions, 2 * sizeof(float), "KV cache") : 0;
  return {checked_mul(elements, static_cast<int64_t>(size_of(shape.dtype)), "KV cache"), scales};
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
      [&](int64_t strip, int64_t k) { store_strip(format.bits, bytes + strip, &from.codes[static_cast<size_t>(k)]); });
}

void PanelMatrix::load_row(int64_t row, QuantizedRow& to) const {
  const CodeFormat& format = kCodeFormats[code_index(type().encoding)];
  const int64_t lane = row % kPanel;
  const auto* bytes = panel<uint8_t>(row / kPanel);
  to.resize(type(), cols());
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
      [&](int64_t strip, int64_t k) { load_strip(format.bits, bytes + strip, &to.codes[static_cast<size_t>(k)]); });
}

PanelKvCache::PanelKvCache(const KvCacheShape& shape)
    : KvCache(shape),
      positions_(round_up(shape.capacity, kPanel)),
      scales_at_(head_bytes(shape).elements),
      head_bytes_(scales_at_ + head_bytes(shape).scales),
      buffer_(static_cast<size_t>(nbytes_for(shape)), "the KV cache") {}

int64_t PanelKvCache::nbytes_for(const KvCacheShape& shape) {
  const int64_t heads = checked_mul(shape.layers, shape.kv_heads, "KV cache");
  const HeadBytes bytes = head_bytes(shape);
  return checked_mul(heads, checked_add(bytes.elements, bytes.scales, "KV cache"), "KV cache");
}

}  // namespace llama_ext
