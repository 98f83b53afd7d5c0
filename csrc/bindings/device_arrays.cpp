#include "bindings/device_arrays.h"

#include <algorithm>

namespace llama_ext {

DeviceArrays& DeviceArrays::add(TensorView& view, bool is_written) {
  if (view.gpu() >= 0) {
    // It is there already, where the operation runs.
    require(backend_.device() == cat("cuda:", view.gpu()), ErrorKind::kDevice, "an array is on cuda:", view.gpu(),
            ", expected ", backend_.device());
    return *this;
  }
  if (backend_.shares_host_memory() || !view || view.size() == 0) return *this;
  const int64_t elements = (view.rows() - 1) * view.row_stride() + view.inner_size();
  arrays_.push_back(
      {&view, static_cast<std::byte*>(view.data()), static_cast<size_t>(elements) * size_of(view.dtype()), is_written});
  return *this;
}

DeviceArrays::Region& DeviceArrays::region_of(const Array& array) {
  return *std::find_if(regions_.begin(), regions_.end(), [&](const Region& region) {
    return region.begin <= array.host && array.host + array.nbytes <= region.end;
  });
}

void DeviceArrays::to_device() {
  std::vector<Array> sorted = arrays_;
  std::sort(sorted.begin(), sorted.end(), [](const Array& a, const Array& b) { return a.host < b.host; });
  for (const Array& array : sorted) {
    if (regions_.empty() || array.host >= regions_.back().end) {
      regions_.push_back({array.host, array.host + array.nbytes, nullptr});
    } else {
      regions_.back().end = std::max(regions_.back().end, array.host + array.nbytes);
    }
  }
  for (Region& region : regions_) {
    const size_t nbytes = static_cast<size_t>(region.end - region.begin);
    region.buffer = backend_.allocate(nbytes);
    backend_.copy_to_device(region.buffer->data(), region.begin, nbytes);
  }
  for (const Array& array : arrays_) {
    const Region& region = region_of(array);
    array.view->set_data(static_cast<std::byte*>(region.buffer->data()) + (array.host - region.begin));
  }
}

void DeviceArrays::to_host() {
  for (const Array& array : arrays_) {
    if (array.is_written) backend_.copy_to_host(array.host, array.view->data(), array.nbytes);
  }
  backend_.synchronize();
}

}  // namespace llama_ext
