// Errors of the core to the classes of llama_ext.errors, and Python's signals to Interrupted.
#include <algorithm>
#include <new>

#include "bindings/bindings.h"

namespace llama_ext {
namespace {

const char* class_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kShape:
      return "ShapeError";
    case ErrorKind::kDType:
      return "DTypeError";
    case ErrorKind::kOption:
      return "OptionError";
    case ErrorKind::kFormat:
      return "FormatError";
    case ErrorKind::kCheckpoint:
      return "CheckpointError";
    case ErrorKind::kLimit:
      return "LimitError";
    case ErrorKind::kUnsupported:
      return "UnsupportedError";
    case ErrorKind::kContextLength:
      return "ContextLengthError";
    case ErrorKind::kTokenId:
      return "TokenIdError";
    case ErrorKind::kNumeric:
      return "NumericError";
    case ErrorKind::kOutOfMemory:
      return "OutOfMemoryError";
    case ErrorKind::kDevice:
      return "DeviceError";
    case ErrorKind::kInternal:
      break;
  }
  return "LlamaExtError";
}

/// Imported when first needed: the package imports this module while it is itself being imported.
py::module_& errors_module() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::module_> storage;
  return storage.call_once_and_store_result([] { return py::module_::import("llama_ext.errors"); }).get_stored();
}

void set_error(const char* name, const char* message) {
  const py::object type = errors_module().attr(name);
  const py::object text = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(message, static_cast<py::ssize_t>(std::char_traits<char>::length(message)), "replace"));
  if (text) PyErr_SetObject(type.ptr(), text.ptr());
}

void translate(std::exception_ptr exception) {
  try {
    if (exception) std::rethrow_exception(exception);
  } catch (const py::error_already_set&) {
    throw;  // Python's own, and pybind11's, are theirs to translate
  } catch (const py::builtin_exception&) {
    throw;
  } catch (const Error& error) {
    set_error(class_name(error.kind()), error.what());
  } catch (const std::bad_alloc&) {
    set_error("OutOfMemoryError",
              "an allocation was refused by the system: there is not enough memory for this request");
  } catch (const std::exception& error) {
    set_error("LlamaExtError", error.what());
  }
}

// A signal handler written in Python runs inside requested(), in the middle of a computation of this thread.
bool& is_in_signal_handler() {
  thread_local bool inside = false;
  return inside;
}

constexpr auto kLeastWait = std::chrono::milliseconds(10);
constexpr auto kMostWait = std::chrono::milliseconds(50);

}  // namespace

void bind_errors() { py::register_local_exception_translator(translate); }

PythonInterrupts::PythonInterrupts() : next_look_(std::chrono::steady_clock::now() + kLeastWait) {
  require(!is_in_signal_handler(), ErrorKind::kInternal,
          "a signal handler called llama_ext while a computation of the same thread waits for it");
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::module_> storage;
  const py::module_& threading =
      storage.call_once_and_store_result([] { return py::module_::import("threading"); }).get_stored();
  const py::object main_thread = threading.attr("main_thread")();
  is_main_thread_ = main_thread.attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
}

bool PythonInterrupts::requested() {
  if (raised_) return true;
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = Clock::now();
  if (begin < next_look_) return false;

  bool is_raised = false;
  {
    const py::gil_scoped_acquire gil;
    bool& inside = is_in_signal_handler();
    inside = true;
    is_raised = PyErr_CheckSignals() != 0;
    inside = false;
    // Kept here rather than pending: code that runs between this and rethrow() must not see it.
    if (is_raised) raised_.emplace();
  }
  // Where other threads are busy with Python, each look waits for the GIL: then look less often.
  const Clock::time_point end = Clock::now();
  next_look_ = end + std::clamp<Clock::duration>(4 * (end - begin), kLeastWait, kMostWait);
  return is_raised;
}

void PythonInterrupts::rethrow() {
  require(raised_.has_value(), ErrorKind::kInternal, "a computation stopped without being asked to");
  throw py::error_already_set(*raised_);
}

}  // namespace llama_ext
