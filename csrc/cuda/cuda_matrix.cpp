#include "cuda/cuda_matrix.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "core/checked.h"
#include "core/half.h"
#include "quant/quantized_row.h"

namespace llama_ext::cuda {
namespace {

enum PlaneIndex : size_t { kElements, kHigh, kScales, kMins, kSubScales, kSubMins };

Kind kind_of(Encoding encoding) {
  switch (encoding) {
    case Encoding::kF32:
      return Kind::kF32;
    case Encoding::kF16:
      return Kind::kF16;
    case Encoding::kBF16:
      return Kind::kBF16;
    case Encoding::kInt8:
    case Encoding::kInt8Min:
      return Kind::kQ8;
    case Encoding::kInt5:
    case Encoding::kInt5Min:
    case Encoding::kQ5K:
      return Kind::kQ5;
    case Encoding::kInt4:
    case Encoding::kInt4Min:
    case Encoding::kQ4K:
      return Kind::kQ4;
    case Encoding::kQ6K:
      return Kind::kQ6;
  }
  fail(ErrorKind::kInternal, "CUDA: unknown encoding");
}

template <typename T>
T read(const TensorView& source, int64_t index, int64_t k) {
  return source.row<const T>(index)[k];
}

float widened(const TensorView& source, int64_t index, int64_t k) {
  switch (source.dtype()) {
    case DType::kF32:
      return read<float>(source, index, k);
    case DType::kBF16:
      return bf16_to_f32(read<uint16_t>(source, index, k));
    case DType::kF16:
      return f16_to_f32(read<uint16_t>(source, index, k));
    default:
      return static_cast<float>(read<double>(source, index, k));
  }
}

uint16_t as_bf16(const TensorView& source, int64_t index, int64_t k) {
  if (source.dtype() == DType::kBF16) return read<uint16_t>(source, index, k);
  if (source.dtype() == DType::kF64) return f64_to_bf16(read<double>(source, index, k));
  return f32_to_bf16(widened(source, index, k));
}

uint16_t as_f16(const TensorView& source, int64_t index, int64_t k) {
  if (source.dtype() == DType::kF16) return read<uint16_t>(source, index, k);
  if (source.dtype() == DType::kF64) return f64_to_f16(read<double>(source, index, k));
  return f32_to_f16(widened(source, index, k));
}

}  // namespace

WeightView weight_layout(int64_t rows, int64_t cols, const WeightType& type) {
  require(rows >= 0 && cols >= 0, ErrorKind::kShape, "matrix: rows and columns must not be negative, got ",
          shape_text({rows, cols}));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;
  require(rows <= kMost && cols <= kMost, ErrorKind::kLimit, "matrix: ", shape_text({rows, cols}), " is out of range");
  const EncodingInfo& info = info_of(type.encoding);
  WeightView view;
  view.kind = kind_of(type.encoding);
  view.has_min = info.has_min;
  view.has_superblocks = info.superblock != 0;
  view.signed_sub_scales = type.encoding == Encoding::kQ6K;
  view.zero = info.zero;
  view.rows = static_cast<int>(rows);
  view.cols = static_cast<int>(cols);
  view.group = type.group;
  view.unit = type.is_quantized() ? static_cast<int>(type.unit()) : 0;
  view.stride = static_cast<int>(round_up(cols, std::max<int64_t>(kPad, view.unit)));
  int64_t end = checked_mul(rows, view.row_bytes(), "matrix");
  const auto add = [&](int64_t row_bytes) {
    const int64_t begin = round_up(end, 16);
    end = checked_add(begin, checked_mul(rows, row_bytes, "matrix"), "matrix");
    return begin;
  };
  if (type.is_quantized()) {
    view.high_at = add(int64_t{4} * (view.stride / kChunk) * view.planes());
    view.scales_at = add(int64_t{2} * view.units());
    view.mins_at = add(view.has_min ? int64_t{2} * view.units() : 0);
    view.sub_scales_at = add(view.has_superblocks ? view.groups() : 0);
    view.sub_mins_at = add(view.has_superblocks && view.has_min ? view.groups() : 0);
  }
  view.nbytes = end;
  return view;
}

std::array<Plane, kPlanes> planes_of(const WeightView& w) {
  if (!is_quantized(w.kind)) return {{{0, w.row_bytes()}, {}, {}, {}, {}, {}}};
  return {{{0, w.row_bytes()},
           {w.high_at, int64_t{4} * (w.stride / kChunk) * w.planes()},
           {w.scales_at, int64_t{2} * w.units()},
           {w.mins_at, w.has_min ? int64_t{2} * w.units() : 0},
           {w.sub_scales_at, w.has_superblocks ? w.groups() : 0},
           {w.sub_mins_at, w.has_superblocks && w.has_min ? w.groups() : 0}}};
}

CudaMatrix::CudaMatrix(const std::shared_ptr<Gpu>& gpu, int64_t rows, int64_t cols, WeightType type)
    : Matrix(rows, cols, type), gpu_(gpu), view_(weight_layout(rows, cols, type)) {
  view_.data = static_cast<unsigned char*>(gpu_->allocate(static_cast<size_t>(view_.nbytes), "a matrix"));
}

CudaMatrix::~CudaMatrix() { gpu_->release(data()); }

HostRows::HostRows(const WeightView& layout, int64_t rows) : layout_(layout), layout_planes_(planes_of(layout)) {
  for (size_t i = 0; i < kPlanes; ++i) planes_[i].resize(static_cast<size_t>(rows * layout_planes_[i].row_bytes));
}

void HostRows::store(int64_t row, const TensorView& source, int64_t index) {
  const int64_t cols = layout_.cols;
  unsigned char* to = at(kElements, row);
  if (layout_.kind == Kind::kF32) {
    auto* elements = reinterpret_cast<float*>(to);
    for (int64_t k = 0; k < cols; ++k) elements[k] = widened(source, index, k);
    return;
  }
  auto* elements = reinterpret_cast<uint16_t*>(to);
  if (layout_.kind == Kind::kBF16) {
    for (int64_t k = 0; k < cols; ++k) elements[k] = as_bf16(source, index, k);
  } else {
    for (int64_t k = 0; k < cols; ++k) elements[k] = as_f16(source, index, k);
  }
}

void HostRows::store(int64_t row, const QuantizedRow& codes) {
  unsigned char* to = at(kElements, row);
  if (layout_.kind == Kind::kQ8) {
    std::copy(codes.codes.begin(), codes.codes.end(), to);
  } else {
    auto* high = reinterpret_cast<uint32_t*>(at(kHigh, row));
    const int planes = layout_.planes();
    for (int chunk = 0; chunk < layout_.stride / kChunk; ++chunk) {
      const uint8_t* from = codes.codes.data() + chunk * kChunk;
      unsigned char* nibbles = to + chunk * 16;
      std::fill_n(nibbles, 16, static_cast<unsigned char>(0));
      for (int plane = 0; plane < planes; ++plane) high[chunk * planes + plane] = 0;
      for (int i = 0; i < kChunk; ++i) {
        nibbles[nibble_byte(i)] =
            static_cast<unsigned char>(nibbles[nibble_byte(i)] | (from[i] & 15) << nibble_shift(i));
        for (int plane = 0; plane < planes; ++plane) {
          high[chunk * planes + plane] |= static_cast<uint32_t>(from[i] >> (4 + plane) & 1) << i;
        }
      }
    }
  }
  const auto copy = [&](size_t plane, const auto& from) {
    if (layout_planes_[plane].row_bytes > 0) {
      std::memcpy(at(plane, row), from.data(), static_cast<size_t>(layout_planes_[plane].row_bytes));
    }
  };
  copy(kScales, codes.scales);
  copy(kMins, codes.mins);
  copy(kSubScales, codes.sub_scales);
  copy(kSubMins, codes.sub_mins);
}

void HostRows::load(int64_t row, const WeightType& type, QuantizedRow& codes) const {
  codes.resize(type, layout_.cols);
  const unsigned char* from = at(kElements, row);
  if (layout_.kind == Kind::kQ8) {
    std::copy_n(from, layout_.stride, codes.codes.begin());
  } else {
    const auto* high = reinterpret_cast<const uint32_t*>(at(kHigh, row));
    const int planes = layout_.planes();
    for (int k = 0; k < layout_.stride; ++k) {
      const int i = k % kChunk;
      uint32_t code = static_cast<uint32_t>(from[k / kChunk * 16 + nibble_byte(i)] >> nibble_shift(i)) & 15u;
      for (int plane = 0; plane < planes; ++plane) {
        code |= (high[k / kChunk * planes + plane] >> i & 1u) << (4 + plane);
      }
      codes.codes[static_cast<size_t>(k)] = static_cast<uint8_t>(code);
    }
  }
  const auto copy = [&](size_t plane, auto& to) {
    if (layout_planes_[plane].row_bytes > 0) {
      std::memcpy(to.data(), at(plane, row), static_cast<size_t>(layout_planes_[plane].row_bytes));
    }
  };
  copy(kScales, codes.scales);
  copy(kMins, codes.mins);
  copy(kSubScales, codes.sub_scales);
  copy(kSubMins, codes.sub_mins);
}

void HostRows::load(int64_t row, float* out) const {
  const unsigned char* from = at(kElements, row);
  for (int64_t k = 0; k < layout_.cols; ++k) {
    out[k] = layout_.kind == Kind::kF32    ? reinterpret_cast<const float*>(from)[k]
             : layout_.kind == Kind::kBF16 ? bf16_to_f32(reinterpret_cast<const uint16_t*>(from)[k])
                                           : f16_to_f32(reinterpret_cast<const uint16_t*>(from)[k]);
  }
}

const unsigned char* HostRows::bytes(int64_t row) const { return at(kElements, row); }

}  // namespace llama_ext::cuda
