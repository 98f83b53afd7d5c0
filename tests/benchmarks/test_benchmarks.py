"""The benchmarks count work rightly and refuse nonsense. Nothing is timed here."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import llama_ext
from benchmarks import generation, limits, measure, model, ops, report
from benchmarks.accounting import TINYLLAMA_1_1B, ModelShape
from benchmarks.file_bytes import gguf_decode_bytes
from benchmarks.limits import Limits
from benchmarks.random_model import ensure_model
from llama_ext import _core

# V 10, C 4, F 6, one layer, 2 heads of 2 and 1 key/value head. Matrices: q 4x4, k and v 2x4, o 4x4, gate and up 6x4,
# down 4x6: 16 + 8 + 8 + 16 + 24 + 24 + 24 = 120 weights; head 10x4 = 40.
SMALL = ModelShape(vocabulary=10, width=4, ffn_width=6, layers=1, heads=2, kv_heads=1, head_dim=2)

PRINTED: dict[str, Any] = {
    "bytes": 1 << 31,
    "huge_pages": True,
    "read_gb_per_s": {"1": 20.0, "2": 30.0},
    "peak_gflop_per_s": {
        "f32_mul_add_128": {"1": 25.0, "2": 50.0},
        "f32_fma_256": {"1": 50.0, "2": 100.0},
        "f32_fma_512": {"1": 60.0, "2": 120.0},
        "bf16_dot_512": {"1": 55.0, "2": 110.0},
        "int8_madd_256": {"1": 90.0, "2": 180.0},
        "int8_maddubs_256": {"1": 170.0, "2": 340.0},
        "int8_dot_256": {"1": 190.0, "2": 380.0},
        "int8_dot_512": {"1": 200.0, "2": 400.0},
    },
}


def test_weights_of_a_small_model_are_counted() -> None:
    assert SMALL.layer_matrices == {"qkv": (8, 4), "o": (4, 4), "gate_up": (12, 4), "down": (4, 6)}
    assert SMALL.block_parameters == 120
    assert SMALL.head_parameters == 40


def test_attention_counts_the_keys_each_query_sees() -> None:
    # 3 queries see 1 + 2 + 3 keys; each pair costs 2 D for the score and 2 D for the value, in 2 heads of 2.
    assert SMALL.attention_flop(3) == 6 * 4 * 2 * 2
    # One query after 5 others sees 6.
    assert SMALL.attention_flop(1, before=5) == 6 * 4 * 2 * 2


def test_prefill_counts_the_head_once() -> None:
    assert SMALL.prefill_flop(3) == 2 * 120 * 3 + 2 * 40 + 96


@pytest.mark.parametrize(("bytes_per_weight", "expected"), [(4.0, 640), (2.0, 320), (0.5625, 90)])
def test_decode_reads_every_matrix_and_the_head_but_not_the_embedding(bytes_per_weight: float, expected: int) -> None:
    assert SMALL.decode_bytes(bytes_per_weight) == expected


def test_the_shape_of_tinyllama_has_its_known_number_of_weights() -> None:
    norms = (2 * 22 + 1) * 2048
    embedding = TINYLLAMA_1_1B.head_parameters
    assert TINYLLAMA_1_1B.block_parameters + TINYLLAMA_1_1B.head_parameters + embedding + norms == 1_100_048_384


def test_a_shape_fills_in_what_an_old_config_lacks() -> None:
    config = {"vocab_size": 10, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    shape = ModelShape.from_config({**config, "num_attention_heads": 2})
    assert (shape.kv_heads, shape.head_dim, shape.tied_head) == (2, 2, False)


def gguf(path: Path, tensors: dict[str, int]) -> None:
    """A GGUF file of F32 vectors with that many elements, some metadata before them."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    entries = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    entries += text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc")
    entries += text("scores") + struct.pack("<IIQ", 9, 6, 3) + bytes(12)
    entries += text("general.alignment") + struct.pack("<II", 4, 64)
    infos, data = b"", b""
    for name, elements in tensors.items():
        infos += text(name) + struct.pack("<IQIQ", 1, elements, 0, len(data))
        data += bytes(-(-4 * elements // 64) * 64)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 4) + entries + infos
    path.write_bytes(head + bytes(-len(head) % 64) + data)


def test_gguf_bytes_leave_out_the_embedding_unless_it_is_the_head(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    gguf(file, {"token_embd.weight": 160, "blk.0.ffn_up.weight": 32, "output.weight": 160})
    assert gguf_decode_bytes(file) == 4 * (32 + 160)
    gguf(file, {"token_embd.weight": 160, "blk.0.ffn_up.weight": 32})
    assert gguf_decode_bytes(file) == 4 * (160 + 32)


def test_another_file_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(64))
    with pytest.raises(ValueError, match=r"x\.gguf: not a GGUF file"):
        gguf_decode_bytes(tmp_path / "x.gguf")


def test_limits_survive_json() -> None:
    parsed = Limits.from_dict(PRINTED)
    assert parsed.read == {1: 20.0, 2: 30.0}
    assert Limits.from_dict(json.loads(json.dumps(parsed.to_dict()))) == parsed
    assert parsed.to_dict() == PRINTED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read_gb_per_s": {}}, "read_gb_per_s"),
        ({"read_gb_per_s": {"one": 3.0}}, "read_gb_per_s"),
        ({"read_gb_per_s": {"1": 0.0}}, "read_gb_per_s"),
        ({"peak_gflop_per_s": {}}, "peak_gflop_per_s"),
        ({"peak_gflop_per_s": {"f32_fma_256": {"1": "fast"}}}, "f32_fma_256"),
        ({"bytes": "many"}, "bytes"),
        ({"more": 1}, "expected the keys"),
    ],
)
def test_limits_refuse_what_the_probe_does_not_print(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits.from_dict({**PRINTED, **change})


@pytest.mark.parametrize(
    ("kind", "isa", "expected"),
    [
        ("f32", None, ("f32_fma_512", 120.0)),
        ("f32", "avx2", ("f32_fma_256", 100.0)),
        ("f32", "x86-64-v2", ("f32_mul_add_128", 50.0)),
        ("bf16", None, ("f32_fma_512", 120.0)),  # here widening is faster than the instruction for bfloat16
        ("int8", "avx512-bf16", ("int8_dot_512", 400.0)),
        ("int8", "avx512", ("int8_dot_512", 400.0)),
        ("int8", "avx2-vnni", ("int8_dot_256", 380.0)),
        ("int8", "avx2", ("int8_maddubs_256", 340.0)),
        ("int8", "x86-64-v2", ("f32_mul_add_128", 50.0)),
    ],
)
def test_the_best_instruction_is_one_that_the_isa_has(kind: str, isa: str | None, expected: tuple[str, float]) -> None:
    assert Limits.from_dict(PRINTED).best_peak(kind, 2, isa) == expected


def test_every_probed_instruction_belongs_to_an_isa() -> None:
    table = limits.SOURCE.read_text(encoding="utf-8").split("peaks(const Features& f) {")[1].split("};")[0]
    probed = re.findall(r'\{"(\w+)", ', table)
    assert len(probed) == 11
    assert sorted(probed) == sorted(limits.instructions("amx"))


def test_best_of_probes_takes_each_rate_where_it_was_largest() -> None:
    slow = json.loads(json.dumps(PRINTED))
    slow["read_gb_per_s"]["2"] = 40.0
    slow["peak_gflop_per_s"]["f32_fma_512"]["2"] = 10.0
    best = limits.best_of([Limits.from_dict(PRINTED), Limits.from_dict(slow)])
    assert best.read[2] == 40.0
    assert best.peak["f32_fma_512"][2] == 120.0


@pytest.mark.parametrize(("threads", "counts"), [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
def test_thread_counts(threads: int, counts: list[int]) -> None:
    assert limits.default_thread_counts(threads) == counts


def test_the_command_for_models_has_sound_defaults() -> None:
    options = model.parse_arguments([])
    assert (options.prompt, options.tokens, options.threads, options.save) == (512, 32, 2, False)
    assert (options.gguf, options.openvino, options.genai, options.ctranslate2) == ([], [], [], [])


@pytest.mark.parametrize(
    "arguments",
    [["--prompt", "0"], ["--threads", "two"], ["--model", "x", "--layers", "2"], ["--model", "x", "--prepared"]],
)
def test_the_command_for_models_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        model.parse_arguments(arguments)
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--only", "matmul,conv"], ["--rows", "0"], ["--variants", "int3"]])
def test_the_command_for_operations_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ops.parse_arguments(arguments)
    assert "error" in capsys.readouterr().err


def test_every_engine_is_planned_or_its_absence_explained() -> None:
    options = model.parse_arguments(["--gguf", "a-q4_0.gguf", "--gguf", "a-bf16.gguf", "--peer-python", "other"])
    runs = model.planned_engines(options, Path("m"))
    assert [(run.engine, run.weights, run.kind) for run in runs] == [
        ("llama_ext", "float32", "f32"),
        ("llama_ext", "float16", "f32"),
        ("llama_ext", "bfloat16", "bf16"),
        ("llama_ext", "bfloat16 exact", "f32"),
        ("llama_ext", "int8", "int8"),
        ("llama_ext", "int4", "int8"),
        ("llama_ext", "int4 g32", "int8"),
        ("llama_ext", "a-q4_0 (GGUF)", "int8"),  # the other file holds what the checkpoint holds
        ("transformers", "float32", "f32"),
        ("transformers", "bfloat16", "bf16"),
        ("llama.cpp", "a-q4_0", "int8"),
        ("llama.cpp", "a-bf16", "bf16"),
        ("OpenVINO GenAI", "", "f32"),
        ("onnxruntime-genai", "", "f32"),
        ("CTranslate2", "", "f32"),
    ]
    assert runs[8].command[0] == "other"
    assert [run.error for run in runs[-3:]] == [
        f"not run: no --{name} given" for name in ("openvino", "genai", "ctranslate2")
    ]


def test_our_engine_is_told_what_to_load_and_how() -> None:
    runs = model.planned_engines(model.parse_arguments(["--gguf", "a-q4_0.gguf", "--only", "llama_ext"]), Path("m"))
    told = {run.weights: " ".join(run.command[3:]) for run in runs}
    assert told["bfloat16 exact"] == "--model m --dtype bfloat16 --compute exact"
    assert told["int4"] == "--model m --dtype int4"
    assert told["int4 g32"] == "--model m --dtype int4 --group-size 32"
    assert told["a-q4_0 (GGUF)"] == f"--model {Path('a-q4_0.gguf').resolve()} --dtype auto"
    assert [run.weights for run in runs if run.bytes_per_weight is not None] == [
        "float32",
        "float16",
        "bfloat16",
        "bfloat16 exact",
    ]


def test_engines_can_be_chosen_by_name() -> None:
    runs = model.planned_engines(model.parse_arguments(["--only", "llama_ext"]), Path("m"))
    assert [run.engine for run in runs] == ["llama_ext"] * 7


def test_a_row_shows_shares_of_the_best_probe() -> None:
    run = model.EngineRun("llama_ext", "float32", "f32", 4.0, [])
    # A prefill of 3 tokens is 896 operations, a third of that per token; decode reads 640 bytes per token.
    run.results.append({"prefill": [60e9 * 3 / 896, 30e9 * 3 / 896], "decode": [15e9 / 640], "read_beside": [20.0]})
    run.probes.append(0)
    slow = json.loads(json.dumps(PRINTED))
    slow["read_gb_per_s"] = {"2": 24.0}
    slow["peak_gflop_per_s"] = {name: {"2": rates["2"]} for name, rates in slow["peak_gflop_per_s"].items()}
    cells, record = model.row_of(run, SMALL, [Limits.from_dict(PRINTED), Limits.from_dict(slow)], 2, 3)
    assert math.isclose(record["prefill"]["share_of_limit"], 0.5)
    assert math.isclose(record["decode"]["share_of_limit"], 0.5)
    assert cells[4] == cells[7] == "50%"
    assert math.isclose(record["decode"]["share_of_reading_beside_it"], 0.75)
    assert cells[8:] == ["75%", "100% / 80%", "f32_fma_512"]


def test_reading_is_probed_before_the_prompt_and_after_the_decode_of_each_repeat() -> None:
    did: list[str] = []

    class Recorded:
        def reset(self) -> None:
            did.append("reset")

        def prefill(self, ids: list[int]) -> None:
            did.append("prefill")

        def decode(self, tokens: int) -> int:
            did.append("decode")
            return tokens

        def facts(self) -> dict[str, Any]:
            return {}

    probes = iter([10.0, 30.0, 40.0, 50.0])

    def read_rate() -> float:
        did.append("read")
        return next(probes)

    rates = measure.time_engine(Recorded(), [1, 2], 4, 2, read_rate)
    assert rates["read_beside"] == [20.0, 45.0]
    assert did == ["reset", "prefill", "decode", *["reset", "read", "prefill", "decode", "read"] * 2]
    assert measure.time_engine(Recorded(), [1, 2], 4, 2)["read_beside"] == []


def test_the_limit_of_an_operation_is_the_slower_of_arithmetic_and_reading() -> None:
    assert ops.share_of_limit(200, 10, 4e-9, peak=100.0, read=10.0) == (0.5, "compute")
    assert ops.share_of_limit(100, 20, 4e-9, peak=100.0, read=10.0) == (0.5, "read")


def test_every_engine_gets_the_same_prompt() -> None:
    ids = measure.prompt_ids(16, 100)
    assert ids == measure.prompt_ids(16, 100)
    assert min(ids) >= 3
    assert max(ids) < 100


def test_a_random_model_is_a_checkpoint(tmp_path: Path) -> None:
    directory = ensure_model(tmp_path, SMALL)
    assert ModelShape.from_directory(directory) == SMALL
    with safe_open(directory / "model.safetensors", "numpy") as file:
        names = set(file.keys())
        sizes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    assert len(names) == 3 + 9
    assert sizes["model.layers.0.mlp.down_proj.weight"] == (4, 6)
    raw = (directory / "model.safetensors").read_bytes()
    data = np.frombuffer(raw[8 + int.from_bytes(raw[:8], "little") :], dtype=np.uint16)
    embedding = (data[:40].astype(np.uint32) << np.uint32(16)).view(np.float32)
    assert 0.005 < embedding.std() < 0.05
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert ensure_model(tmp_path, SMALL) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    machine = {
        "date": "2024-01-02",
        "cpu": "Intel(R) Xeon(R) Processor @ 2.1GHz",
        "family_model_stepping": "6/1/1",
        "flags": ["fma"],
        "hypervisor": False,
        "usable_cpus": 2,
        "logical_cpus": 2,
        "last_level_cache_bytes": 1 << 25,
        "memory_bytes": 1 << 34,
        "kernel": "6",
        "python": "3",
        "source": "abc",
    }
    table = report.Table("T", ["a", "b"], [["x|y", "1"]])
    for number in ("", "-2"):
        files = report.save("Title", ["Note."], [table], {"machine": machine}, tmp_path)
        assert [file.name for file in files] == [f"2024-01-02-intel-xeon{number}.{kind}" for kind in ("json", "md")]
    text = files[1].read_text(encoding="utf-8")
    assert text.startswith("# Title\n")
    assert "| x\\|y | 1 |" in text


def test_the_cases_of_generation_do_the_same_work_in_other_ways() -> None:
    shape = ModelShape(vocabulary=300, width=64, ffn_width=40, layers=2, heads=4, kv_heads=2, head_dim=16)
    backend = _core.Backend("cpu", 1)
    large = generation.repeating_model(backend, shape, "float32")
    small = generation.repeating_model(backend, ModelShape(**{**vars(shape), "layers": 1}), "float32")
    found: dict[str, list[Any]] = {}
    passes: dict[str, list[int]] = {}
    for case in generation.cases(large, small, shape.vocabulary, 12):
        made = case.make()
        rows: dict[int, list[int]] = {}
        for row, token, _, _ in made.run(1 << 20):
            rows.setdefault(row, []).append(token)
        found.setdefault(case.group, []).append(rows)
        passes.setdefault(case.group, []).append(made.counts["passes"])
    text, rows_after_prompts, batch, shared, _ = found.values()
    assert all(rows == text[0] for rows in text)
    # More rows of the same prompts: what one row gives does not depend on the others.
    assert [len(rows) for rows in rows_after_prompts] == [1, 4, 8, 16]
    assert all(rows == {row: rows_after_prompts[-1][row] for row in rows} for rows in rows_after_prompts)
    assert all(rows == batch[0] for rows in batch)
    assert len(shared) == 2
    plain, *guessed = next(iter(passes.values()))
    assert plain == 24
    assert max(guessed) < 8


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_tokens_of_several_rows_are_timed_after_their_prompts(dtype: str) -> None:
    shape = ModelShape(vocabulary=300, width=64, ffn_width=96, layers=1, heads=4, kv_heads=2, head_dim=16)
    made = generation.repeating_model(_core.Backend("cpu", 1), shape, dtype)
    kept = made.types()
    assert kept["head"] == kept["embedding"] == ("int8", 64)
    assert (kept["layers.0.q"], kept["layers.0.o"], kept["layers.0.down"]) == ((dtype, 64), (dtype, 64), (dtype, 32))
    timed = {
        case.name: generation.time_case(case)
        for case in generation.cases(made, made, shape.vocabulary, 12)
        if case.group == generation.GROUPS["rows"]
    }
    # The first token of each row comes from its prompt. The others: a pass gives every row one.
    assert {name: case["tokens"] for name, case in timed.items()} == {
        "1 row": 11,
        "4 rows": 4 * 11,
        "8 rows": 8 * 11,
        "16 rows": 16 * 11,
    }
    assert {case["passes"] for case in timed.values()} == {11}
    assert timed["16 rows"]["tokens_run"] == 16 * 11


def test_a_model_as_from_pretrained_keeps_it() -> None:
    shape = ModelShape(vocabulary=300, width=64, ffn_width=96, layers=2, heads=4, kv_heads=2, head_dim=16)
    config = llama_ext.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    for dtype in ("int8", "int4"):
        expected = llama_ext.LlamaForCausalLM(config, dtype=dtype)._core.types()
        found = generation.repeating_model(_core.Backend("cpu", 1), shape, dtype).types()
        del expected[""], found[""]
        assert found == expected


@pytest.mark.parametrize("arguments", [["--dtype", "int3"], ["--only", "rows,columns"]])
def test_the_command_for_generation_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generation.parse_arguments(arguments)
    assert "unknown" in capsys.readouterr().err
