"""A small builder over `onnx.helper`: names that say where a node belongs, constants stored once, weights by reference.

A node is called "/layers.3/attention/rope/RotaryEmbedding": the scopes it was made in, then its operator. So whoever compares
two runtimes value by value can say which operation of which layer differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from llama_ext.onnx.external_data import ExternalTensor
from llama_ext.onnx.profiles import Profile

__all__ = ["MICROSOFT", "Graph", "Value"]

MICROSOFT = "com.microsoft"

# The name of a value of the graph.
Value = str
Shape = Sequence[int | str]
T = TypeVar("T")

_ELEMENTS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


class Graph:
    """A graph that is being built.

    Args:
        profile: Which operators there may be.
        opset: Their version.
        dtype: Of activations: float32 | float16 | bfloat16.

    Attributes:
        weights: The tensors that go to the data file, in order.
    """

    def __init__(self, profile: Profile, opset: int, dtype: str) -> None:
        self.profile = profile
        self.opset = opset
        self.dtype = dtype
        self.weights: list[ExternalTensor] = []
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._declared: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[Any, ...], onnx.TensorProto] = {}
        self._scopes: list[str] = []
        self._names: dict[str, int] = {}
        self._once: dict[tuple[Any, ...], Any] = {}

    @staticmethod
    def element(dtype: str) -> int:
        """ONNX's number of a dtype."""
        return int(_ELEMENTS[dtype])

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """What is made within has `name` in its path."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def input(self, name: Value, dtype: str, shape: Shape) -> Value:
        """Declares an input of the model."""
        self._inputs.append(helper.make_tensor_value_info(name, self.element(dtype), list(shape)))
        return name

    def output(self, name: Value, dtype: str, shape: Shape) -> Value:
        """Declares an output of the model; a node gives it its value by that name."""
        self._outputs.append(helper.make_tensor_value_info(name, self.element(dtype), list(shape)))
        return name

    def declare(self, value: Value, dtype: str, shape: Shape) -> Value:
        """States the type of a value that inference cannot find, that of an operator outside ONNX."""
        self._declared.append(helper.make_tensor_value_info(value, self.element(dtype), list(shape)))
        return value

    def op(self, kind: str, *inputs: Value, output: Value | None = None, domain: str = "", **attributes: Any) -> Value:
        """Adds a node with one output.

        Args:
            kind: The operator.
            inputs: Values; "" for one that is left out.
            output: The name of its output. None: from the node's own.
            domain: Of the operator: "" for ONNX, or `MICROSOFT`.
            attributes: Of the operator.

        Returns:
            The output.
        """
        return self.ops(kind, *inputs, outputs=(output,), domain=domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: Value,
        outputs: Sequence[Value | None],
        domain: str = "",
        **attributes: Any,
    ) -> tuple[Value, ...]:
        """As `op`, with several outputs: a name each, None for one made of the node's, "" for one that is left out."""
        name = self._name(kind)
        named = tuple(f"{name}_output_{i}" if each is None else each for i, each in enumerate(outputs))
        self._nodes.append(helper.make_node(kind, list(inputs), list(named), name, domain=domain, **attributes))
        return named

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` gave for this key the first time."""
        if key not in self._once:
            self._once[key] = make()
        found: T = self._once[key]
        return found

    def constant(self, value: npt.ArrayLike, dtype: str = "int64") -> Value:
        """A small constant, kept in the graph; equal ones are one."""
        array = np.asarray(value)
        if dtype == "bfloat16":
            flat = [float(each) for each in np.atleast_1d(array).ravel()]
            tensor = helper.make_tensor("", TensorProto.BFLOAT16, array.shape, flat)
        else:
            tensor = numpy_helper.from_array(np.ascontiguousarray(array.astype(dtype)).reshape(array.shape))
        key = (dtype, array.shape, tensor.SerializeToString(deterministic=True))
        if key not in self._constants:
            tensor.name = f"/constants/{dtype}_{len(self._constants)}"
            self._constants[key] = tensor
        return str(self._constants[key].name)

    def scalar(self, value: float) -> Value:
        """A constant of the activations' dtype."""
        return self.constant(np.float32(value), self.dtype)

    def weight(self, name: str, dtype: str, shape: Sequence[int], source: Callable[[], Iterable[Any]]) -> Value:
        """A tensor in the data file; equal names are one.

        Args:
            name: Of the initializer.
            dtype: Its element type.
            shape: Its shape.
            source: Yields its bytes in order, as contiguous buffers; called once, in the order of the calls of this method.

        Returns:
            The value.
        """

        def make() -> Value:
            self.weights.append(ExternalTensor(name, self.element(dtype), tuple(shape), source))
            return name

        return self.once(("weight", name), make)

    def cast(self, value: Value, dtype: str) -> Value:
        """Another dtype."""
        return self.op("Cast", value, to=self.element(dtype))

    def reduce(self, kind: str, value: Value, axis: int, *, keepdims: bool) -> Value:
        """ReduceMean or ReduceSum over an axis, which became an input in opset 18 and 13."""
        if kind == "ReduceSum" or self.opset >= 18:
            return self.op(kind, value, self.constant([axis]), keepdims=int(keepdims))
        return self.op(kind, value, axes=[axis], keepdims=int(keepdims))

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """Another shape: 0 keeps a dimension, -1 is what is left."""
        return self.op("Reshape", value, self.constant(shape))

    def model(self, name: str, initializers: Iterable[onnx.TensorProto]) -> onnx.GraphProto:
        """The finished graph.

        Args:
            name: Of the graph.
            initializers: The weights, as references to the data file.
        """
        return helper.make_graph(
            self._nodes,
            name,
            self._inputs,
            self._outputs,
            [*initializers, *self._constants.values()],
            value_info=self._declared,
        )

    def _name(self, kind: str) -> str:
        path = "/" + "/".join([*self._scopes, kind])
        count = self._names.get(path, 0)
        self._names[path] = count + 1
        return path if count == 0 else f"{path}_{count}"
