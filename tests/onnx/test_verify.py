"""`verify`: every checkpoint in every profile and dtype passes; what the report says; what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from llama_ext._arrays import FloatArray
from onnx_runs import GOLDEN, PROFILES, onnx
from shared_data import SHARED, requires_shared

from llama_ext.onnx import metadata  # isort: skip
from llama_ext.onnx.exporting import export  # isort: skip
from llama_ext.onnx.profiles import PROFILES as BY_NAME  # isort: skip
from llama_ext.onnx.verification import ParityReport, verify  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore:optimum computes the head dimension:UserWarning")

CHECKPOINTS = [*(f"golden/{name}" for name in GOLDEN), "stories260K"]
KINDS = [(profile, dtype) for profile in PROFILES for dtype in BY_NAME[profile].dtypes]


@pytest.fixture(scope="module")
def tiny() -> llama_ext.LlamaForCausalLM:
    """Widths that no group and no vector divides, and few tokens."""
    config = llama_ext.LlamaConfig(
        vocab_size=67,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=48,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
    )
    return llama_ext.LlamaForCausalLM(config, seed=3, threads=1)


@pytest.fixture(scope="module")
def exported(tiny: llama_ext.LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of `tiny`, not to be changed."""
    folder = tmp_path_factory.mktemp("exported")
    export(tiny, folder, verify=False)
    return folder


@requires_shared
@pytest.mark.parametrize(("profile", "dtype"), KINDS, ids=lambda value: value)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoint_passes(tmp_path: Path, name: str, profile: str, dtype: str) -> None:
    export(SHARED / name, tmp_path, profile=profile, dtype=dtype, verify=False)
    report = verify(SHARED / name, tmp_path, steps=24, threads=1)
    assert report.passed, str(report)
    assert report.fault is None
    on_cpu = [] if dtype == "bfloat16" else ["onnxruntime"]
    exact = [] if dtype == "float32" else ["onnxruntime (float32)"]
    rounded = ["native (int8 activations)"] if dtype in ("int8", "int4") else []
    ran = {runtime for runtime, verdict in report.verdicts.items() if verdict == "passed"}
    assert ran == {"native", *on_cpu, *exact, *rounded}
    # Noise of float32 is a hundredth of what the gates allow: what is further away would be a mistake all the same.
    for check in report.checks:
        if check.runtime in ("native", "onnxruntime (float32)") or dtype == "float32":
            relative_rms = check.figures["relative_rms"]
            assert relative_rms is not None
            assert relative_rms < 5e-6, f"{check.runtime}, {check.name}"
    assert bool(report.loss) == (dtype != "float32")


@pytest.mark.parametrize(
    "options", [{}, {"group_size": 32}, {"symmetric": False}, {"group_size": 64, "symmetric": False}]
)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("profile", PROFILES)
def test_groups_and_minima_are_found_in_the_graph(
    tmp_path: Path, tiny: llama_ext.LlamaForCausalLM, profile: str, dtype: str, options: dict[str, Any]
) -> None:
    export(tiny, tmp_path, profile=profile, dtype=dtype, verify=False, **options)
    report = verify(tiny, tmp_path, steps=4, threads=1)
    assert report.passed, str(report)


def test_a_quantised_model_is_compared_with_its_own_codes(tmp_path: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    model = llama_ext.LlamaForCausalLM(tiny.config, seed=3, dtype="int4", group_size=32, threads=1)
    export(model, tmp_path, verify=False)
    report = verify(model, tmp_path, steps=4, threads=1)
    assert report.passed, str(report)
    assert not report.loss
    assert report.loss_note == "int4 holds them exactly"


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_loss_of_few_bits_is_told_apart(tmp_path: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    """int4 moves this model's logits by a third, and its implementation is right to a millionth all the same."""
    export(tiny, tmp_path, dtype="int4", verify=False)
    report = verify(tiny, tmp_path, steps=4, threads=1)
    assert report.passed
    assert report.loss["relative_rms"] is not None
    assert report.loss["relative_rms"] > 0.1
    exact = next(check for check in report.checks if check.runtime == "onnxruntime (float32)")
    assert exact.figures["relative_rms"] is not None
    assert exact.figures["relative_rms"] < 5e-6
    assert "stored as int4" in str(report)


def test_a_report_is_json_and_a_table(exported: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    report = verify(tiny, exported, steps=4, threads=1, record=False)
    record = json.loads(report.to_json())
    assert record["passed"] is True
    assert record["hash"] == report.hash
    assert record["profile"] == "standard"
    assert record["dtype"] == "float32"
    assert record["machine"]["threads"] == 1
    assert record["machine"]["isa"] == tiny.isa
    assert set(record["versions"]) >= {"llama_ext", "onnx", "onnxruntime", "numpy", "python"}
    assert set(record["files"]) >= {"config.json", "genai_config.json", "onnx/model.onnx", "onnx/model.onnx_data"}
    assert record["texts"]["tokens"] == 98
    assert record["verdicts"] == {"native": "passed", "onnxruntime": "passed"}
    first = record["checks"][0]
    assert set(first["figures"]) >= {
        "max_abs", "relative_rms", "worst_position", "kl_mean", "kl_p99", "kl_max", "top1", "top10", "perplexity_difference"
    }  # fmt: skip
    assert first["gates"] == {"relative_rms": 1e-4, "worst_position": 1e-4, "kl_mean": 1e-8}
    text = str(report)
    for part in ("onnxruntime", "greedy, KV cache", "token by token", "padded on the left", "PASSED", report.hash):
        assert part in text


def test_equal_reports_have_equal_hashes(exported: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    first, second = (verify(tiny, exported, steps=4, threads=1, record=False) for _ in range(2))
    assert first.seconds != second.seconds
    assert first.hash == second.hash
    assert verify(tiny, exported, steps=5, threads=1, record=False).hash != first.hash


def test_the_hash_goes_into_the_graph_and_does_not_change_what_it_is_of(
    tmp_path: Path, tiny: llama_ext.LlamaForCausalLM
) -> None:
    export(tiny, tmp_path, verify=False)
    graph = tmp_path / "onnx" / "model.onnx"
    report = verify(tiny, tmp_path, steps=4, threads=1)
    assert metadata.get_metadata(graph)[metadata.REPORT_KEY] == report.hash
    before = graph.read_bytes()
    assert verify(tiny, tmp_path, steps=4, threads=1).hash == report.hash
    assert graph.read_bytes() == before


def test_a_failure_takes_the_hash_of_an_older_success_away(tmp_path: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    export(tiny, tmp_path, verify=False)
    graph = tmp_path / "onnx" / "model.onnx"
    assert verify(tiny, tmp_path, steps=4, threads=1).passed
    other = llama_ext.LlamaForCausalLM(tiny.config, seed=4, threads=1)
    report = verify(other, tmp_path, steps=4, threads=1)
    assert not report.passed
    assert report.verdicts == {"native": "passed", "onnxruntime": "failed"}
    assert report.fault is not None
    assert report.fault.op == "embedding"
    assert not metadata.get_metadata(graph)[metadata.REPORT_KEY]


def test_a_file_that_changes_changes_the_hash(tmp_path: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    export(tiny, tmp_path, verify=False)
    first = verify(tiny, tmp_path, steps=4, threads=1)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + "\n")
    second = verify(tiny, tmp_path, steps=4, threads=1)
    assert first.files["config.json"] != second.files["config.json"]
    assert first.hash != second.hash


def test_stages_are_told(exported: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    told: list[str] = []
    verify(tiny, exported, steps=4, threads=1, record=False, progress=told.append)
    assert told == ["the native model", "onnxruntime", "the float64 reference"]


# -- what is compared -------------------------------------------------------------------------------------------------


def test_a_token_counts_as_another_one_only_beyond_the_noise(
    exported: Path, tiny: llama_ext.LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that takes the second best token, with logits that are right."""
    from llama_ext.onnx.verification_parties import Greedy, OrtParty

    honest = OrtParty.greedy

    def second_best(self: OrtParty, prompt: Any, steps: int) -> Greedy:
        right = honest(self, prompt, steps)
        return Greedy(right.prompt, np.argsort(right.logits, axis=1)[:, -2].astype(np.int32), right.logits)

    monkeypatch.setattr(OrtParty, "greedy", second_best)
    report = verify(tiny, exported, steps=1, threads=1, record=False)
    assert not report.passed
    (failed,) = [check for check in report.checks if not check.passed]
    assert failed.name == "greedy, KV cache"
    assert failed.figures["flips"] == 1
    assert "where" in failed.note
    assert "is noise" in failed.note


def test_another_token_within_the_noise_is_a_tie(
    tmp_path: Path, tiny: llama_ext.LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of the head are equal, so two tokens always have the same logit: either may be taken."""
    from llama_ext.onnx.verification_parties import Greedy, OrtParty

    model = llama_ext.LlamaForCausalLM(tiny.config, seed=3, threads=1)
    ids = np.arange(1, 9, dtype=np.int32)
    best = int(model(ids[None])[0, -1].argmax())
    twin = (best + 1) % 67
    head = model._core.read("head").copy()
    head[twin] = head[best]
    model._core.load("head", head, "float32")
    export(model, tmp_path, verify=False)

    def ties() -> object:
        report = verify(model, tmp_path, texts=[ids.tolist()], steps=1, threads=1)
        assert report.passed, str(report)
        (greedy,) = [
            check for check in report.checks if check.runtime == "onnxruntime" and check.name.startswith("greedy")
        ]
        assert greedy.figures["flips"] == 0
        return greedy.figures["ties"]

    honest = OrtParty.greedy

    def other(self: OrtParty, prompt: Any, steps: int) -> Greedy:
        right = honest(self, prompt, steps)
        (token,) = right.tokens
        assert token in (best, twin)
        return Greedy(right.prompt, np.array([best + twin - token], np.int32), right.logits)

    first = ties()
    monkeypatch.setattr(OrtParty, "greedy", other)
    # The reference prefers one of them.
    assert {first, ties()} == {0, 1}


def test_texts_may_be_given(exported: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    report = verify(tiny, exported, texts=[[1, 2, 3], list(range(48))], steps=2, threads=1, record=False)
    assert report.passed
    assert report.texts["tokens"] == 51
    assert report.texts["built_in"] is False


@pytest.mark.parametrize("texts", ["", ["Once", " \n"]])
def test_an_empty_text_is_refused_before_anything_is_compared(tmp_path: Path, texts: Any) -> None:
    export("demo", tmp_path, verify=False)
    # The demo's tokenizer would make a BOS token of it.
    with pytest.raises(llama_ext.OptionError, match=r"texts\[[01]\] is empty"):
        verify("demo", tmp_path, texts=texts)


@pytest.mark.parametrize("unknown", ["raise", "replace"])
def test_a_tokenizer_without_the_letters_of_our_texts_is_verified_on_random_ids(unknown: str, tmp_path: Path) -> None:
    tokenizer = llama_ext.Tokenizer.train("to be or not to be\n", kind="char", unknown=unknown)
    config = llama_ext.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        eos_token_id=None,
    )
    model = llama_ext.LlamaForCausalLM(config, tokenizer, seed=1)
    report = export(model, tmp_path, profile="portable").report
    assert report is not None
    assert report.passed
    assert report.texts["count"] == 3


def test_the_party_that_did_not_pass_is_named(
    tmp_path: Path, tiny: llama_ext.LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = verify
    monkeypatch.setattr(
        "llama_ext.onnx.verification.verify",
        lambda *args, **options: with_failed(compare(*args, **options), "native"),
    )
    with pytest.raises(llama_ext.NumericError, match=r"model\.onnx: native did not pass: its arithmetic"):
        export(tiny, tmp_path, profile="portable")


def with_failed(report: ParityReport, runtime: str) -> ParityReport:
    first = next(check for check in report.checks if check.runtime == runtime)
    return dataclasses.replace(report, checks=(dataclasses.replace(first, passed=False), *report.checks))


def test_a_single_token_leaves_out_what_needs_more(exported: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    report = verify(tiny, exported, texts=[[5]], steps=2, threads=1, record=False)
    assert report.passed, str(report)
    assert {skipped.name for skipped in report.not_run} == {"batch of two"}
    assert report.checks[0].figures["perplexity"] is None


@pytest.mark.parametrize("profile", PROFILES)
def test_the_end_of_a_long_context_is_entered_near_it(tmp_path: Path, profile: str) -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=40_000,
        initializer_range=0.2,
    )
    model = llama_ext.LlamaForCausalLM(config, seed=1, threads=1)
    export(model, tmp_path, profile=profile, verify=False)
    report = verify(model, tmp_path, steps=4, threads=1)
    assert report.passed, str(report)
    end = [check.runtime for check in report.checks if check.name == "end of the context"]
    assert end == ["onnxruntime"]
    assert [(skipped.runtime, skipped.name) for skipped in report.not_run] == [("native", "end of the context")]


def test_a_context_of_one_token_generates_nothing(tmp_path: Path) -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1,
    )
    model = llama_ext.LlamaForCausalLM(config, seed=1, threads=1)
    export(model, tmp_path, verify=False)
    report = verify(model, tmp_path, threads=1)
    assert report.passed, str(report)
    assert ("onnxruntime", "greedy, KV cache") in {(skipped.runtime, skipped.name) for skipped in report.not_run}


def test_of_several_graphs_the_last_export_is_verified(tmp_path: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    export(tiny, tmp_path, dtype="int8", verify=False)
    export(tiny, tmp_path, verify=False)
    assert verify(tiny, tmp_path, steps=2, threads=1).dtype == "float32"
    assert verify(tiny, tmp_path, steps=2, threads=1, variant="quantized").dtype == "int8"


# -- logits that are not numbers --------------------------------------------------------------------------------------


def test_figures_of_logits_that_are_not_finite_are_beyond_every_gate() -> None:
    from llama_ext.onnx.parity import GATES, compare_logits

    expected = np.random.default_rng(0).standard_normal((4, 7))
    for wrong in (math.nan, math.inf, -math.inf):
        actual: FloatArray = expected.astype(np.float32)
        actual[2, 3] = wrong
        found = compare_logits([actual], [expected], [np.arange(4)])
        assert not any(found.passes(gates) for gates in GATES.values())
        assert found.worst_at == 2


def test_one_wrong_position_does_not_drown_in_many_right_ones() -> None:
    from llama_ext.onnx.parity import GATES, compare_logits

    expected = np.random.default_rng(0).standard_normal((500, 30))
    actual = expected.astype(np.float32)
    actual[499] += 1e-3 * np.random.default_rng(1).standard_normal(30).astype(np.float32)
    found = compare_logits([actual], [expected], [np.arange(500) % 30])
    assert found.relative_rms < GATES["float32"].relative_rms
    assert not found.passes(GATES["float32"])
    assert found.worst_at == 499


def test_figures_are_those_of_their_definitions() -> None:
    from llama_ext.onnx.parity import compare_logits

    rng = np.random.default_rng(3)
    expected, ids = rng.standard_normal((6, 25)), rng.integers(0, 25, 6)
    actual = (expected + 0.1 * rng.standard_normal((6, 25))).astype(np.float32)
    found = compare_logits([actual], [expected], [ids])
    difference = actual.astype(np.float64) - expected
    p, q = (np.exp(each) / np.exp(each).sum(axis=1, keepdims=True) for each in (expected, actual.astype(np.float64)))
    kl = (p * np.log(p / q)).sum(axis=1)
    top = [len(set(np.argsort(a)[-10:]) & set(np.argsort(e)[-10:])) / 10 for a, e in zip(actual, expected, strict=True)]
    loss = -np.log(q[np.arange(5), ids[1:]]).mean()
    loss_reference = -np.log(p[np.arange(5), ids[1:]]).mean()
    for value, by_definition in (
        (found.max_abs, np.abs(difference).max()),
        (found.relative_rms, np.sqrt((difference**2).mean() / (expected**2).mean())),
        (found.kl_mean, kl.mean()),
        (found.kl_max, kl.max()),
        (found.kl_p99, np.quantile(kl, 0.99)),
        (found.top1, (actual.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        (found.top10, np.mean(top)),
        (found.perplexity, np.exp(loss)),
        (found.perplexity_difference, np.exp(loss - loss_reference) - 1),
    ):
        assert value == pytest.approx(by_definition, rel=1e-9)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_options_are_checked(exported: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"steps": 0}, "steps must be a whole number"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"threads": 0}, "threads must be a whole number"),
        ({"texts": []}, "texts must be"),
        ({"texts": "a text"}, "no tokenizer"),
        ({"texts": [[]]}, r"texts\[0\] has no tokens"),
        ({"variant": "q4"}, "has no variant 'q4'; it has model"),
    ]
    for options, message in wrong:
        with pytest.raises(llama_ext.OptionError, match=message):
            verify(tiny, exported, record=False, **options)
    with pytest.raises(llama_ext.TokenIdError):
        verify(tiny, exported, texts=[[67]], record=False)
    with pytest.raises(llama_ext.ContextLengthError, match="49 tokens"):
        verify(tiny, exported, texts=[[1] * 49], record=False)
    with pytest.raises(llama_ext.OptionError, match="a LlamaForCausalLM, a LlamaForSequenceClassification or a path"):
        verify(5, exported)  # type: ignore[arg-type]


def test_a_directory_without_a_graph_is_refused(tmp_path: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    with pytest.raises(llama_ext.FormatError, match="no such directory"):
        verify(tiny, tmp_path / "nothing")
    with pytest.raises(llama_ext.FormatError, match="export-onnx"):
        verify(tiny, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", b"\x08\x0b" * 50])
def test_a_file_that_is_no_graph_is_refused(
    tmp_path: Path, exported: Path, tiny: llama_ext.LlamaForCausalLM, content: bytes
) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "copy" / "onnx" / "model.onnx").write_bytes(content)
    with pytest.raises(llama_ext.LlamaExtError):
        verify(tiny, tmp_path / "copy")


def test_a_graph_of_another_program_is_refused(
    tmp_path: Path, exported: Path, tiny: llama_ext.LlamaForCausalLM
) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    path = tmp_path / "copy" / "onnx" / "model.onnx"
    proto = onnx.load(str(path), load_external_data=False)
    del proto.metadata_props[:]
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(llama_ext.FormatError, match="dtype must be one of"):
        verify(tiny, tmp_path / "copy")


def test_a_graph_without_its_weights_is_refused(
    tmp_path: Path, exported: Path, tiny: llama_ext.LlamaForCausalLM
) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "copy" / "onnx" / "model.onnx_data").unlink()
    with pytest.raises(llama_ext.FormatError, match=r"onnxruntime .* does not load it"):
        verify(tiny, tmp_path / "copy")


def test_stray_inputs_are_refused(tmp_path: Path, exported: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    path = tmp_path / "copy" / "onnx" / "model.onnx"
    proto = onnx.load(str(path), load_external_data=False)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1]))
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(llama_ext.FormatError, match="1 unexpected: use_cache_branch"):
        verify(tiny, tmp_path / "copy")


def test_a_model_of_another_shape_is_refused(tmp_path: Path, exported: Path) -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=67, hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=48,
    )  # fmt: skip
    other = llama_ext.LlamaForCausalLM(config, seed=1)
    with pytest.raises(
        llama_ext.OptionError, match=r"exported from another model: .* num_hidden_layers 2, this model has 3"
    ):
        verify(other, exported)
    # A graph alone, without the config beside it.
    shutil.copytree(exported / "onnx", tmp_path / "onnx")
    with pytest.raises(llama_ext.FormatError, match=r"2 missing: past_key_values\.2\.key, past_key_values\.2\.value"):
        verify(other, tmp_path)


def test_a_graph_of_another_model_is_not_blamed_on_quantisation(
    tmp_path: Path, tiny: llama_ext.LlamaForCausalLM
) -> None:
    export(tiny, tmp_path, dtype="int4", verify=False)
    # The demo is int8; and a model of the same shape that is.
    with pytest.raises(llama_ext.OptionError, match=r"exported from another model: .* vocab_size 67, this model has"):
        verify("demo", tmp_path)
    quantised = llama_ext.LlamaForCausalLM(tiny.config, seed=3, dtype="int8")
    with pytest.raises(
        llama_ext.OptionError, match=r"has int4 weights, which no export .* exported from another model"
    ):
        verify(quantised, tmp_path)


def test_groups_of_another_model_are_refused(tmp_path: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    model = llama_ext.LlamaForCausalLM(tiny.config, seed=3, dtype="int8", group_size=128)
    export(tiny, tmp_path, dtype="int8", group_size=32, verify=False)
    with pytest.raises(llama_ext.OptionError, match="exported from another model"):
        verify(model, tmp_path)


# -- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    from llama_ext.cli.main import main

    return main([str(argument) for argument in arguments])


@requires_shared
def test_the_command_prints_a_table_and_exits_with_zero_when_it_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = SHARED / "stories260K"
    export(path, tmp_path / "out", verify=False)
    (tmp_path / "text.txt").write_text("Once upon a time, there was a big dog.")
    report = tmp_path / "report.json"
    code = command(
        "verify-onnx",
        path,
        tmp_path / "out",
        "--text",
        tmp_path / "text.txt",
        "--steps",
        8,
        "--json",
        report,
        "--threads",
        1,
    )
    out = capsys.readouterr().out
    assert code == 0
    assert "PASSED: native passed, onnxruntime passed" in out
    record = json.loads(report.read_text())
    assert record["steps"] == 8
    assert record["texts"]["count"] == 1
    assert metadata.get_metadata(tmp_path / "out" / "onnx" / "model.onnx")[metadata.REPORT_KEY] == record["hash"]


def test_the_command_exits_with_one_when_it_failed(
    tmp_path: Path, exported: Path, tiny: llama_ext.LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llama_ext.LlamaForCausalLM(tiny.config, seed=9).save_pretrained(tmp_path / "other")
    code = command("verify-onnx", tmp_path / "other", exported, "--steps", 2, "--json", "-", "--no-record")
    record = json.loads(capsys.readouterr().out)
    assert code == 1
    assert record["passed"] is False
    assert record["fault"]["op"] == "embedding"


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("verify-onnx", "demo", tmp_path) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_reports_are_equal_to_themselves(exported: Path, tiny: llama_ext.LlamaForCausalLM) -> None:
    report = verify(tiny, exported, steps=2, threads=1, record=False)
    assert isinstance(report, ParityReport)
    assert verify(tiny, exported, steps=2, threads=1, record=False) == report
