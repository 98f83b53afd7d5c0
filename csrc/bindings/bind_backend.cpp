// Backend and Matrix: every operation by itself, on NumPy arrays and DeviceArrays.
#include <algorithm>
#include <utility>
#include <variant>

#include "bindings/bindings.h"
#include "model/sample_state.h"
#include "ops/argument_checks.h"

namespace llama_ext {
namespace {

PyMatrix make_matrix(const BackendPtr& backend, const py::object& source, const std::string& dtype, int64_t group,
                     const py::object& importance) {
  const TensorView view = weight_view(source, "matrix", "source");
  require_shape(view, {-1, -1}, "matrix", "source");
  const WeightType type = weight_type(dtype, group, "matrix");
  const TensorView weights = optional_view(importance, 1, "matrix", "importance");
  PyMatrix matrix{backend, nullptr};
  run_op(backend, [&] {
    matrix.matrix = deleted_without_gil(backend->create_matrix(view.dim(0), view.dim(1), type));
    backend->write_rows(*matrix.matrix, {}, view, weights);
  });
  return matrix;
}

PyMatrix make_zero_matrix(const BackendPtr& backend, int64_t rows, int64_t cols) {
  PyMatrix matrix{backend, nullptr};
  run_op(backend, [&] {
    matrix.matrix = deleted_without_gil(backend->create_matrix(rows, cols, weight_type("float32", 0, "matrix")));
  });
  return matrix;
}

PyMatrix make_block_matrix(const BackendPtr& backend, const py::object& blocks, const std::string& ggml_name,
                           int64_t cols) {
  const GgmlType& ggml = ggml_type(ggml_name);
  const std::span<const std::byte> bytes = byte_view(blocks, "block_matrix", "blocks");
  require(cols > 0, ErrorKind::kShape, "block_matrix: cols must be positive, got ", cols);
  const int64_t row_bytes = ggml_row_bytes(ggml, cols);
  const int64_t rows = static_cast<int64_t>(bytes.size()) / row_bytes;
  PyMatrix matrix{backend, nullptr};
  run_op(backend, [&] {
    matrix.matrix = deleted_without_gil(backend->create_matrix(rows, cols, ggml.type));
    backend->write_blocks(*matrix.matrix, {}, ggml, rows, bytes);
  });
  return matrix;
}

PyMatrix make_gate_up_matrix(const BackendPtr& backend, const py::object& gate, const py::object& up,
                             const std::string& dtype, int64_t group, const py::object& importance) {
  const TensorView gate_view = weight_view(gate, "gate_up_matrix", "gate");
  const TensorView up_view = weight_view(up, "gate_up_matrix", "up");
  require_shape(gate_view, {-1, -1}, "gate_up_matrix", "gate");
  require_shape(up_view, {gate_view.dim(0), gate_view.dim(1)}, "gate_up_matrix", "up");
  const WeightType type = weight_type(dtype, group, "gate_up_matrix");
  const TensorView weights = optional_view(importance, 1, "gate_up_matrix", "importance");
  PyMatrix matrix{backend, nullptr};
  run_op(backend, [&] {
    matrix.matrix = deleted_without_gil(backend->create_matrix(gate_up_size(gate_view.dim(0)), gate_view.dim(1), type));
    backend->write_rows(*matrix.matrix, gate_rows(), gate_view, weights);
    backend->write_rows(*matrix.matrix, up_rows(), up_view, weights);
  });
  return matrix;
}

py::array matrix_to_array(const PyMatrix& matrix) {
  const int64_t rows = matrix.matrix->rows();
  const int64_t cols = matrix.matrix->cols();
  py::array values = new_array(DType::kF32, {rows, cols}, "to_array");
  const TensorView view(float_data(values), DType::kF32, {rows, cols});
  run_op(matrix.backend, [&] { matrix.backend->read_rows(*matrix.matrix, {}, view); });
  return values;
}

void embedding(const BackendPtr& backend, const py::object& ids, const PyMatrix& table, const py::object& out) {
  EmbeddingArgs args{.ids = read_view(ids, DType::kI32, 1, "embedding", "ids"),
                     .table = matrix_of(backend, table, "embedding", "table"),
                     .y = result(out, DType::kF32, 2, "embedding", "out")};
  run_op(DeviceArrays(*backend).writes(args.y), [&] { backend->embedding(args); });
}

void matmul(const BackendPtr& backend, const py::object& x, const PyMatrix& weight, const py::object& bias,
            const py::object& out, bool accumulate, const std::string& compute, const py::object& norm_weight,
            double norm_eps) {
  MatmulArgs args{.x = operand(x, DType::kF32, 2, "matmul", "x"),
                  .weight = matrix_of(backend, weight, "matmul", "weight"),
                  .bias = optional_operand(bias, 1, "matmul", "bias"),
                  .y = result(out, DType::kF32, 2, "matmul", "out"),
                  .accumulate = accumulate,
                  .compute = compute_from_name(compute),
                  .norm = {optional_operand(norm_weight, 1, "matmul", "norm_weight"), norm_eps}};
  run_op(DeviceArrays(*backend).reads(args.x).reads(args.bias).reads(args.norm.weight).writes(args.y),
         [&] { backend->matmul(args); });
}

void rms_norm(const BackendPtr& backend, const py::object& x, const py::object& weight, double eps,
              const py::object& out, const py::object& inv_rms) {
  RmsNormArgs args{.x = operand(x, DType::kF32, 2, "rms_norm", "x"),
                   .weight = operand(weight, DType::kF32, 1, "rms_norm", "weight"),
                   .eps = eps,
                   .y = result(out, DType::kF32, 2, "rms_norm", "out"),
                   .inv_rms = optional_result(inv_rms, 1, "rms_norm", "inv_rms")};
  run_op(DeviceArrays(*backend).reads(args.x).reads(args.weight).writes(args.y).writes(args.inv_rms),
         [&] { backend->rms_norm(args); });
}

void rope(const BackendPtr& backend, const py::object& x, const py::object& cos, const py::object& sin, bool inverse) {
  RopeArgs args{.x = result(x, DType::kF32, 3, "rope", "x"),
                .cos = operand(cos, DType::kF32, 2, "rope", "cos"),
                .sin = operand(sin, DType::kF32, 2, "rope", "sin"),
                .inverse = inverse};
  run_op(DeviceArrays(*backend).reads(args.cos).reads(args.sin).writes(args.x), [&] { backend->rope(args); });
}

/// Attention over padded arrays. Row b's keys are k[b, starts[b] : starts[b] + lengths[b]]; the T queries are the last
/// T of the S padded places, so query t is at place S - T + t and sees the keys of its row up to there. A query outside
/// its row's keys is padding, and gives zeros.
void attention(const BackendPtr& backend, const py::object& q, const py::object& k, const py::object& v,
               const py::object& starts, const py::object& lengths, double scale, const std::string& cache_dtype,
               const py::object& out, const std::string& compute) {
  TensorView q_view = operand(q, DType::kF32, 4, "attention", "q");
  TensorView k_view = operand(k, DType::kF32, 4, "attention", "k");
  TensorView v_view = operand(v, DType::kF32, 4, "attention", "v");
  TensorView y_view = result(out, DType::kF32, 4, "attention", "out");
  const TensorView starts_view = read_view(starts, DType::kI32, 1, "attention", "starts");
  const TensorView lengths_view = read_view(lengths, DType::kI32, 1, "attention", "lengths");
  const DType kept = kv_dtype_from_name(cache_dtype);
  const Compute arithmetic = compute_from_name(compute);

  const int64_t batch = q_view.dim(0);
  const int64_t queries = q_view.dim(1);
  const int64_t heads = q_view.dim(2);
  const int64_t head_dim = q_view.dim(3);
  const int64_t places = k_view.dim(1);
  const int64_t kv_heads = k_view.dim(2);
  require_shape(k_view, {batch, -1, -1, head_dim}, "attention", "k");
  require_shape(v_view, {batch, places, kv_heads, head_dim}, "attention", "v");
  require_shape(y_view, {batch, queries, heads, head_dim}, "attention", "out");
  require_shape(starts_view, {batch}, "attention", "starts");
  require_shape(lengths_view, {batch}, "attention", "lengths");
  require(q_view.is_contiguous() && y_view.is_contiguous(), ErrorKind::kShape,
          "attention: q and out must be C-contiguous. Pass numpy.ascontiguousarray of them");
  require(queries <= places, ErrorKind::kShape, "attention: q has ", queries, " tokens, more than the ", places,
          " keys");
  require(kv_heads >= 1 && heads % kv_heads == 0, ErrorKind::kShape, "attention: the heads of q (", heads,
          ") must be a multiple of the heads of k (", kv_heads, ")");

  for (const auto& [view, name] :
       {std::pair{q_view, "q"}, {k_view, "k"}, {v_view, "v"}, {starts_view, "starts"}, {lengths_view, "lengths"}}) {
    require_disjoint(y_view, view, "attention", "out", name);
  }

  if (y_view.gpu() < 0) std::fill_n(y_view.f32(), y_view.size(), 0.0f);
  run_op(DeviceArrays(*backend).reads(q_view).reads(k_view).reads(v_view).writes(y_view), [&] {
    if (y_view.gpu() >= 0) backend->zero(y_view);
    AttentionArgs args;
    args.q = TensorView(q_view.data(), DType::kF32, {batch * queries, heads, head_dim});
    args.scale = scale;
    args.compute = arithmetic;
    args.y = TensorView(y_view.data(), DType::kF32, {batch * queries, heads, head_dim});
    std::vector<std::unique_ptr<KvCache>> caches;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t start = static_cast<const int32_t*>(starts_view.data())[b];
      const int64_t length = static_cast<const int32_t*>(lengths_view.data())[b];
      require(start >= 0 && length >= 0 && start + length <= places, ErrorKind::kShape, "attention: row ", b, ": keys ",
              start, " to ", start + length, " are not within the ", places, " of k");
      const int64_t first_place = places - queries;
      const int64_t begin = std::max(start, first_place);
      const int64_t end = start + length;
      if (begin >= end || heads == 0 || head_dim == 0) continue;

      caches.push_back(backend->create_kv_cache(
          {.layers = 1, .kv_heads = kv_heads, .head_dim = head_dim, .capacity = length, .dtype = kept}));
      const auto keys_of_row = [&](const TensorView& all) {
        return TensorView(all.row<float>(b) + start * kv_heads * head_dim, DType::kF32, {length, kv_heads, head_dim});
      };
      backend->kv_store({.segments = {{.cache = caches.back().get(), .row = 0, .tokens = length, .position = 0}},
                         .layer = 0,
                         .k = keys_of_row(k_view),
                         .v = keys_of_row(v_view)});
      args.segments.push_back({.cache = caches.back().get(),
                               .row = b * queries + begin - first_place,
                               .tokens = end - begin,
                               .position = begin - start});
    }
    if (!args.segments.empty()) backend->attention(args);
    backend->synchronize();  // before the caches go
  });
}

/// The two biases as one, in the order of gate_up's rows; empty when there is none.
std::vector<float> interleaved_bias(const BackendPtr& backend, const TensorView& gate, const TensorView& up,
                                    int64_t width, int64_t rows) {
  std::vector<float> bias;
  if (!gate && !up) return bias;
  bias.resize(static_cast<size_t>(rows));
  const auto place = [&](const TensorView& half, const RowMap& map, const char* what) {
    if (!half) return;
    require_shape(half, {width}, "feed_forward", what);
    require(gate_up_size(half.size()) == rows, ErrorKind::kShape, "feed_forward: ", what, " has ", half.size(),
            " entries, which does not fit gate_up's ", rows, " rows");
    std::vector<float> read;
    if (half.gpu() >= 0) {
      read.resize(static_cast<size_t>(half.size()));
      run_op(backend, [&] { backend->copy_to_host(read.data(), half.data(), read.size() * sizeof(float)); });
    }
    const float* values = half.gpu() >= 0 ? read.data() : half.f32();
    for (int64_t i = 0; i < half.size(); ++i) bias[static_cast<size_t>(map(i))] = values[i];
  };
  place(gate, gate_rows(), "gate_bias");
  place(up, up_rows(), "up_bias");
  return bias;
}

/// gate_up: a gate-up matrix, or the two matrices apart, which may be kept as different types.
void feed_forward(const BackendPtr& backend, const py::object& x,
                  const std::variant<const PyMatrix*, std::pair<const PyMatrix*, const PyMatrix*>>& gate_up,
                  const py::object& gate_bias, const py::object& up_bias, const PyMatrix& down,
                  const py::object& down_bias, const py::object& out, bool accumulate, const std::string& compute,
                  const py::object& norm_weight, double norm_eps) {
  const auto own = [&](const PyMatrix* matrix, const char* what) {
    require(matrix != nullptr, ErrorKind::kDType, "feed_forward: ", what, " must be a Matrix, got None");
    return matrix_of(backend, *matrix, "feed_forward", what);
  };
  const TensorView gate = optional_operand(gate_bias, 1, "feed_forward", "gate_bias");
  const TensorView up = optional_operand(up_bias, 1, "feed_forward", "up_bias");
  std::vector<float> bias;
  FeedForwardArgs args;
  args.x = operand(x, DType::kF32, 2, "feed_forward", "x");
  args.down = own(&down, "down");
  if (const auto* pair = std::get_if<1>(&gate_up)) {
    args.gate = own(pair->first, "gate");
    args.gate_bias = gate;
    args.up = own(pair->second, "up");
    args.up_bias = up;
  } else {
    args.gate_up = own(std::get<0>(gate_up), "gate_up");
    bias = interleaved_bias(backend, gate, up, args.down->cols(), args.gate_up->rows());
    if (!bias.empty()) args.gate_up_bias = TensorView(bias.data(), DType::kF32, {static_cast<int64_t>(bias.size())});
  }
  args.down_bias = optional_operand(down_bias, 1, "feed_forward", "down_bias");
  args.y = result(out, DType::kF32, 2, "feed_forward", "out");
  args.accumulate = accumulate;
  args.compute = compute_from_name(compute);
  args.norm = {optional_operand(norm_weight, 1, "feed_forward", "norm_weight"), norm_eps};
  DeviceArrays arrays(*backend);
  arrays.reads(args.x).reads(args.gate_up_bias).reads(args.gate_bias).reads(args.up_bias).reads(args.down_bias);
  arrays.reads(args.norm.weight).writes(args.y);
  run_op(arrays, [&] { backend->feed_forward(args); });
}

void softmax(const BackendPtr& backend, const py::object& x, const py::object& out) {
  SoftmaxArgs args{.x = operand(x, DType::kF32, 2, "softmax", "x"), .y = result(out, DType::kF32, 2, "softmax", "out")};
  run_op(DeviceArrays(*backend).reads(args.x).writes(args.y), [&] { backend->softmax(args); });
}

void cross_entropy(const BackendPtr& backend, const py::object& logits, const py::object& labels, const py::object& out,
                   const py::object& hits) {
  CrossEntropyArgs args{.logits = operand(logits, DType::kF32, 2, "cross_entropy", "logits"),
                        .labels = read_view(labels, DType::kI32, 1, "cross_entropy", "labels"),
                        .losses = result(out, DType::kF32, 1, "cross_entropy", "out"),
                        .hits = hits.is_none() ? TensorView() : result(hits, DType::kF32, 1, "cross_entropy", "hits")};
  run_op(DeviceArrays(*backend).reads(args.logits).writes(args.losses).writes(args.hits),
         [&] { backend->cross_entropy(args); });
}

py::tuple sample(const BackendPtr& backend, const py::object& logits, const py::dict& options,
                 const std::vector<int32_t>& prompt, const std::vector<int32_t>& output, uint64_t seed, uint64_t stream,
                 uint64_t counter) {
  const SamplingOptions sampling = sampling_from_dict(options);
  const SampleArgs args{.logits = read_view(logits, DType::kF32, 1, "sample", "logits"),
                        .options = &sampling,
                        .prompt = &prompt,
                        .output = &output,
                        .key = {.seed = seed, .stream = stream, .counter = counter}};
  check(sampling, args.logits.size());
  SampleResult result;
  without_gil([&] { backend->sample({&args, 1}, {&result, 1}); });
  return py::make_tuple(result.token, result.logprob);
}

/// sample_next of some rows, once each: (token, logprob), or None where the row is not valid.
py::list sample_next(const BackendPtr& backend, const py::object& logits, const py::dict& options,
                     const std::vector<std::vector<int32_t>>& prompts, const std::vector<std::vector<int32_t>>& outputs,
                     uint64_t seed, const std::vector<uint64_t>& streams, const std::vector<uint64_t>& counters) {
  const SamplingOptions sampling = sampling_from_dict(options);
  TensorView view = operand(logits, DType::kF32, 2, "sample_next", "logits");
  const auto rows = static_cast<size_t>(view.rows());
  require(prompts.size() == rows && outputs.size() == rows && streams.size() == rows && counters.size() == rows,
          ErrorKind::kShape, "sample_next: prompts, outputs, streams and counters must have one entry for each of ",
          rows, " rows");
  require(SampleState::is_possible(*backend, sampling), ErrorKind::kUnsupported, "sample_next: ", backend->device(),
          " has no sampler of its own; use sample");
  std::vector<SampleSeat> seats;
  for (size_t i = 0; i < rows; ++i) {
    seats.push_back({.token = 0,
                     .position = 0,
                     .key = {.seed = seed, .stream = streams[i], .counter = counters[i]},
                     .prompt = &prompts[i],
                     .output = &outputs[i]});
  }
  std::vector<DecodeResult> results(rows);
  DeviceArrays arrays(*backend);
  arrays.reads(view);
  without_gil([&] {
    const SampleState state(*backend, sampling, seats, view.dim(1), 1);
    arrays.to_device();
    SampleNextArgs args = state.args();
    args.logits = view;
    backend->recorder()->sample_next(args);
    backend->synchronize();
    std::copy_n(state.results(0), rows, results.begin());
  });
  py::list list;
  for (const DecodeResult& result : results) {
    list.append(result.is_valid != 0 ? py::object(py::make_tuple(result.token, result.logprob)) : py::none());
  }
  return list;
}

py::tuple angles(const py::dict& rope_dict, const py::object& positions) {
  require(py::isinstance<py::array_t<int64_t, py::array::c_style>>(positions), ErrorKind::kDType,
          "rope_angles: positions must be a contiguous NumPy array of int64");
  const py::array array = py::reinterpret_borrow<py::array>(positions);
  require(array.ndim() == 1, ErrorKind::kShape, "rope_angles: positions must have 1 dimension, got ", array.ndim());
  const RopeConfig config = rope_from_dict(rope_dict, 0);
  const std::vector<double> inverse_frequencies = rope_inverse_frequencies(config);
  const int64_t count = array.shape(0);
  py::array cos = new_array(DType::kF32, {count, config.head_dim / 2}, "rope_angles");
  py::array sin = new_array(DType::kF32, {count, config.head_dim / 2}, "rope_angles");
  const auto* from = static_cast<const int64_t*>(array.data());
  float* cos_data = float_data(cos);
  float* sin_data = float_data(sin);
  without_gil([&] { rope_angles(config, inverse_frequencies, from, count, cos_data, sin_data); });
  return py::make_tuple(cos, sin);
}

}  // namespace

const Matrix* matrix_of(const BackendPtr& backend, const PyMatrix& matrix, std::string_view op, std::string_view what) {
  require(matrix.backend == backend, ErrorKind::kDevice, op, ": ", what, " was made by another Backend object, on ",
          matrix.backend->device(), ". Make it with the one that uses it");
  return matrix.matrix.get();
}

void bind_backend(py::module_& module) {
  py::class_<PyMatrix> matrix(module, "Matrix");
  matrix
      .def_property_readonly("shape",
                             [](const PyMatrix& m) { return py::make_tuple(m.matrix->rows(), m.matrix->cols()); })
      .def_property_readonly("dtype",
                             [](const PyMatrix& m) { return std::string(info_of(m.matrix->type().encoding).name); })
      .def_property_readonly("group", [](const PyMatrix& m) { return m.matrix->type().group; })
      .def_property_readonly("nbytes", [](const PyMatrix& m) { return m.matrix->nbytes(); })
      .def("to_array", &matrix_to_array);

  py::class_<Backend, BackendPtr> backend(module, "Backend");
  backend.def(py::init(&make_backend), py::arg("device") = "cpu", py::arg("threads") = 0, py::arg("isa") = "")
      .def_property_readonly("device", &Backend::device)
      .def_property_readonly("isa", &Backend::isa)
      .def_property_readonly("threads", &Backend::threads)
      .def_property_readonly("matrix_layout", &Backend::matrix_layout)
      .def("matrix", &make_matrix, py::arg("source"), py::arg("dtype") = "float32", py::arg("group") = 0,
           py::arg("importance") = py::none())
      .def("zero_matrix", &make_zero_matrix, py::arg("rows"), py::arg("cols"))
      .def("block_matrix", &make_block_matrix, py::arg("blocks"), py::arg("ggml_type"), py::arg("cols"))
      .def("gate_up_matrix", &make_gate_up_matrix, py::arg("gate"), py::arg("up"), py::arg("dtype") = "float32",
           py::arg("group") = 0, py::arg("importance") = py::none())
      .def("embedding", &embedding, py::arg("ids"), py::arg("table"), py::arg("out"))
      .def("matmul", &matmul, py::arg("x"), py::arg("weight"), py::arg("bias").none(true), py::arg("out"),
           py::arg("accumulate") = false, py::arg("compute") = "auto", py::arg("norm_weight") = py::none(),
           py::arg("norm_eps") = 1e-6)
      .def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"),
           py::arg("inv_rms") = py::none())
      .def("rope", &rope, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("inverse") = false)
      .def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("starts"), py::arg("lengths"),
           py::arg("scale"), py::arg("cache_dtype"), py::arg("out"), py::arg("compute") = "auto")
      .def("feed_forward", &feed_forward, py::arg("x"), py::arg("gate_up"), py::arg("gate_bias").none(true),
           py::arg("up_bias").none(true), py::arg("down"), py::arg("down_bias").none(true), py::arg("out"),
           py::arg("accumulate") = false, py::arg("compute") = "auto", py::arg("norm_weight") = py::none(),
           py::arg("norm_eps") = 1e-6)
      .def("softmax", &softmax, py::arg("x"), py::arg("out"))
      .def("cross_entropy", &cross_entropy, py::arg("logits"), py::arg("labels"), py::arg("out"),
           py::arg("hits") = py::none())
      .def("sample", &sample, py::arg("logits"), py::arg("options"), py::arg("prompt"), py::arg("output"),
           py::arg("seed"), py::arg("stream"), py::arg("counter"))
      .def("sample_next", &sample_next, py::arg("logits"), py::arg("options"), py::arg("prompts"), py::arg("outputs"),
           py::arg("seed"), py::arg("streams"), py::arg("counters"));
  bind_gradients(backend);
  bind_device_array(module, backend, matrix);

  module.def("rope_angles", &angles, py::arg("rope"), py::arg("positions"));
}

}  // namespace llama_ext
