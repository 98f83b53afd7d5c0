"""Where a runtime first differs from the reference: the layer by its keys and values, the operation by its values.

Keys and values are outputs of a graph, so a pass over all layers finds the one whose keys differ first. Then a copy of the graph
shows every value of that layer and of the one before, and each is compared with the reference's value of the same name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext.models.config import LlamaConfig
from llama_ext.onnx.parity import Gates, Nearness, nearness
from llama_ext.onnx.parity_report import Fault
from llama_ext.onnx.reference import F64, Reference
from llama_ext.onnx.verification_graphs import GraphFile, Node
from llama_ext.onnx.verification_parties import OrtParty, Pass

__all__ = ["Place", "find_fault", "places"]

Array = npt.NDArray[Any]

_LAYER = re.compile(r"/layers\.(\d+)/(.+)")
# The project's name of the operation that gives a value of the reference.
_OPS = {
    "embedding": "embedding",
    "attention_norm": "rms_norm",
    "feed_forward_norm": "rms_norm",
    "final_norm": "rms_norm",
    "q": "matmul (q)",
    "k": "matmul (k)",
    "v": "matmul (v)",
    "q_rope": "rope",
    "k_rope": "rope",
    "attention": "attention",
    "o": "matmul (o)",
    "attention_residual": "residual",
    "feed_forward_residual": "residual",
    "gate": "matmul (gate)",
    "up": "matmul (up)",
    "swiglu": "swiglu",
    "down": "matmul (down)",
    "logits": "matmul (head)",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A value of the graph and the value of the reference that it has to be.

    Attributes:
        layer: Or None.
        name: Of the reference's value, without its layer.
        value: Of the graph.
        node: That gives it.
        keys: Whether it holds the keys of the past as well, (B, K, S, D).
    """

    layer: int | None
    name: str
    value: str
    node: str
    keys: bool = False

    @property
    def op(self) -> str:
        """The project's name of the operation."""
        return _OPS[self.name]

    @property
    def reference(self) -> str:
        """The reference's name of the value."""
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"


def places(nodes: Sequence[Node], config: LlamaConfig) -> list[Place]:
    """The values of a graph that the reference has as well, in the order of computation.

    Args:
        nodes: Of a graph that `export` wrote: their names say which operation they belong to.
        config: The model.

    Returns:
        The places.
    """
    groups: dict[tuple[int | None, str], list[tuple[int, Node]]] = {}
    for order, node in enumerate(nodes):
        match = _LAYER.fullmatch(node.name)
        layer, path = (int(match[1]), match[2]) if match else (None, node.name[1:])
        scope = path.rsplit("/", 1)[0] if "/" in path else ""
        groups.setdefault((layer, scope), []).append((order, node))
    found: list[tuple[int, Place]] = []
    for (layer, scope), members in groups.items():
        for order, name, node, value in _values(scope, members):
            found.append((order, Place(layer, name, value, node.name)))
    last = config.num_hidden_layers - 1
    return [
        # The last residual of a block belongs to the block, though it is made with the norm behind it.
        dataclasses.replace(place, layer=last if place.layer is None else place.layer - 1)
        if place.name == "feed_forward_residual"
        else place
        for _, place in sorted(found, key=lambda each: each[0])
    ]


def _values(scope: str, members: list[tuple[int, Node]]) -> Iterator[tuple[int, str, Node, str]]:
    """What a scope gives: (order, name of the reference's value, node, value)."""
    order, node = members[-1]
    if scope in ("attention_norm", "feed_forward_norm", "final_norm"):
        residual = "attention_residual" if scope == "feed_forward_norm" else "feed_forward_residual"
        first_order, first = members[0]
        if node.op_type == "SkipSimplifiedLayerNormalization":
            yield order, residual, node, node.outputs[-1]
        elif first.op_type == "Add":
            yield first_order, residual, first, first.outputs[0]
        yield order, scope, node, node.outputs[0]
    elif scope == "attention/rope":
        rotated = [each for each in members if each[1].op_type in ("RotaryEmbedding", "Concat")]
        for (at, each), name in zip(rotated, ("q_rope", "k_rope"), strict=False):
            yield at, name, each, each.outputs[0]
    elif scope == "attention":
        yield order, "attention", node, node.outputs[0]
    elif scope == "attention/qkv" and node.op_type == "Split":
        for name, value in zip("qkv", node.outputs, strict=False):
            yield order, name, node, value
    elif scope == "embedding":
        yield order, "embedding", node, node.outputs[0]
    elif scope == "head" or scope.startswith("head/"):
        if "logits" in node.outputs:
            yield order, "logits", node, "logits"
    else:
        name = scope.rsplit("/", 1)[-1]
        if scope in ("attention/q", "attention/k", "attention/v", "attention/o") or (
            scope in ("feed_forward/gate", "feed_forward/up", "feed_forward/swiglu", "feed_forward/down")
        ):
            yield order, name, node, node.outputs[0]


def find_fault(
    party: OrtParty, graph: GraphFile, reference: Reference, work: Pass, gates: Gates, *, float32: bool
) -> Fault | None:
    """The first layer and operation of a graph that differ from the reference in a pass.

    Args:
        party: The runtime, with the graph in question.
        graph: Its file.
        reference: With the stored weights.
        work: A pass in which it differs.
        gates: How far values may be off.
        float32: Whether the party computes in float32 throughout.

    Returns:
        The fault; None when every value that can be compared is within the gates.
    """
    order = places(graph.nodes, reference.config)
    near = order
    if party.has_cache:
        layer = _first_layer(party, reference, work, gates)
        near = [each for each in order if each.layer is None or each.layer in (layer - 1, layer)]
    shown = [each.value for each in near if each.name != "logits"]
    session = party.copy(graph.bytes(outputs=shown, float32=float32))
    expected = _reference_values(reference, work, {each.reference for each in near})
    for place in near:
        actual = session.values(work, [place.value])[0]
        found = _compare(actual, place, expected, work, reference.config)
        if not found.passes(gates):
            return Fault(
                party.name,
                place.layer,
                place.op,
                place.node,
                found.relative_rms,
                found.worst_position,
                gates.worst_position,
            )
    return None


def _first_layer(party: OrtParty, reference: Reference, work: Pass, gates: Gates) -> int:
    """The first layer whose keys or values differ; the number of layers when none does."""
    layers = reference.config.num_hidden_layers
    names = {f"layers.{layer}.{name}" for layer in range(layers) for name in ("k_rope", "v")}
    expected = _reference_values(reference, work, names)
    outputs = [f"present.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    for index, actual in enumerate(party.values(work, outputs)):
        layer, name = index // 2, ("k_rope", "v")[index % 2]
        place = Place(layer, name, outputs[index], "", keys=True)
        if not _compare(actual, place, expected, work, reference.config).passes(gates):
            return layer
    return layers


def _reference_values(reference: Reference, work: Pass, names: set[str]) -> dict[tuple[str, int], F64]:
    kept: dict[tuple[str, int], F64] = {}

    def probe(name: str, index: int, value: F64) -> None:
        if name in names:
            kept[name, index] = value

    reference.logits(work.sequences, positions=work.positions, probe=probe)
    return kept


def _compare(
    actual: Array, place: Place, expected: dict[tuple[str, int], F64], work: Pass, config: LlamaConfig
) -> Nearness:
    """A value of the graph against the reference's, for the real tokens of every row."""
    ours, theirs = [], []
    for row in range(len(work.sequences)):
        value = expected[place.reference, row]
        begin, end = work.columns(row, past=place.keys)
        tokens = _by_token(actual[row], value, config)[begin:end]
        theirs.append(value.reshape(len(value), -1)[len(value) - len(tokens) :])
        ours.append(tokens)
    return nearness(ours, theirs)


def _by_token(actual: Array, value: F64, config: LlamaConfig) -> Array:
    """(S, width) from (S, width), (S, heads, D) or (heads, S, D)."""
    if (
        actual.ndim == 3
        and value.ndim == 3
        and actual.shape[0] == value.shape[1]
        and actual.shape[2] == config.head_dim
    ):
        actual = np.swapaxes(actual, 0, 1)
    return actual.reshape(len(actual), -1)
