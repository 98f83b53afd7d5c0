// What the bind_*.cpp files share: strict conversion of arguments, and calls without the GIL. No arithmetic lives here.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "bindings/device_arrays.h"
#include "core/float_environment.h"
#include "core/interrupt.h"
#include "generate/generation.h"
#include "model/session.h"
#include "ops/rope.h"
#include "ops/sample.h"

namespace llama_ext {

namespace py = pybind11;

/// Of each row; None is the model alone.
using Adapters = std::vector<std::shared_ptr<Adapter>>;
inline std::vector<std::shared_ptr<const Adapter>> shared(const Adapters& adapters) {
  return {adapters.begin(), adapters.end()};
}
using BackendPtr = std::shared_ptr<Backend>;

void bind_errors();
void bind_backend(py::module_& module);
/// What bind_backend calls for the operations that only training needs.
void bind_gradients(py::class_<Backend, BackendPtr>& backend);
struct PyMatrix;
/// What bind_backend calls for arrays of a GPU.
void bind_device_array(py::module_& module, py::class_<Backend, BackendPtr>& backend, py::class_<PyMatrix>& matrix);
void bind_quantize(py::module_& module);
void bind_model(py::module_& module);
void bind_session(py::module_& module);
void bind_generation(py::module_& module);
/// What bind_model calls once there is a class Model.
void bind_adapter(py::module_& module);
void bind_train(py::module_& module);
/// What bind_model calls for passes that somebody looks at.
void bind_observed(py::module_& module, py::class_<Model, std::shared_ptr<Model>>& model);
void bind_input_gradients(py::module_& module);

/// bindings/backends.cpp, the only file that names all backends.
std::shared_ptr<Backend> make_backend(const std::string& device, int threads, const std::string& isa);
/// A line for each GPU, and why there is none, or "".
struct GpuReport {
  std::vector<std::string> gpus;
  std::string why_none;
};
GpuReport gpu_report();
/// Bytes a second that the memory of device "cuda:0" can be read with. Throws DeviceError, OptionError, OutOfMemoryError.
double gpu_read_bandwidth(const std::string& device, int64_t nbytes, int rounds);
/// Of the CUDA backend: whether it has ranges for profilers, whether they are on, and switching them. Throw DeviceError where there is
/// no such backend, show_nvtx_ranges UnsupportedError as well.
bool has_nvtx_ranges();
bool nvtx_ranges_are_on();
void show_nvtx_ranges(bool on);

// Arrays. Nothing is cast or copied behind the caller's back: an array of another dtype or layout is an error that
// names it.

/// The array itself, with `rank` dimensions (-1: any) of `dtype` (bfloat16 as uint16), aligned, native byte order,
/// contiguous but for the stride of the first axis. Throws DTypeError, ShapeError. The view is valid while the Python
/// object is.
TensorView read_view(const py::handle& array, DType dtype, int rank, std::string_view op, std::string_view what);
/// The same for an array that is written to. Throws DTypeError, ShapeError, OptionError.
TensorView write_view(const py::handle& array, DType dtype, int rank, std::string_view op, std::string_view what);
// For what an operation itself reads and writes, and the host does not: DeviceArrays as well, whose views say so.

TensorView operand(const py::handle& array, DType dtype, int rank, std::string_view op, std::string_view what);
/// The same for an array that is written to. Throws DTypeError, ShapeError, OptionError.
TensorView result(const py::handle& array, DType dtype, int rank, std::string_view op, std::string_view what);
/// An operand of float32, or an empty view for None.
TensorView optional_operand(const py::handle& array, int rank, std::string_view op, std::string_view what);
/// The same for an array that is written to.
TensorView optional_result(const py::handle& array, int rank, std::string_view op, std::string_view what);
/// read_view of float32, or an empty view for None.
TensorView optional_view(const py::handle& array, int rank, std::string_view op, std::string_view what);
/// A weight tensor of any floating dtype; `dtype` is what its bits mean (uint16 arrays: bfloat16).
TensorView weight_view(const py::handle& array, std::string_view op, std::string_view what);
/// The bytes of a C-contiguous array of uint8, any rank.
std::span<const std::byte> byte_view(const py::handle& array, std::string_view op, std::string_view what);
/// A list of token ids: a contiguous int32 array (T,).
std::vector<int32_t> token_ids(const py::handle& array, std::string_view op, std::string_view what);
std::vector<std::vector<int32_t>> token_id_lists(const py::handle& arrays, std::string_view op, std::string_view what);

/// A fresh array, not filled. Throws OutOfMemoryError.
py::array new_array(DType dtype, const std::vector<int64_t>& shape, std::string_view what);
inline float* float_data(py::array& array) { return static_cast<float*>(array.mutable_data()); }

/// The codes of a quantised matrix as arrays: (N, K) uint8, (N, groups) float32 scales and, where there are any, minima.
class CodeArrays {
 public:
  CodeArrays(const WeightType& type, int64_t rows, int64_t cols);
  /// Fills row `index`; needs no GIL.
  void store(int64_t index, const QuantizedRow& row);
  /// (codes, scales, minima or None).
  py::tuple tuple() const;

 private:
  WeightType type_;
  int64_t cols_;
  int64_t groups_;
  py::array codes_;
  py::array scales_;
  py::array mins_;
  uint8_t* code_data_;
  float* scale_data_;
  float* min_data_;
};

// Options.

Compute compute_from_name(std::string_view name);
DType kv_dtype_from_name(std::string_view name);
SamplingOptions sampling_from_dict(const py::dict& dict);
RopeConfig rope_from_dict(const py::dict& dict, int64_t default_head_dim);

/// Reads named fields out of a dict, and refuses a name that no field asked for.
class Fields {
 public:
  Fields(const py::dict& dict, std::string what) : dict_(dict), what_(std::move(what)) {}

  /// Leaves `value` as it is when the dict does not have `name`.
  template <typename T>
  void read(const char* name, T& value) {
    names_.emplace_back(name);
    if (!dict_.contains(name)) return;
    const py::object item = dict_[name];
    try {
      value = item.cast<T>();
    } catch (const py::cast_error&) {
      fail(ErrorKind::kOption, what_, ": '", name, "' cannot be ", std::string(py::repr(item)));
    }
  }

  /// Throws OptionError for a name that was not read.
  void finish() const;

 private:
  const py::dict& dict_;
  std::string what_;
  std::vector<std::string> names_;
};

// Calls without the GIL.

/// Looks for Ctrl-C, and whatever other signal has a Python handler, on behalf of a computation that does not hold the
/// GIL. Only the main thread of Python gets signals, so elsewhere there is nothing to look for.
class PythonInterrupts : public InterruptHandler {
 public:
  /// With the GIL. Throws LlamaExtError inside a signal handler that runs while a computation waits for it.
  PythonInterrupts();
  bool requested() override;
  /// What to install for the calling thread: none when it is not the main thread.
  InterruptHandler* handler() { return is_main_thread_ ? this : nullptr; }
  bool has_raised() const { return raised_.has_value(); }
  /// With the GIL: throws the exception that the signal's handler raised.
  [[noreturn]] void rethrow();

 private:
  bool is_main_thread_;
  std::chrono::steady_clock::time_point next_look_;
  std::optional<py::error_already_set> raised_;
};

/// Returns work(), run without the GIL and interruptible. `work` acquires the GIL before it touches a Python object.
template <typename Work>
auto without_gil(Work&& work) {
  PythonInterrupts interrupts;
  try {
    const py::gil_scoped_release release;
    const DefaultFloatEnvironment environment;
    const InterruptScope scope(interrupts.handler());
    return work();
  } catch (const Interrupted&) {
    interrupts.rethrow();
  } catch (...) {
    // An error that coincides with a Ctrl-C must not swallow it.
    if (interrupts.has_raised()) interrupts.rethrow();
    throw;
  }
}

/// The same object, that whoever lets go of it last deletes without the GIL. For what has memory of a GPU: giving that back can wait for
/// the whole device, whose host functions may want the GIL, and meanwhile other threads run Python.
template <typename Pointer>
std::shared_ptr<typename Pointer::element_type> deleted_without_gil(Pointer object) {
  auto* bare = object.get();
  return {bare, [kept = std::move(object)](auto*) mutable {
            if (Py_IsInitialized() == 0 || PyGILState_Check() == 0) return kept.reset();
            const py::gil_scoped_release released;
            kept.reset();
          }};
}

/// "all" or "last". Throws OptionError.
LogitsRows logits_rows_from_name(const std::string& rows, std::string_view op);

/// Runs an operation without the GIL and waits for it.
template <typename Work>
void run_op(const BackendPtr& backend, Work&& work) {
  without_gil([&] {
    work();
    backend->synchronize();
  });
}

/// Runs an operation on arrays in host memory, whose views are named in `arrays`.
template <typename Work>
void run_op(DeviceArrays& arrays, Work&& work) {
  without_gil([&] {
    arrays.to_device();
    work();
    arrays.to_host();
  });
}

/// Set while one thread works with an object that only one thread may use at a time.
class Busy {
 public:
  /// Throws LlamaExtError when another thread has it.
  void enter(std::string_view what) {
    require(!busy_.exchange(true, std::memory_order_acquire), ErrorKind::kInternal, "this ", what,
            " is in use by another call: one thread at a time may use it. Give each thread its own");
  }
  void leave() noexcept { busy_.store(false, std::memory_order_release); }

 private:
  std::atomic<bool> busy_{false};
};

class BusyScope {
 public:
  BusyScope(Busy& busy, std::string_view what) : busy_(busy) { busy_.enter(what); }
  ~BusyScope() { busy_.leave(); }
  BusyScope(const BusyScope&) = delete;
  BusyScope& operator=(const BusyScope&) = delete;

 private:
  Busy& busy_;
};

/// A Session as Python holds it.
struct PySession {
  explicit PySession(std::unique_ptr<Session> s) : session(deleted_without_gil(std::move(s))) {}
  std::shared_ptr<Session> session;
  Busy busy;
};

/// A Matrix as Python holds it, with the backend that knows its layout.
struct PyMatrix {
  std::shared_ptr<Backend> backend;
  std::shared_ptr<Matrix> matrix;  // shared with arrays over its memory
};

/// The matrix itself. Throws DeviceError unless `backend` made it.
const Matrix* matrix_of(const BackendPtr& backend, const PyMatrix& matrix, std::string_view op, std::string_view what);

}  // namespace llama_ext
