"""Exports in onnxruntime: golden logits, padding, chunks, published text; graphs that every checker accepts; the same bytes twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_ext
from onnx_runs import COMBINATIONS, GOLDEN, Run, each_combination, each_profile, onnx
from shared_data import SHARED, requires_shared
from tolerances import relative_rms

from llama_ext.onnx.exporting import ExportResult, export  # isort: skip

# Relative root mean squares against transformers' float64. float32: onnxruntime and transformers are about 1e-6 off.
LIMITS = {"float32": 2e-6, "float16": 4e-3}

pytestmark = pytest.mark.filterwarnings("ignore:optimum computes the head dimension:UserWarning")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exports a golden checkpoint, once."""
    made: dict[tuple[str, str, str], ExportResult] = {}

    def make(name: str, profile: str, dtype: str) -> ExportResult:
        key = (name, profile, dtype)
        if key not in made:
            source = SHARED / ("stories260K" if name == "stories260K" else f"golden/{name}")
            out = tmp_path_factory.mktemp("export")
            made[key] = export(source, out, profile=profile, dtype=dtype, verify=False)
        return made[key]

    return make


@requires_shared
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize(("profile", "dtype"), [pair for pair in COMBINATIONS if pair[1] in LIMITS], ids=str)
def test_logits_are_those_of_transformers(exported: Any, name: str, profile: str, dtype: str) -> None:
    golden = load_file(SHARED / "golden" / name / "golden.safetensors")
    run = Run(exported(name, profile, dtype).graph)
    logits, present = run(golden["input_ids"])
    assert logits.dtype == np.float32
    assert relative_rms(logits, golden["logits"]) < LIMITS[dtype]
    assert len(present) == len(run.past)


@requires_shared
@each_profile
@pytest.mark.parametrize("name", GOLDEN)
def test_greedy_tokens_through_the_cache_are_those_of_transformers(exported: Any, name: str, profile: str) -> None:
    expected = load_file(SHARED / "golden" / name / "golden.safetensors")["greedy_ids"][0].tolist()
    assert Run(exported(name, profile, "float32").graph).greedy(expected[:8], 24) == expected


@requires_shared
@each_profile
def test_stories260k_tells_the_published_story(exported: Any, profile: str) -> None:
    result = exported("stories260K", profile, "float32")
    tokenizer = llama_ext.Tokenizer.from_pretrained(result.directory)
    ids = Run(result.graph).greedy([1], 256)
    expected = (SHARED / "stories260K" / "greedy-256.txt").read_text(encoding="utf-8")
    assert tokenizer.decode(ids[1:]).strip() == expected.strip()


@requires_shared
@each_combination
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_in_a_prefill_and_after_it(exported: Any, side: str, profile: str, dtype: str) -> None:
    """Failures elsewhere: positions that count padding; masked rows of float16 that are infinite or NaN."""
    run = Run(exported("biases", profile, dtype).graph)
    rng = np.random.default_rng(1)
    long, short = rng.integers(3, 256, 21), rng.integers(3, 256, 9)
    width = len(long)
    padded = np.zeros(width, np.int64)
    mask = np.ones((2, width), np.int64)
    real = slice(width - len(short), width) if side == "left" else slice(0, len(short))
    padded[real] = short
    mask[1] = 0
    mask[1, real] = 1
    logits, past = run(np.stack([long, padded]), mask)
    assert np.isfinite(logits).all()
    alone, alone_past = run([short])
    # int8 activations of `ort` share a scale within a row of the batch, never across: rounding is all that is left.
    near = 3e-3 if dtype == "float16" else 2e-2 if profile == "ort" and dtype != "float32" else 1e-5
    assert relative_rms(logits[1, real], alone[0]) < near
    # The next tokens of both rows, with the padding in the cache.
    for token in (17, 200, 3):
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        logits, past = run([[5], [token]], mask, past)
        alone, alone_past = run([[token]], past=alone_past)
        assert relative_rms(logits[1, 0], alone[0, 0]) < near


@requires_shared
@each_combination
def test_a_text_in_chunks_is_the_text(exported: Any, profile: str, dtype: str) -> None:
    run = Run(exported("gqa-tied-llama3rope", profile, dtype).graph)
    ids = np.random.default_rng(2).integers(0, 256, (1, 40))
    whole, _ = run(ids)
    parts, past = [], None
    for first, last in ((0, 1), (1, 2), (2, 17), (17, 18), (18, 40)):
        logits, past = run(ids[:, first:last], past=past)
        parts.append(logits)
    near = 3e-3 if dtype == "float16" else 3e-2 if profile == "ort" and dtype != "float32" else 1e-5
    assert relative_rms(np.concatenate(parts, axis=1), whole) < near


@requires_shared
@each_profile
def test_the_last_position_of_the_context_is_right(exported: Any, profile: str) -> None:
    """Failure elsewhere: a cache of angles that is shorter than the context."""
    name = "gqa-tied-llama3rope"
    ids = np.random.default_rng(3).integers(0, 256, (1, 512))
    model = llama_ext.LlamaForCausalLM.from_pretrained(SHARED / "golden" / name, device="reference")
    logits, _ = Run(exported(name, profile, "float32").graph)(ids)
    assert relative_rms(logits[0, -3:], model(ids)[0, -3:]) < 3e-6


@requires_shared
@each_combination
@pytest.mark.parametrize("name", [*GOLDEN, "stories260K", "classifier", "train-gqa-tied"])
def test_checkers_accept_the_graph(exported: Any, name: str, profile: str, dtype: str, tmp_path: Path) -> None:
    graph = exported(name, profile, dtype).graph
    onnx.checker.check_model(str(graph), full_check=True)
    inferred = tmp_path / "inferred.onnx"
    onnx.shape_inference.infer_shapes_path(str(graph), str(inferred), check_type=True, strict_mode=True, data_prop=True)


@requires_shared
@each_combination
def test_inputs_and_outputs_are_what_the_runtimes_expect(exported: Any, profile: str, dtype: str) -> None:
    """Failures elsewhere: `present` without `past`, stray inputs, symbolic heads."""
    model = onnx.load(str(exported("wide-head-dim", profile, dtype).graph), load_external_data=False)

    def described(values: Any) -> list[tuple[str, int, list[Any]]]:
        return [
            (v.name, v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
            for v in values
        ]

    kv = onnx.TensorProto.FLOAT16 if dtype == "float16" else onnx.TensorProto.FLOAT
    ids = onnx.TensorProto.INT64
    past, present = (
        [
            (f"{kind}.{layer}.{what}", kv, ["batch_size", 2, length, 32])
            for layer in range(2)
            for what in ("key", "value")
        ]
        for kind, length in (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length"))
    )
    assert described(model.graph.input) == [
        ("input_ids", ids, ["batch_size", "sequence_length"]),
        ("attention_mask", ids, ["batch_size", "total_sequence_length"]),
        ("position_ids", ids, ["batch_size", "sequence_length"]),
        *past,
    ]
    logits = ("logits", onnx.TensorProto.FLOAT, ["batch_size", "sequence_length", 256])
    assert described(model.graph.output) == [logits, *present]


@requires_shared
@each_combination
def test_operators_are_those_of_the_profile(exported: Any, profile: str, dtype: str) -> None:
    """Failure elsewhere: onnxruntime's own operators in a file that is for others."""
    model = onnx.load(str(exported("stories260K", profile, dtype).graph), load_external_data=False)
    opsets = {each.domain: each.version for each in model.opset_import}
    assert opsets[""] == {"portable": 21 if dtype == "int4" else 17}.get(profile, 23)
    assert model.ir_version == {"portable": 10 if dtype == "int4" else 8}.get(profile, 11)
    kinds = {node.op_type for node in model.graph.node}
    own = {node.op_type for node in model.graph.node if node.domain}
    assert ("com.microsoft" in opsets) == (profile == "ort") == bool(own)
    if profile == "portable":
        assert not kinds & {"Attention", "RMSNormalization", "RotaryEmbedding", "Expand"}
    if profile == "ort":
        expected = {"GroupQueryAttention", "SkipSimplifiedLayerNormalization"}
        assert own == expected | ({"MatMulNBits", "GatherBlockQuantized"} if dtype != "float32" else set())
    assert "Swish" not in kinds


@requires_shared
@each_profile
def test_names_of_nodes_say_layer_and_operation(exported: Any, profile: str) -> None:
    model = onnx.load(str(exported("stories260K", profile, "float32").graph), load_external_data=False)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    scopes = {name.rsplit("/", 1)[0] for name in names}
    for layer in range(5):
        for part in ("attention/rope", "attention/o", "feed_forward/gate", "feed_forward/swiglu", "feed_forward_norm"):
            assert f"/layers.{layer}/{part}" in scopes


@requires_shared
@each_combination
def test_two_exports_are_equal_to_the_byte(exported: Any, profile: str, dtype: str, tmp_path: Path) -> None:
    first = exported("stories260K", profile, dtype)
    export(SHARED / "stories260K", tmp_path, profile=profile, dtype=dtype, verify=False)
    files = sorted(path.relative_to(first.directory) for path in first.directory.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for path in files:
        assert (first.directory / path).read_bytes() == (tmp_path / path).read_bytes(), path
    assert str(SHARED).encode() not in first.graph.read_bytes()


@requires_shared
@each_combination
def test_a_tied_table_is_stored_once(exported: Any, profile: str, dtype: str) -> None:
    """stories260K's table of 512 x 64 is an eighth of the model."""
    model = onnx.load(str(exported("stories260K", profile, dtype).graph), load_external_data=False)
    tables = [each for each in model.graph.initializer if np.prod(each.dims) == 512 * 64]
    assert len(tables) == 1


@requires_shared
@each_profile
def test_a_classifier_scores_as_transformers_does(exported: Any, profile: str) -> None:
    golden = load_file(SHARED / "golden" / "classifier" / "golden.safetensors")
    result = exported("classifier", profile, "float32")
    run = Run(result.graph)
    logits, _ = run(golden["input_ids"], golden["attention_mask"])
    assert logits.shape == (4, 3)
    assert relative_rms(logits, golden["logits"]) < LIMITS["float32"]
    # Padding on the left instead: the same scores.
    ids, mask = golden["input_ids"], golden["attention_mask"]
    shifted = np.stack([np.roll(row, -int(count)) for row, count in zip(ids, mask.sum(axis=1), strict=True)])
    mask = np.stack([np.roll(row, -int(count)) for row, count in zip(mask, mask.sum(axis=1), strict=True)])
    assert relative_rms(run(shifted, mask)[0], golden["logits"]) < LIMITS["float32"]
    assert not (result.directory / "genai_config.json").exists()


@pytest.mark.parametrize(
    ("profile", "dtype"),
    [
        ("standard", "float32"),
        ("standard", "bfloat16"),
        ("standard", "int8"),
        ("portable", "float32"),
        ("portable", "int8"),
    ],
)
def test_the_reference_of_onnx_computes_the_same(profile: str, dtype: str, tmp_path: Path) -> None:
    """NumPy, by the standard's own definitions: another implementation, and the one that has bfloat16 on a CPU."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="comes with onnx")
    reference = pytest.importorskip("onnx.reference", reason="comes with onnx")
    config = llama_ext.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = llama_ext.LlamaForCausalLM(config, seed=1, dtype=dtype, compute="exact")
    result = export(model, tmp_path, profile=profile, dtype=dtype, verify=False)
    run = reference.ReferenceEvaluator(str(result.graph))
    ids = np.random.default_rng(0).integers(0, 32, (2, 11))
    cache = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    past = {name: np.zeros((2, 2, 0, 8), cache) for name in run.input_names if name.startswith("past")}
    logits = []
    for first, last in ((0, 7), (7, 11)):
        feeds = {"input_ids": ids[:, first:last], "attention_mask": np.ones((2, last), np.int64)}
        positions = np.tile(np.arange(first, last), (2, 1))
        part, *present = run.run(None, {**feeds, "position_ids": positions, **past})
        past = dict(zip(past, present, strict=True))
        logits.append(part)
    assert relative_rms(np.concatenate(logits, axis=1), model(ids)) < (3e-2 if dtype == "bfloat16" else 3e-6)


def test_bfloat16_keeps_the_bits_and_is_not_run_on_a_cpu(tmp_path: Path) -> None:
    """Failure elsewhere: an export that onnxruntime cannot load is said to be fine."""
    config = llama_ext.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = llama_ext.LlamaForCausalLM(config, seed=1, dtype="bfloat16")
    result = export(model, tmp_path, dtype="bfloat16")
    assert result.report is None
    assert "bfloat16" in (result.not_verified or "")
    onnx.checker.check_model(str(result.graph), full_check=True)
    loaded = onnx.load(str(result.graph))
    by_name = {each.name: each for each in loaded.graph.initializer}
    up = by_name["model.layers.0.mlp.up_proj.weight"]
    assert up.data_type == onnx.TensorProto.BFLOAT16
    expected = model._core.read("layers.0.up")
    assert np.array_equal(np.frombuffer(up.raw_data, np.uint16).reshape(16, 24), expected.T)


@each_profile
def test_yarn_and_a_long_context_from_memory(profile: str, tmp_path: Path) -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        initializer_range=0.2,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    )
    model = llama_ext.LlamaForCausalLM(config, seed=2, device="reference")
    result = export(
        llama_ext.LlamaForCausalLM(config, seed=2), tmp_path, profile=profile, dtype="float32", verify=False
    )
    ids = np.random.default_rng(4).integers(0, 40, (1, 30))
    assert relative_rms(Run(result.graph)(ids)[0], model(ids)) < 2e-6
    cosines = next(each for each in onnx.load(str(result.graph)).graph.initializer if each.name == "rope.cos_cache")
    assert list(cosines.dims) == [4096, 4]


@each_profile
@pytest.mark.parametrize("head_dim", [2, 6, 10, 12])
def test_heads_of_any_dimension_run(head_dim: int, profile: str, tmp_path: Path) -> None:
    """Failure elsewhere: GroupQueryAttention takes multiples of 8 only, and says so when it runs."""
    config = llama_ext.LlamaConfig(
        vocab_size=40,
        hidden_size=30,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=head_dim,
        initializer_range=0.2,
    )
    model = llama_ext.LlamaForCausalLM(config, seed=2, device="reference")
    result = export(llama_ext.LlamaForCausalLM(config, seed=2), tmp_path, profile=profile, verify=False)
    ids = np.random.default_rng(4).integers(0, 40, (1, 17))
    run = Run(result.graph)
    first, past = run(ids[:, :9])
    second, _ = run(ids[:, 9:], past=past)
    assert relative_rms(np.concatenate([first, second], axis=1), model(ids)) < 2e-6


def test_one_directory_holds_several_dtypes(tmp_path: Path) -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = llama_ext.LlamaForCausalLM(config, seed=1)
    results = [export(model, tmp_path, dtype=dtype, verify=False) for dtype in ("float32", "int8", "int4")]
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    stems = ("model", "model_quantized", "model_q4")
    assert names == {f"{stem}.onnx{suffix}" for stem in stems for suffix in ("", "_data")}
    assert [result.graph.stem for result in results] == list(stems)
    for result in results:
        Run(result.graph)([[1, 2, 3]])
