// The structures of DLPack, by which libraries hand arrays to each other without copying them, and what dtypes are in it. Written after
// the specification of its version 1.0: dmlc.github.io/dlpack/latest.
#pragma once

#include <cstdint>
#include <string_view>

namespace llama_ext::dlpack {

inline constexpr int32_t kCpu = 1;
inline constexpr int32_t kCuda = 2;
inline constexpr int32_t kCudaHost = 3;  // page-locked memory of the host

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null for C-contiguous
  uint64_t byte_offset;
};

/// In a capsule named "dltensor".
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor* self);
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

inline constexpr Version kVersion{1, 0};
inline constexpr uint64_t kReadOnly = 1;
inline constexpr uint64_t kIsCopied = 2;

/// In a capsule named "dltensor_versioned".
struct VersionedTensor {
  Version version;
  void* context;
  void (*deleter)(VersionedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

inline constexpr const char* kName = "dltensor";
inline constexpr const char* kUsedName = "used_dltensor";
inline constexpr const char* kVersionedName = "dltensor_versioned";
inline constexpr const char* kUsedVersionedName = "used_dltensor_versioned";

/// An element type that arrays of a device may have.
struct ElementType {
  std::string_view name;
  const char* numpy;  // bfloat16 comes as its bits
  uint8_t code;
  uint8_t size;
};

inline constexpr ElementType kElementTypes[] = {
    {"float32", "float32", 2, 4}, {"float16", "float16", 2, 2}, {"bfloat16", "uint16", 4, 2},
    {"float64", "float64", 2, 8}, {"int32", "int32", 0, 4},     {"int64", "int64", 0, 8},
    {"int8", "int8", 0, 1},       {"uint8", "uint8", 1, 1},
};

}  // namespace llama_ext::dlpack
