"""A mistake that is planted in an exported graph is found, and the layer and the operation are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from onnx_runs import each_profile, onnx

from llama_ext.onnx.exporting import export  # isort: skip
from llama_ext.onnx.verification import ParityReport, verify  # isort: skip


@pytest.fixture(scope="module")
def model() -> llama_ext.LlamaForCausalLM:
    """Four layers, so that layer 3 is the last one and layers 1 and 2 have neighbours on both sides."""
    config = llama_ext.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.1,
        eos_token_id=None,
        bos_token_id=None,
    )
    return llama_ext.LlamaForCausalLM(config, seed=3, threads=1)


def nodes_of(graph: Any, scope: str, *kinds: str) -> list[Any]:
    found = [node for node in graph.node if node.name.startswith(scope) and (not kinds or node.op_type in kinds)]
    assert found, f"no {kinds} in {scope}"
    return found


def insert(graph: Any, before: Any, kind: str, inputs: list[str], **attributes: Any) -> str:
    """A node in front of another one; gives its output."""
    output = f"planted_{len(graph.node)}"
    made = onnx.helper.make_node(kind, inputs, [output], output, **attributes)
    nodes = list(graph.node)
    place = next(index for index, node in enumerate(nodes) if node.name == before.name)
    del graph.node[:]
    graph.node.extend([*nodes[:place], made, *nodes[place:]])
    return output


def constant(graph: Any, value: Any) -> str:
    name = f"planted_constant_{len(graph.initializer)}"
    graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return name


def replace_input(graph: Any, name: str, old: str, new: str) -> None:
    node = next(each for each in graph.node if each.name == name)
    assert old in node.input
    node.input[:] = [new if each == old else each for each in node.input]


def planted(
    tmp_path: Path,
    model: llama_ext.LlamaForCausalLM,
    profile: str,
    plant: Callable[[Any], None],
    dtype: str = "float32",
) -> ParityReport:
    """The report on an export with a changed graph."""
    export(model, tmp_path, profile=profile, dtype=dtype, verify=False)
    path = next((tmp_path / "onnx").glob("*.onnx"))
    proto = onnx.load(str(path), load_external_data=False)
    plant(proto.graph)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return verify(model, tmp_path, steps=4, threads=1)


def assert_found(report: ParityReport, layer: int | None, op: str) -> None:
    assert not report.passed
    assert report.verdicts["native"] == "passed"
    assert report.verdicts["onnxruntime"] == "failed"
    assert report.fault is not None, str(report)
    assert (report.fault.layer, report.fault.op) == (layer, op), str(report.fault)
    place = "outside the layers" if layer is None else f"layer {layer}"
    assert f"{place}, {op}" in str(report)


def turn_wrongly(graph: Any) -> None:
    """Layer 3 turns by cosines that are a thousandth too large."""
    scope = "/layers.3/attention/"
    turning = nodes_of(graph, scope, "RotaryEmbedding", "GroupQueryAttention", "Mul")
    if turning[0].op_type == "Mul":
        # The first product of a rotation is with cosines.
        turning = nodes_of(graph, scope + "rope/", "Mul")
        cos = turning[0].input[1]
    else:
        cos = next(name for name in turning[0].input if "cos" in name)
    for node in [each for each in turning if cos in each.input]:
        wrong = insert(graph, node, "Mul", [cos, constant(graph, np.float32(1.001))])
        replace_input(graph, node.name, cos, wrong)


@each_profile
def test_a_wrong_rope_constant_in_layer_3_is_named(
    tmp_path: Path, model: llama_ext.LlamaForCausalLM, profile: str
) -> None:
    assert_found(planted(tmp_path, model, profile, turn_wrongly), 3, "rope")


@each_profile
def test_a_wrong_epsilon_in_layer_2_is_named(tmp_path: Path, model: llama_ext.LlamaForCausalLM, profile: str) -> None:
    def plant(graph: Any) -> None:
        for node in nodes_of(graph, "/layers.2/attention_norm/"):
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = 1e-2
            if profile == "portable" and node.op_type == "Add" and node.input[1].startswith("/constants/"):
                node.input[1] = constant(graph, np.float32(1e-2))

    assert_found(planted(tmp_path, model, profile, plant), 2, "rms_norm")


@each_profile
@pytest.mark.parametrize(
    ("scope", "op"),
    [
        ("attention/o", "matmul (o)"),
        ("feed_forward/gate", "matmul (gate)"),
        ("feed_forward/up", "matmul (up)"),
        ("feed_forward/down", "matmul (down)"),
    ],
)
def test_a_wrong_weight_in_layer_1_is_named(
    tmp_path: Path, model: llama_ext.LlamaForCausalLM, profile: str, scope: str, op: str
) -> None:
    def plant(graph: Any) -> None:
        node = nodes_of(graph, f"/layers.1/{scope}/", "MatMul")[0]
        weight = node.input[1]
        wrong = insert(graph, node, "Mul", [weight, constant(graph, np.float32(1.001))])
        replace_input(graph, node.name, weight, wrong)

    assert_found(planted(tmp_path, model, profile, plant), 1, op)


@each_profile
def test_a_missing_residual_is_named(tmp_path: Path, model: llama_ext.LlamaForCausalLM, profile: str) -> None:
    def plant(graph: Any) -> None:
        node = nodes_of(graph, "/layers.2/feed_forward_norm/")[0]
        stream = node.input[0]
        nothing = insert(graph, node, "Mul", [stream, constant(graph, np.float32(0.0))])
        replace_input(graph, node.name, stream, nothing)

    assert_found(planted(tmp_path, model, profile, plant), 2, "residual")


@pytest.mark.parametrize("profile", ["portable", "standard"])
def test_attention_that_sees_the_future_is_named(
    tmp_path: Path, model: llama_ext.LlamaForCausalLM, profile: str
) -> None:
    def plant(graph: Any) -> None:
        node = nodes_of(graph, "/attention_mask/", "LessOrEqual")[0]
        other = insert(graph, node, "Sub", [node.input[0], constant(graph, np.int64(1))])
        replace_input(graph, node.name, node.input[0], other)

    assert_found(planted(tmp_path, model, profile, plant), 0, "attention")


@each_profile
def test_a_wrong_head_is_named(tmp_path: Path, model: llama_ext.LlamaForCausalLM, profile: str) -> None:
    def plant(graph: Any) -> None:
        node = nodes_of(graph, "/head/", "MatMul")[0]
        wrong = insert(graph, node, "Mul", [node.input[1], constant(graph, np.float32(1.001))])
        replace_input(graph, node.name, node.input[1], wrong)

    assert_found(planted(tmp_path, model, profile, plant), None, "matmul (head)")


@each_profile
def test_padding_that_is_attended_to_is_found(tmp_path: Path, model: llama_ext.LlamaForCausalLM, profile: str) -> None:
    """Padding on the right follows every token, which cannot see it anyway: only batches padded on the left are wrong."""

    def plant(graph: Any) -> None:
        node = nodes_of(graph, "/attention_mask/", "Cast")[0]
        ones = insert(graph, node, "Max", ["attention_mask", constant(graph, np.int64(1))])
        replace_input(graph, node.name, "attention_mask", ones)

    report = planted(tmp_path, model, profile, plant)
    failed = [check.name for check in report.checks if not check.passed]
    assert failed == ["batch padded on the left", "padding in the KV cache"]
    assert report.fault is not None
    assert (report.fault.layer, report.fault.op) == (0, "attention")


@each_profile
def test_positions_that_begin_anew_with_each_run_are_found(
    tmp_path: Path, model: llama_ext.LlamaForCausalLM, profile: str
) -> None:
    """A whole text is right; what goes on with a cache is not, as every token has position 0, 1, ... of its own run."""

    def plant(graph: Any) -> None:
        users = [node for node in graph.node if "position_ids" in node.input]
        first = users[0]
        shape = insert(graph, first, "Shape", ["input_ids"])
        count = insert(graph, first, "Gather", [shape, constant(graph, np.int64(1))], axis=0)
        begin, step = constant(graph, np.int64(0)), constant(graph, np.int64(1))
        wrong = insert(graph, first, "Expand", [insert(graph, first, "Range", [begin, count, step]), shape])
        for node in users:
            replace_input(graph, node.name, "position_ids", wrong)

    report = planted(tmp_path, model, profile, plant)
    failed = {check.name for check in report.checks if not check.passed}
    kept = {"greedy, KV cache", "in chunks", "token by token", "padding in the KV cache", "end of the context"}
    assert failed == kept
    assert report.fault is not None
    assert (report.fault.layer, report.fault.op) == (0, "rope")


@pytest.mark.parametrize("profile", ["portable", "standard"])
def test_a_table_of_angles_that_ends_before_the_context_is_found(
    tmp_path: Path, model: llama_ext.LlamaForCausalLM, profile: str
) -> None:
    def plant(graph: Any) -> None:
        for table in [each for each in graph.initializer if each.name.startswith("rope.")]:
            rows = table.dims[0]
            table.dims[0] = rows - 3
            for entry in table.external_data:
                if entry.key == "length":
                    entry.value = str(int(entry.value) * (rows - 3) // rows)

    report = planted(tmp_path, model, profile, plant)
    assert not report.passed
    (failed,) = [check for check in report.checks if not check.passed]
    assert failed.name == "end of the context"
    assert "onnxruntime" in failed.note


def test_a_present_without_its_past_is_found(tmp_path: Path, model: llama_ext.LlamaForCausalLM) -> None:
    """The keys of the cache of layer 1 are those of another place."""

    def plant(graph: Any) -> None:
        node = nodes_of(graph, "/layers.1/attention/", "Concat")
        joined = next(each for each in node if each.output[0] == "present.1.value")
        past = joined.input[0]
        wrong = insert(graph, joined, "Mul", [past, constant(graph, np.float32(0.0))])
        replace_input(graph, joined.name, past, wrong)

    report = planted(tmp_path, model, "portable", plant)
    failed = {check.name for check in report.checks if not check.passed}
    kept = {"greedy, KV cache", "in chunks", "token by token", "padding in the KV cache", "end of the context"}
    assert failed == kept
    assert report.fault is not None
    assert (report.fault.layer, report.fault.op) == (1, "attention")


def test_a_fault_below_the_noise_of_int8_activations_is_found(
    tmp_path: Path, model: llama_ext.LlamaForCausalLM
) -> None:
    """The graph as it runs is within the gates of its rounding; in float32 the mistake shows."""
    report = planted(tmp_path, model, "ort", turn_wrongly, dtype="int8")
    assert report.verdicts["onnxruntime"] == "passed"
    assert report.verdicts["onnxruntime (float32)"] == "failed"
    assert not report.passed
    assert report.fault is not None
    assert (report.fault.layer, report.fault.op) == (3, "rope")


def test_codes_in_the_wrong_order_are_found(tmp_path: Path, model: llama_ext.LlamaForCausalLM) -> None:
    export(model, tmp_path, profile="standard", dtype="int4", verify=False)
    path = tmp_path / "onnx" / "model_q4.onnx"
    proto = onnx.load(str(path), load_external_data=False)
    table = next(each for each in proto.graph.initializer if each.name.endswith("layers.2.mlp.up_proj.weight.codes"))
    places = {entry.key: entry.value for entry in table.external_data}
    data = tmp_path / "onnx" / places["location"]
    content = bytearray(data.read_bytes())
    begin, length = int(places["offset"]), int(places["length"])
    part = np.frombuffer(content[begin : begin + length], np.uint8)
    content[begin : begin + length] = ((part << 4) | (part >> 4)).astype(np.uint8).tobytes()
    data.write_bytes(content)
    report = verify(model, tmp_path, steps=4, threads=1)
    assert not report.passed
    assert report.fault is not None
    assert (report.fault.layer, report.fault.op) == (2, "matmul (up)")
