// Operations of training on NumPy arrays: gradients, what only they need of the forward direction, steps of optimisers.
#include <utility>

#include "bindings/bindings.h"

namespace llama_ext {
namespace {

TensorView rows_of(const py::handle& array, const char* op, const char* what) {
  return operand(array, DType::kF32, 2, op, what);
}
TensorView rows_to(const py::handle& array, const char* op, const char* what) {
  return result(array, DType::kF32, 2, op, what);
}
TensorView heads_of(const py::handle& array, const char* op, const char* what) {
  return operand(array, DType::kF32, 3, op, what);
}
TensorView heads_to(const py::handle& array, const char* op, const char* what) {
  return result(array, DType::kF32, 3, op, what);
}
TensorView flat_of(const py::handle& array, const char* op, const char* what) {
  return operand(array, DType::kF32, 1, op, what);
}
TensorView flat_to(const py::handle& array, const char* op, const char* what) {
  return result(array, DType::kF32, 1, op, what);
}

/// A matrix that is added to: PyMatrix owns it.
Matrix* gradient_of(const BackendPtr& backend, const PyMatrix& matrix, const char* op, const char* what) {
  matrix_of(backend, matrix, op, what);
  return matrix.matrix.get();
}

using Ranges = std::vector<std::pair<int64_t, int64_t>>;

std::vector<RowRange> sequences_of(const Ranges& ranges) {
  std::vector<RowRange> sequences;
  sequences.reserve(ranges.size());
  for (const auto& [row, tokens] : ranges) sequences.push_back({.row = row, .tokens = tokens});
  return sequences;
}

void matmul_backward(const BackendPtr& backend, const py::object& d_y, const PyMatrix* weight, const py::object& x,
                     const py::object& d_x, const PyMatrix* d_weight, const py::object& d_bias, bool accumulate,
                     const std::string& compute) {
  const char* op = "matmul_backward";
  MatmulBackwardArgs args{.d_y = rows_of(d_y, op, "d_y"),
                          .weight = weight == nullptr ? nullptr : matrix_of(backend, *weight, op, "weight"),
                          .x = optional_operand(x, 2, op, "x"),
                          .d_x = optional_result(d_x, 2, op, "d_x"),
                          .accumulate = accumulate,
                          .d_weight = d_weight == nullptr ? nullptr : gradient_of(backend, *d_weight, op, "d_weight"),
                          .d_bias = optional_result(d_bias, 1, op, "d_bias"),
                          .compute = compute_from_name(compute)};
  run_op(DeviceArrays(*backend).reads(args.d_y).reads(args.x).writes(args.d_x).writes(args.d_bias),
         [&] { backend->matmul_backward(args); });
}

void rms_norm_backward(const BackendPtr& backend, const py::object& x, const py::object& weight, double eps,
                       const py::object& d_y, const py::object& d_x, bool accumulate, const py::object& d_weight) {
  const char* op = "rms_norm_backward";
  RmsNormBackwardArgs args{.x = rows_of(x, op, "x"),
                           .weight = flat_of(weight, op, "weight"),
                           .eps = eps,
                           .d_y = rows_of(d_y, op, "d_y"),
                           .d_x = rows_to(d_x, op, "d_x"),
                           .accumulate = accumulate,
                           .d_weight = optional_result(d_weight, 1, op, "d_weight")};
  run_op(DeviceArrays(*backend).reads(args.x).reads(args.weight).reads(args.d_y).writes(args.d_x).writes(args.d_weight),
         [&] { backend->rms_norm_backward(args); });
}

void swiglu(const BackendPtr& backend, const py::object& gate, const py::object& up, const py::object& out) {
  SwigluArgs args{
      .gate = rows_of(gate, "swiglu", "gate"), .up = rows_of(up, "swiglu", "up"), .y = rows_to(out, "swiglu", "out")};
  run_op(DeviceArrays(*backend).reads(args.gate).reads(args.up).writes(args.y), [&] { backend->swiglu(args); });
}

void swiglu_backward(const BackendPtr& backend, const py::object& gate, const py::object& up, const py::object& d_y,
                     const py::object& d_gate, const py::object& d_up, const py::object& y) {
  const char* op = "swiglu_backward";
  SwigluBackwardArgs args{.gate = rows_of(gate, op, "gate"),
                          .up = rows_of(up, op, "up"),
                          .d_y = rows_of(d_y, op, "d_y"),
                          .d_gate = rows_to(d_gate, op, "d_gate"),
                          .d_up = rows_to(d_up, op, "d_up"),
                          .y = optional_result(y, 2, op, "y")};
  run_op(DeviceArrays(*backend)
             .reads(args.gate)
             .reads(args.up)
             .reads(args.d_y)
             .writes(args.d_gate)
             .writes(args.d_up)
             .writes(args.y),
         [&] { backend->swiglu_backward(args); });
}

void causal_attention(const BackendPtr& backend, const Ranges& sequences, const py::object& q, const py::object& k,
                      const py::object& v, double scale, const py::object& out, const py::object& log_sums,
                      double dropout_p, uint64_t seed, const std::string& compute) {
  const char* op = "causal_attention";
  CausalAttentionArgs args{.sequences = sequences_of(sequences),
                           .q = heads_of(q, op, "q"),
                           .k = heads_of(k, op, "k"),
                           .v = heads_of(v, op, "v"),
                           .scale = scale,
                           .y = heads_to(out, op, "out"),
                           .log_sums = rows_to(log_sums, op, "log_sums"),
                           .dropout = dropout_p,
                           .seed = seed,
                           .compute = compute_from_name(compute)};
  run_op(DeviceArrays(*backend).reads(args.q).reads(args.k).reads(args.v).writes(args.y).writes(args.log_sums),
         [&] { backend->causal_attention(args); });
}

void causal_attention_backward(const BackendPtr& backend, const Ranges& sequences, const py::object& q,
                               const py::object& k, const py::object& v, double scale, const py::object& y,
                               const py::object& log_sums, const py::object& d_y, const py::object& d_q,
                               const py::object& d_k, const py::object& d_v, double dropout_p, uint64_t seed,
                               const std::string& compute) {
  const char* op = "causal_attention_backward";
  CausalAttentionBackwardArgs args{.sequences = sequences_of(sequences),
                                   .q = heads_of(q, op, "q"),
                                   .k = heads_of(k, op, "k"),
                                   .v = heads_of(v, op, "v"),
                                   .scale = scale,
                                   .y = heads_of(y, op, "y"),
                                   .log_sums = rows_of(log_sums, op, "log_sums"),
                                   .d_y = heads_of(d_y, op, "d_y"),
                                   .d_q = heads_to(d_q, op, "d_q"),
                                   .d_k = heads_to(d_k, op, "d_k"),
                                   .d_v = heads_to(d_v, op, "d_v"),
                                   .dropout = dropout_p,
                                   .seed = seed,
                                   .compute = compute_from_name(compute)};
  run_op(DeviceArrays(*backend)
             .reads(args.q)
             .reads(args.k)
             .reads(args.v)
             .reads(args.y)
             .reads(args.log_sums)
             .reads(args.d_y)
             .writes(args.d_q)
             .writes(args.d_k)
             .writes(args.d_v),
         [&] { backend->causal_attention_backward(args); });
}

void cross_entropy_backward(const BackendPtr& backend, const py::object& logits, const py::object& labels, double scale,
                            const py::object& losses) {
  const char* op = "cross_entropy_backward";
  CrossEntropyBackwardArgs args{.logits = rows_to(logits, op, "logits"),
                                .labels = read_view(labels, DType::kI32, 1, op, "labels"),
                                .scale = scale,
                                .losses = flat_to(losses, op, "losses")};
  run_op(DeviceArrays(*backend).writes(args.logits).writes(args.losses),
         [&] { backend->cross_entropy_backward(args); });
}

void embedding_backward(const BackendPtr& backend, const py::object& ids, const py::object& d_y,
                        const PyMatrix& d_table) {
  const char* op = "embedding_backward";
  EmbeddingBackwardArgs args{.ids = read_view(ids, DType::kI32, 1, op, "ids"),
                             .d_y = rows_of(d_y, op, "d_y"),
                             .d_table = gradient_of(backend, d_table, op, "d_table")};
  run_op(DeviceArrays(*backend).reads(args.d_y), [&] { backend->embedding_backward(args); });
}

void dropout(const BackendPtr& backend, const py::object& x, double p, uint64_t seed, const py::object& out,
             bool accumulate, double scale) {
  DropoutArgs args{.x = rows_of(x, "dropout", "x"),
                   .y = rows_to(out, "dropout", "out"),
                   .p = p,
                   .seed = seed,
                   .accumulate = accumulate,
                   .scale = scale};
  run_op(DeviceArrays(*backend).reads(args.x).writes(args.y), [&] { backend->dropout(args); });
}

void adam(const BackendPtr& backend, const py::object& parameter, const py::object& gradient, const py::object& first,
          const py::object& second, int64_t step, double lr, double beta1, double beta2, double eps, double decay,
          bool decoupled, double gradient_scale) {
  AdamArgs args{.parameter = flat_to(parameter, "adam", "parameter"),
                .gradient = flat_of(gradient, "adam", "gradient"),
                .first = flat_to(first, "adam", "first"),
                .second = flat_to(second, "adam", "second"),
                .gradient_scale = gradient_scale,
                .lr = lr,
                .beta1 = beta1,
                .beta2 = beta2,
                .eps = eps,
                .decay = decay,
                .decoupled = decoupled,
                .step = step};
  run_op(DeviceArrays(*backend).writes(args.parameter).reads(args.gradient).writes(args.first).writes(args.second),
         [&] { backend->adam(args); });
}

void sgd(const BackendPtr& backend, const py::object& parameter, const py::object& gradient, const py::object& velocity,
         double lr, double momentum, double decay, bool nesterov, double gradient_scale) {
  SgdArgs args{.parameter = flat_to(parameter, "sgd", "parameter"),
               .gradient = flat_of(gradient, "sgd", "gradient"),
               .velocity = optional_result(velocity, 1, "sgd", "velocity"),
               .gradient_scale = gradient_scale,
               .lr = lr,
               .momentum = momentum,
               .decay = decay,
               .nesterov = nesterov};
  run_op(DeviceArrays(*backend).writes(args.parameter).reads(args.gradient).writes(args.velocity),
         [&] { backend->sgd(args); });
}

void transpose(const BackendPtr& backend, const PyMatrix& target, const PyMatrix& source) {
  const Matrix& from = *matrix_of(backend, source, "transpose", "source");
  Matrix& to = *gradient_of(backend, target, "transpose", "target");
  run_op(backend, [&] { backend->transpose(to, from); });
}

/// group 0: one tensor's rows, all together.
RowMap row_map(int64_t begin, int64_t group, int64_t stride) {
  if (group == 0) return {.begin = begin};
  return {.begin = begin, .group = group, .stride = stride};
}

void load_rows(const BackendPtr& backend, const PyMatrix& matrix, const py::object& out, bool transposes, int64_t begin,
               int64_t group, int64_t stride) {
  const Matrix& from = *matrix_of(backend, matrix, "load_rows", "matrix");
  TensorView target = rows_to(out, "load_rows", "out");
  run_op(DeviceArrays(*backend).writes(target),
         [&] { backend->load_rows(from, row_map(begin, group, stride), target, transposes); });
}

void store_rows(const BackendPtr& backend, const PyMatrix& matrix, const py::object& x, bool transposes, int64_t begin,
                int64_t group, int64_t stride) {
  Matrix& to = *gradient_of(backend, matrix, "store_rows", "matrix");
  TensorView source = rows_of(x, "store_rows", "x");
  run_op(DeviceArrays(*backend).reads(source),
         [&] { backend->store_rows(to, row_map(begin, group, stride), source, transposes); });
}

double sum_of_squares(const BackendPtr& backend, const py::object& x) {
  TensorView view = flat_of(x, "sum_of_squares", "x");
  double sum = 0;
  run_op(DeviceArrays(*backend).reads(view), [&] { sum = backend->sum_of_squares(view); });
  return sum;
}

}  // namespace

void bind_gradients(py::class_<Backend, BackendPtr>& backend) {
  backend
      .def("matmul_backward", &matmul_backward, py::arg("d_y"), py::arg("weight").none(true), py::arg("x").none(true),
           py::arg("d_x").none(true), py::arg("d_weight").none(true), py::arg("d_bias").none(true),
           py::arg("accumulate") = false, py::arg("compute") = "exact")
      .def("rms_norm_backward", &rms_norm_backward, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("d_y"),
           py::arg("d_x"), py::arg("accumulate") = false, py::arg("d_weight") = py::none())
      .def("swiglu", &swiglu, py::arg("gate"), py::arg("up"), py::arg("out"))
      .def("swiglu_backward", &swiglu_backward, py::arg("gate"), py::arg("up"), py::arg("d_y"), py::arg("d_gate"),
           py::arg("d_up"), py::arg("y") = py::none())
      .def("causal_attention", &causal_attention, py::arg("sequences"), py::arg("q"), py::arg("k"), py::arg("v"),
           py::arg("scale"), py::arg("out"), py::arg("log_sums"), py::arg("dropout") = 0.0, py::arg("seed") = 0,
           py::arg("compute") = "exact")
      .def("causal_attention_backward", &causal_attention_backward, py::arg("sequences"), py::arg("q"), py::arg("k"),
           py::arg("v"), py::arg("scale"), py::arg("y"), py::arg("log_sums"), py::arg("d_y"), py::arg("d_q"),
           py::arg("d_k"), py::arg("d_v"), py::arg("dropout") = 0.0, py::arg("seed") = 0, py::arg("compute") = "exact")
      .def("cross_entropy_backward", &cross_entropy_backward, py::arg("logits"), py::arg("labels"), py::arg("scale"),
           py::arg("losses"))
      .def("embedding_backward", &embedding_backward, py::arg("ids"), py::arg("d_y"), py::arg("d_table"))
      .def("dropout", &dropout, py::arg("x"), py::arg("p"), py::arg("seed"), py::arg("out"),
           py::arg("accumulate") = false, py::arg("scale") = 1.0)
      .def("adam", &adam, py::arg("parameter"), py::arg("gradient"), py::arg("first"), py::arg("second"),
           py::arg("step"), py::arg("lr"), py::arg("beta1") = 0.9, py::arg("beta2") = 0.999, py::arg("eps") = 1e-8,
           py::arg("decay") = 0.0, py::arg("decoupled") = true, py::arg("gradient_scale") = 1.0)
      .def("sgd", &sgd, py::arg("parameter"), py::arg("gradient"), py::arg("velocity").none(true), py::arg("lr"),
           py::arg("momentum") = 0.0, py::arg("decay") = 0.0, py::arg("nesterov") = false,
           py::arg("gradient_scale") = 1.0)
      .def("sum_of_squares", &sum_of_squares, py::arg("x"))
      .def("transpose", &transpose, py::arg("target"), py::arg("source"))
      .def("load_rows", &load_rows, py::arg("matrix"), py::arg("out"), py::arg("transposes") = false,
           py::arg("begin") = 0, py::arg("group") = 0, py::arg("stride") = 0)
      .def("store_rows", &store_rows, py::arg("matrix"), py::arg("x"), py::arg("transposes") = false,
           py::arg("begin") = 0, py::arg("group") = 0, py::arg("stride") = 0);
}

}  // namespace llama_ext
