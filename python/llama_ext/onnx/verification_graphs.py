"""Copies of an exported graph, in memory, that differ from it in what they show: more outputs, or arithmetic in float32.

A copy refers to the same data files, so it is as small as the graph itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext.errors import FormatError
from llama_ext.onnx.requirements import require

__all__ = ["GraphFile", "Node"]

_BLOCKWISE = "MatMulNBits"
# Its attribute's value for activations as they are.
_FLOAT32_ACTIVATIONS = 1


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of a graph.

    Attributes:
        name: With the scopes it was made in: "/layers.3/attention/rope/RotaryEmbedding".
        op_type: Its operator.
        inputs: Names of values.
        outputs: Names of values, without those that are left out.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class GraphFile:
    """An exported graph without its weights.

    Args:
        path: The .onnx file.

    Raises:
        FormatError: It is none.
        UnsupportedError: The package onnx is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._onnx: Any = require("onnx")
        self.path = path
        try:
            self._model = self._onnx.load(os.fspath(path), load_external_data=False)
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}.", path=os.fspath(path)) from error
        except Exception as error:  # protobuf's DecodeError, of a package that need not be named here
            raise FormatError("this is no ONNX model: it does not parse.", path=os.fspath(path)) from error
        self._shapes = {tensor.name: tuple(tensor.dims) for tensor in self._model.graph.initializer}

    @property
    def nodes(self) -> list[Node]:
        """In the order of computation."""
        return [
            Node(node.name, node.op_type, tuple(node.input), tuple(each for each in node.output if each))
            for node in self._model.graph.node
        ]

    @property
    def metadata(self) -> dict[str, str]:
        """What the exporter wrote into it."""
        return {entry.key: entry.value for entry in self._model.metadata_props}

    @property
    def data_files(self) -> list[str]:
        """The names of the files that hold the weights."""
        places = {
            entry.value
            for tensor in self._model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        return sorted(places)

    @property
    def rounds_activations(self) -> bool:
        """Whether a product in it rounds activations to int8, or a runtime may make it do so."""
        kinds = {node.op_type for node in self._model.graph.node}
        return bool(kinds & {_BLOCKWISE, "DequantizeLinear"})

    def hash(self, *, without: Sequence[str] = ()) -> str:
        """The sha256 of the graph's bytes, less some entries of its metadata."""
        copy = self._copy()
        kept = [entry for entry in copy.metadata_props if entry.key not in without]
        del copy.metadata_props[:]
        copy.metadata_props.extend(kept)
        return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a weight or constant, or None when there is none of this name."""
        return self._shapes.get(name)

    def constant(self, name: str) -> npt.NDArray[Any] | None:
        """A weight or constant of the graph, or None when there is none of this name."""
        for tensor in self._model.graph.initializer:
            if tensor.name == name:
                array: npt.NDArray[Any] = self._onnx.numpy_helper.to_array(tensor, os.fspath(self.path.parent))
                return np.asarray(array)
        return None

    def bytes(self, *, outputs: Sequence[str] = (), float32: bool = False) -> bytes:
        """A copy for a session.

        Args:
            outputs: Values to be outputs as well.
            float32: Whether activations are float32 throughout: nothing is rounded to int8, and a graph of float16 or bfloat16
                is widened, so that the structure and the weights can be checked to the precision of float32.

        Returns:
            The serialised model.
        """
        copy = self._copy()
        if float32:
            self._widen(copy.graph)
            for node in copy.graph.node:
                if node.op_type == _BLOCKWISE:
                    for attribute in node.attribute:
                        if attribute.name == "accuracy_level":
                            attribute.i = _FLOAT32_ACTIVATIONS
        there = {output.name for output in copy.graph.output}
        copy.graph.output.extend(self._onnx.ValueInfoProto(name=name) for name in outputs if name not in there)
        serialised: bytes = copy.SerializeToString()
        return serialised

    def _copy(self) -> Any:
        copy = self._onnx.ModelProto()
        copy.CopyFrom(self._model)
        return copy

    def _widen(self, graph: Any) -> None:
        """Makes float16 and bfloat16 float32: each weight is cast where it comes from, and everything else is computed so."""
        proto = self._onnx.TensorProto
        narrow = {proto.FLOAT16, proto.BFLOAT16}
        casts = []
        for tensor in graph.initializer:
            if tensor.data_type in narrow:
                name, tensor.name = tensor.name, f"{tensor.name}/narrow"
                casts.append(self._onnx.helper.make_node("Cast", [tensor.name], [name], f"{name}/wide", to=proto.FLOAT))
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i in narrow:
                    attribute.i = proto.FLOAT
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in narrow:
                value.type.tensor_type.elem_type = proto.FLOAT
        nodes = [*casts, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
