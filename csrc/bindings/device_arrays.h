// Arrays in host memory as the operations of any backend take them.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "backend/backend.h"

namespace llama_ext {

/// The views of one operation's arguments. Where the backend follows host pointers they stay as they are, and so do those of DeviceArrays
/// on its device; elsewhere each becomes a view of a copy on the device, and what the operation writes is copied back. Arrays that share memory share it there too, so that
/// an operation sees the same aliasing.
class DeviceArrays {
 public:
  explicit DeviceArrays(Backend& backend) : backend_(backend) {}

  /// Throws DeviceError for an array of another device.
  DeviceArrays& reads(TensorView& view) { return add(view, false); }
  DeviceArrays& writes(TensorView& view) { return add(view, true); }

  /// Replaces the views. Call it without the GIL, once, after all have been named.
  void to_device();
  /// Copies back what was written, and waits for the backend.
  void to_host();

 private:
  struct Array {
    TensorView* view;
    std::byte* host;
    size_t nbytes;
    bool is_written;
  };
  struct Region {
    std::byte* begin;
    std::byte* end;
    std::unique_ptr<Buffer> buffer;
  };

  DeviceArrays& add(TensorView& view, bool is_written);
  Region& region_of(const Array& array);

  Backend& backend_;
  std::vector<Array> arrays_;
  std::vector<Region> regions_;
};

}  // namespace llama_ext
