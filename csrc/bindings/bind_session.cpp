// Session: one sequence and its KV cache.
#include "bindings/bindings.h"

namespace llama_ext {
namespace {

using ModelPtr = std::shared_ptr<Model>;
using SessionPtr = std::shared_ptr<PySession>;

SessionPtr make_session(const ModelPtr& model, int64_t capacity, const std::string& kv_dtype,
                        const std::shared_ptr<Adapter>& adapter) {
  const DType dtype = kv_dtype_from_name(kv_dtype);
  return without_gil(
      [&] { return std::make_shared<PySession>(std::make_unique<Session>(model, capacity, dtype, adapter)); });
}

py::array append(PySession& self, const py::object& tokens, const std::string& rows) {
  const BusyScope busy(self.busy, "Session");
  Session& session = *self.session;
  const std::vector<int32_t> ids = token_ids(tokens, "append", "tokens");
  const int64_t count = static_cast<int64_t>(ids.size());
  const int64_t outputs = session.model().config().outputs();
  LogitsRows asked = LogitsRows::kNone;
  std::vector<int64_t> shape{0, outputs};
  if (rows == "last") {
    asked = LogitsRows::kLast;
    shape = {outputs};
  } else if (rows == "all") {
    asked = LogitsRows::kAll;
    shape = {count, outputs};
  } else {
    require(rows == "none", ErrorKind::kOption, "append: rows must be 'last', 'all' or 'none', got '", rows, "'");
  }
  py::array logits = new_array(DType::kF32, shape, "append");
  float* data = float_data(logits);
  without_gil([&] { session.append(ids.data(), count, asked, data); });
  return logits;
}

SessionPtr fork(PySession& self, int64_t capacity) {
  const BusyScope busy(self.busy, "Session");
  return without_gil([&] { return std::make_shared<PySession>(self.session->fork(capacity)); });
}

/// (T, K, D) views of keys and values, one layer of a session.
KvCacheShape layer_shape(const Session& session, int64_t layer, std::string_view op) {
  const KvCacheShape& shape = session.cache().shape();
  require(layer >= 0 && layer < shape.layers, ErrorKind::kOption, op, ": layer must be in [0, ", shape.layers,
          "), got ", layer);
  return shape;
}

py::tuple read_layer(PySession& self, int64_t layer) {
  const BusyScope busy(self.busy, "Session");
  const Session& session = *self.session;
  const KvCacheShape shape = layer_shape(session, layer, "read_layer");
  const int64_t length = session.length();
  py::array k = new_array(DType::kF32, {length, shape.kv_heads, shape.head_dim}, "read_layer");
  py::array v = new_array(DType::kF32, {length, shape.kv_heads, shape.head_dim}, "read_layer");
  KvLoadArgs args;
  args.cache = &session.cache();
  args.layer = layer;
  args.k = TensorView(float_data(k), DType::kF32, {length, shape.kv_heads, shape.head_dim});
  args.v = TensorView(float_data(v), DType::kF32, {length, shape.kv_heads, shape.head_dim});
  run_op(DeviceArrays(session.model().backend()).writes(args.k).writes(args.v),
         [&] { session.model().backend().kv_load(args); });
  return py::make_tuple(k, v);
}

/// The tokens are set last: a callback that throws leaves an empty session, not one with half of its keys.
void restore(PySession& self, const py::object& tokens, const py::function& layers) {
  const BusyScope busy(self.busy, "Session");
  Session& session = *self.session;
  const std::vector<int32_t> ids = token_ids(tokens, "restore", "tokens");
  const int64_t length = static_cast<int64_t>(ids.size());
  session.restore(ids);  // checks the ids and their number before anything is overwritten
  session.rewind(0);
  const KvCacheShape& shape = session.cache().shape();
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    const py::object pair = layers(layer);
    require(py::isinstance<py::tuple>(pair) && py::len(pair) == 2, ErrorKind::kOption,
            "restore: layers must return a tuple (k, v)");
    const py::object k = pair[py::int_(0)];
    const py::object v = pair[py::int_(1)];
    KvStoreArgs args;
    args.segments = {{.cache = &session.cache(), .row = 0, .tokens = length, .position = 0}};
    args.layer = layer;
    args.k = read_view(k, DType::kF32, 3, "restore", "k");
    args.v = read_view(v, DType::kF32, 3, "restore", "v");
    require_shape(args.k, {length, shape.kv_heads, shape.head_dim}, "restore", "k");
    require_shape(args.v, {length, shape.kv_heads, shape.head_dim}, "restore", "v");
    run_op(DeviceArrays(session.model().backend()).reads(args.k).reads(args.v),
           [&] { session.model().backend().kv_store(args); });
  }
  session.restore(ids);
}

}  // namespace

void bind_session(py::module_& module) {
  py::class_<PySession, SessionPtr>(module, "Session")
      .def(py::init(&make_session), py::arg("model").none(false), py::arg("capacity"), py::arg("kv_dtype"),
           py::arg("adapter") = py::none())
      .def_property_readonly("length",
                             [](PySession& self) {
                               const BusyScope busy(self.busy, "Session");
                               return self.session->length();
                             })
      .def_property_readonly("tokens",
                             [](PySession& self) {
                               const BusyScope busy(self.busy, "Session");
                               return self.session->tokens();
                             })
      .def_property_readonly("capacity", [](const PySession& self) { return self.session->capacity(); })
      .def_property_readonly("kv_dtype",
                             [](const PySession& self) { return std::string(name_of(self.session->kv_dtype())); })
      .def_property_readonly("nbytes", [](const PySession& self) { return self.session->cache().nbytes(); })
      .def("append", &append, py::arg("tokens"), py::arg("rows") = "last")
      .def(
          "rewind",
          [](PySession& self, int64_t length) {
            const BusyScope busy(self.busy, "Session");
            self.session->rewind(length);
          },
          py::arg("length"))
      .def("fork", &fork, py::arg("capacity"))
      .def("read_layer", &read_layer, py::arg("layer"))
      .def("restore", &restore, py::arg("tokens"), py::arg("layers"));
}

}  // namespace llama_ext
