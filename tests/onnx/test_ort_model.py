"""`OrtModel`: an exported model in onnxruntime generates what the native one does, with the same options."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_ext
from onnx_runs import GOLDEN, PROFILES, each_profile, onnx
from shared_data import LETTERS, SHARED, requires_shared

from llama_ext.onnx.exporting import export  # isort: skip
from llama_ext.onnx.ort_model import OrtModel  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore:optimum computes the head dimension:UserWarning")

STORIES = SHARED / "stories260K"
PROMPTS = ["Once upon a time", "The", "A big dog ran to the park because"]


@pytest.fixture(scope="module")
def native() -> llama_ext.LlamaForCausalLM:
    """stories260K where it is, else the model of letters."""
    return llama_ext.LlamaForCausalLM.from_pretrained(
        STORIES if STORIES.is_dir() else LETTERS, dtype="float32", threads=1
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same, exported in each profile."""
    result = {}
    for profile in PROFILES:
        result[profile] = tmp_path_factory.mktemp(profile)
        source = STORIES if STORIES.is_dir() else LETTERS
        export(source, result[profile], profile=profile, dtype="float32", verify=False)
    return result


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, OrtModel]:
    return {profile: OrtModel(folder, threads=1) for profile, folder in folders.items()}


@requires_shared
@each_profile
def test_stories260k_prints_its_published_text(models: dict[str, OrtModel], profile: str) -> None:
    expected = (STORIES / "greedy-256.txt").read_text(encoding="utf-8").rstrip("\n")
    assert models[profile].generate("", max_new_tokens=256, do_sample=False) == expected


@requires_shared
@pytest.mark.parametrize("name", GOLDEN)
@each_profile
def test_greedy_ids_are_those_of_transformers(tmp_path: Path, profile: str, name: str) -> None:
    export(SHARED / "golden" / name, tmp_path, profile=profile, verify=False)
    expected = load_file(SHARED / "golden" / name / "golden.safetensors")["greedy_ids"]
    model = OrtModel(tmp_path, threads=1)
    assert model.tokenizer is None
    found = model.generate(expected[:, :8], max_new_tokens=24, eos_token_id=[])
    np.testing.assert_array_equal(found, expected)


SAMPLING: list[dict[str, Any]] = [
    {"do_sample": False},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.1, "top_k": 20, "seed": 4, "num_return_sequences": 2},
    {"top_p": 0.9, "min_p": 0.02, "seed": 2**63},
    {"temperature": 1.2, "seed": 5, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"temperature": 0.8, "seed": 6, "logit_bias": {5: -100.0, 9: 2.0}, "stop": [".", "he"]},
]


@pytest.mark.parametrize("options", SAMPLING, ids=lambda options: "-".join(map(str, options)))
@each_profile
def test_equal_logits_give_equal_texts(
    models: dict[str, OrtModel], native: llama_ext.LlamaForCausalLM, profile: str, options: dict[str, Any]
) -> None:
    """Batches of unequal prompts, by the random numbers of the native model."""
    theirs = native.generate(PROMPTS, max_new_tokens=40, return_details=True, **options)
    ours = models[profile].generate(PROMPTS, max_new_tokens=40, return_details=True, **options)
    assert len(ours) == len(theirs)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.text == right.text
        assert mine.token_ids == right.token_ids
        assert mine.finish_reason == right.finish_reason
        assert mine.prompt_ids == right.prompt_ids
        np.testing.assert_allclose(mine.logprobs, right.logprobs, atol=5e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 16])
@each_profile
def test_rows_begin_where_others_end(
    models: dict[str, OrtModel], native: llama_ext.LlamaForCausalLM, profile: str, size: int
) -> None:
    """Seven rows that end after 1 to 13 tokens, two of them at once at most, and so on: nobody notices."""
    vocabulary = native.config.vocab_size
    prompts = [[1 + (7 * row + at) % (vocabulary - 1) for at in range(2 + 3 * (row % 3))] for row in range(7)]
    for options in ({"max_length": 15, "do_sample": False}, {"max_length": 15, "temperature": 1.0, "seed": 8}):
        theirs = native.generate(prompts, eos_token_id=[], **options)
        ours = models[profile].generate(prompts, eos_token_id=[], max_batch_size=size, **options)
        assert ours == theirs


def test_pieces_of_a_stream_are_the_text(models: dict[str, OrtModel], native: llama_ext.LlamaForCausalLM) -> None:
    model = models["standard"]
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.8, "seed": 2, "stop": ["."]}
    pieces = list(model.stream_generate(PROMPTS, **options))
    theirs = list(native.stream_generate(PROMPTS, **options))
    assert [(p.row, p.text, p.token_id, p.finish_reason) for p in pieces] == [
        (p.row, p.text, p.token_id, p.finish_reason) for p in theirs
    ]
    texts = model.generate(PROMPTS, **options)
    for row, prompt in enumerate(PROMPTS):
        assert prompt + "".join(piece.text for piece in pieces if piece.row == row) == texts[row]


def test_no_tokens_are_no_tokens(models: dict[str, OrtModel]) -> None:
    model = models["standard"]
    assert model.generate("The", max_new_tokens=0) == "The"
    assert model.generate([], max_new_tokens=3) == []
    (piece,) = model.stream_generate("The", max_new_tokens=0)
    assert (piece.token_id, piece.finish_reason) == (None, "length")


def test_an_end_token_ends_a_row(models: dict[str, OrtModel], native: llama_ext.LlamaForCausalLM) -> None:
    found = models["standard"].generate("The", max_new_tokens=20, do_sample=False, return_details=True, eos_token_id=[])
    end = found.token_ids[7]
    first = found.token_ids.index(end)
    again = models["standard"].generate(
        "The", max_new_tokens=20, do_sample=False, return_details=True, eos_token_id=end
    )
    assert again.token_ids == found.token_ids[: first + 1]
    assert again.finish_reason == "stop"
    assert models["standard"].eos_token_ids == native.eos_token_ids


def test_a_prompt_as_long_as_the_context_is_taken_in_pieces(
    models: dict[str, OrtModel], native: llama_ext.LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its logits would take much memory."""
    context, vocabulary = native.config.max_position_embeddings, native.config.vocab_size
    ids = [1 + (5 * at) % (vocabulary - 1) for at in range(context - 4)]
    whole = models["standard"].generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=[])
    monkeypatch.setattr("llama_ext.onnx.ort_model_generation._LOGITS_BYTES", 4 * vocabulary * 7)
    assert models["standard"].generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=[]) == whole
    assert native.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=[]) == whole
    with pytest.raises(llama_ext.ContextLengthError):
        models["standard"].generate(ids, max_new_tokens=5)


def test_chat_ends_at_the_end_of_a_turn(tmp_path: Path) -> None:
    """A model with a template, exported with it."""
    shutil.copytree(LETTERS, tmp_path / "chat")
    path = tmp_path / "chat" / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.role | upper }}:\n{{ m.content }}\n\n{% endfor %}ROMEO:\n"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template, "eos_token": "."}))
    export(tmp_path / "chat", tmp_path / "out", dtype="float32", verify=False)
    native = llama_ext.LlamaForCausalLM.from_pretrained(tmp_path / "chat", dtype="float32")
    model = OrtModel(tmp_path / "out", threads=1)
    messages = [{"role": "user", "content": "What is it?"}]
    options: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0.5, "seed": 11}
    answer = model.chat(messages, **options)
    assert answer == native.chat(messages, **options)
    streamed = model.chat(messages, stream=True, **options)
    assert not isinstance(streamed, str)
    assert "".join(piece.text for piece in streamed) == answer


@each_profile
def test_logits_do_not_depend_on_padding(
    models: dict[str, OrtModel], native: llama_ext.LlamaForCausalLM, profile: str
) -> None:
    rng = np.random.default_rng(2)
    ids = rng.integers(1, native.config.vocab_size, (3, 12))
    mask = np.ones((3, 12), np.int64)
    mask[1, :5] = 0
    mask[2, 9:] = 0
    found = models[profile](ids, mask)
    expected = native(ids, mask)
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[mask == 0], 0)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    np.testing.assert_allclose(models[profile](ids.tolist()), native(ids), atol=2e-4)
    assert models[profile](np.zeros((0, 4), np.int64)).shape == (0, 4, native.config.vocab_size)


def test_arguments_are_those_of_the_native_model(models: dict[str, OrtModel]) -> None:
    model = models["standard"]
    with pytest.raises(llama_ext.ShapeError):
        model(np.zeros(3, np.int64))
    with pytest.raises(llama_ext.DTypeError):
        model(np.zeros((1, 3)))
    with pytest.raises(llama_ext.TokenIdError):
        model(np.full((1, 3), model.config.vocab_size))
    with pytest.raises(llama_ext.ContextLengthError):
        model(np.ones((1, model.config.max_position_embeddings + 1), np.int64))
    with pytest.raises(llama_ext.OptionError, match="unknown option 'tempreature'"):
        model.generate("The", tempreature=1.0)  # type: ignore[call-arg]
    with pytest.raises(llama_ext.OptionError, match="give one of them"):
        model.generate("The", max_new_tokens=1, max_length=5)


def test_what_it_does_not_do_is_said(models: dict[str, OrtModel], native: llama_ext.LlamaForCausalLM) -> None:
    model = models["standard"]
    with pytest.raises(llama_ext.UnsupportedError, match="beam search"):
        model.generate("The", num_beams=2)
    with pytest.raises(llama_ext.UnsupportedError, match="pass num_beams=1"):
        model.generate("The", generation_config={"num_beams": 2})
    with pytest.raises(llama_ext.UnsupportedError, match="prompt_lookup_num_tokens"):
        model.generate("The", prompt_lookup_num_tokens=4)
    with pytest.raises(llama_ext.UnsupportedError, match="an exported model has no adapters"):
        model.generate("a", adapter="pirate")
    with pytest.raises(llama_ext.UnsupportedError, match="draft_model"):
        model.stream_generate("The", draft_model=native)


def test_an_interrupted_step_is_taken_again(models: dict[str, OrtModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during a pass: no row has advanced, and going on gives the rest."""
    from llama_ext.onnx.ort_model_generation import OrtGeneration
    from llama_ext.onnx.ort_model_session import OrtSession

    model = models["standard"]
    prompts = [np.array([1, 5, 9], np.int32), np.array([1, 7], np.int32)]
    options: dict[str, Any] = {"sampling": {}, "max_new_tokens": [6, 6], "eos": [], "seed": 0}
    expected = OrtGeneration(model._session, prompts, **options).run(100)
    run = OrtSession.run
    calls = 0

    def interrupted(self: OrtSession, *arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        result = run(self, *arguments, **more)
        if calls in (1, 3, 7, 10):  # the first prompt, the second one, and passes of both rows
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(OrtSession, "run", interrupted)
    generation = OrtGeneration(model._session, prompts, **options)
    events, interruptions = [], 0
    for _ in range(20):
        with contextlib.suppress(KeyboardInterrupt):
            interruptions += 1
            events += generation.step()
            interruptions -= 1
    assert interruptions == 4
    assert generation.done
    assert events == expected


def test_a_variant_is_chosen_by_its_name(tmp_path: Path) -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = llama_ext.LlamaForCausalLM(config, seed=1)
    for dtype in ("int8", "float16"):
        export(model, tmp_path, dtype=dtype, verify=False)
    with pytest.raises(llama_ext.OptionError, match="has model_fp16, model_quantized: say which"):
        OrtModel(tmp_path)
    assert OrtModel(tmp_path, "quantized").dtype == "int8"
    half = OrtModel(tmp_path, variant="model_fp16")
    assert (half.dtype, half.kv_dtype, half.profile) == ("float16", "float16", "standard")
    assert len(half.generate([1, 2], max_new_tokens=5, eos_token_id=[])) == 7
    export(model, tmp_path, dtype="float32", verify=False)
    assert OrtModel(tmp_path).dtype == "float32"
    with pytest.raises(llama_ext.OptionError, match="no variant 'q4'"):
        OrtModel(tmp_path, "q4")
    assert "model_fp16.onnx, profile standard, float16" in repr(half)


def test_a_graph_of_bfloat16_says_that_a_cpu_cannot_run_it(tmp_path: Path) -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    export(llama_ext.LlamaForCausalLM(config, seed=1), tmp_path, dtype="bfloat16", verify=False)
    with pytest.raises(llama_ext.UnsupportedError, match="bfloat16 graphs are for GPUs"):
        OrtModel(tmp_path)


def test_bad_directories_are_told(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(llama_ext.FormatError, match="no such directory"):
        OrtModel(tmp_path / "nothing")
    with pytest.raises(llama_ext.FormatError, match="export-onnx"):
        OrtModel(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folders["standard"], copy)
    (copy / "config.json").unlink()
    with pytest.raises(llama_ext.FormatError, match=r"config\.json"):
        OrtModel(copy)
    with pytest.raises(llama_ext.OptionError, match="threads must be"):
        OrtModel(folders["standard"], threads=0)


def test_a_graph_that_is_cut_short_is_told(tmp_path: Path, folders: dict[str, Path]) -> None:
    """At every hundredth byte, and each time an error of ours."""
    copy = tmp_path / "copy"
    shutil.copytree(folders["standard"], copy)
    graph = copy / "onnx" / "model.onnx"
    content = graph.read_bytes()
    for size in range(0, len(content) - 1, max(len(content) // 100, 1)):
        graph.write_bytes(content[:size])
        with pytest.raises(llama_ext.LlamaExtError):
            OrtModel(copy, threads=1)
    data = copy / "onnx" / "model.onnx_data"
    graph.write_bytes(content)
    data.write_bytes(data.read_bytes()[:-1000])
    with pytest.raises(llama_ext.LlamaExtError):
        OrtModel(copy, threads=1)


@requires_shared
def test_a_classifier_does_not_generate(tmp_path: Path) -> None:
    export(SHARED / "golden" / "classifier", tmp_path, verify=False)
    with pytest.raises(llama_ext.FormatError, match="it classifies"):
        OrtModel(tmp_path)


def test_without_onnxruntime_it_says_what_to_install(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(llama_ext.UnsupportedError, match=r"pip install 'llama_ext\[onnx\]'"):
        OrtModel(folders["standard"])


def test_a_graph_for_a_newer_onnxruntime_is_told(tmp_path: Path, folders: dict[str, Path]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders["standard"], copy)
    path = copy / "onnx" / "model.onnx"
    for change in ("ir", "opset"):
        proto = onnx.load(str(folders["standard"] / "onnx" / "model.onnx"), load_external_data=False)
        if change == "ir":
            proto.ir_version = 99
        else:
            proto.opset_import[0].version = 99
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(llama_ext.UnsupportedError, match="too old for this graph"):
            OrtModel(copy)
