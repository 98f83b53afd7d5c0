"""What other engines get is the same model, and what they keep of it is counted rightly."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import llama_ext
from benchmarks import prepare_peers
from benchmarks.accounting import ModelShape
from benchmarks.file_bytes import ctranslate2_decode_bytes, gguf_decode_bytes, openvino_decode_bytes
from benchmarks.measure import RESULT
from benchmarks.peers import make
from benchmarks.random_model import ensure_model
from benchmarks.random_tokenizer import ensure_tokenizer, pieces
from benchmarks.streaming import TokenStream

# 3 key/value heads of 8, so that rows in a wrong order cannot go unnoticed.
SHAPE = ModelShape(vocabulary=300, width=48, ffn_width=64, layers=2, heads=6, kv_heads=3, head_dim=8)
TEXT = "the cat, a b\u00e4r and 7 dogs"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = ensure_model(tmp_path_factory.mktemp("cache"), SHAPE)
    assert ensure_tokenizer(directory, SHAPE.vocabulary)
    return directory


# ----------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("vocabulary", [286, 300, 32_000])
def test_a_tokenizer_has_as_many_pieces_as_the_model(vocabulary: int, tmp_path: Path) -> None:
    found, merges = pieces(vocabulary)
    assert len(found) == len(set(found)) == vocabulary
    known = set(found)
    assert all({first, second, first + second} <= known for first, second in merges)
    assert ensure_tokenizer(tmp_path, vocabulary)
    assert not ensure_tokenizer(tmp_path, vocabulary)
    tokenizer = llama_ext.Tokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 1
    assert max(ids) < vocabulary
    assert tokenizer.decode(ids) == TEXT


def test_a_large_tokenizer_merges() -> None:
    assert pieces(32_000)[0][-1] not in pieces(31_999)[0]
    assert len(pieces(32_000)[1]) == 32_000 - 286


@pytest.mark.parametrize("vocabulary", [285, 10_000_000])
def test_no_tokenizer_is_too_small_or_too_large(vocabulary: int) -> None:
    with pytest.raises(ValueError, match=f"not {vocabulary}"):
        pieces(vocabulary)


# ---------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize(("kind", "item"), [("f32", 4), ("bf16", 2)])
def test_a_gguf_file_holds_the_same_model(kind: str, item: int, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf writes the file")
    out = tmp_path / f"{kind}.gguf"
    make.write_gguf(checkpoint, out, kind)
    ours = llama_ext.LlamaForCausalLM.from_pretrained(checkpoint, dtype="float32")
    theirs = llama_ext.LlamaForCausalLM.from_pretrained(out, dtype="float32")
    ids = np.arange(3, 40)[None]
    np.testing.assert_array_equal(theirs(ids), ours(ids))
    assert theirs.tokenizer is not None
    assert theirs.tokenizer.encode(TEXT) == ours.tokenizer.encode(TEXT)
    norms = 4 * SHAPE.width * (2 * SHAPE.layers + 1)
    assert gguf_decode_bytes(out) == SHAPE.decode_bytes(item) + norms


# ------------------------------------------------------------------------------------------- sizes of stored weights


def ctranslate2_model(path: Path, variables: dict[str, int], aliases: dict[str, str], version: int = 6) -> None:
    """A model.bin of int8 vectors with that many elements."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", version) + text("TransformerDecoderSpec") + struct.pack("<II", 8, len(variables))
    for name, elements in variables.items():
        data += text(name) + struct.pack("<BIBI", 1, elements, 1, elements) + bytes(elements)
    data += struct.pack("<I", len(aliases)) + b"".join(text(a) + text(b) for a, b in aliases.items())
    path.write_bytes(data)


def test_ctranslate2_bytes_leave_out_the_embedding_unless_it_is_the_head(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    inner = {"decoder/embeddings/weight": 160, "decoder/layer_0/ffn/linear_0/weight": 48}
    ctranslate2_model(file, {**inner, "decoder/projection/weight": 150}, {"decoder/a": "decoder/projection/weight"})
    assert ctranslate2_decode_bytes(file) == 48 + 150
    ctranslate2_model(file, inner, {"decoder/projection/weight": "decoder/embeddings/weight"})
    assert ctranslate2_decode_bytes(file) == 160 + 48


def test_another_version_of_ctranslate2_is_refused(tmp_path: Path) -> None:
    ctranslate2_model(tmp_path / "model.bin", {}, {}, version=7)
    with pytest.raises(ValueError, match=r"not version 6 .* but 7"):
        ctranslate2_decode_bytes(tmp_path / "model.bin")


def openvino_model(path: Path, layers: dict[int, tuple[str, int]], edges: list[tuple[int, int]]) -> None:
    """An IR of layers with a type each, and of constants the size."""
    lines = ["<net><layers>"]
    for index, (kind, size) in layers.items():
        data = f'<data element_type="i8" size="{size}" offset="0"/>' if kind == "Const" else ""
        lines.append(f'<layer id="{index}" name="n{index}" type="{kind}">{data}</layer>')
    lines.append("</layers><edges>")
    lines += [f'<edge from-layer="{a}" from-port="0" to-layer="{b}" to-port="0"/>' for a, b in edges]
    path.write_text("".join(lines) + "</edges></net>", encoding="utf-8")


def test_openvino_bytes_are_those_of_products_with_their_scales(tmp_path: Path) -> None:
    file = tmp_path / "openvino_model.xml"
    layers = {
        0: ("Parameter", 0),
        1: ("Const", 1000),  # the embedding
        2: ("Gather", 0),
        3: ("Const", 64),  # codes, scales
        4: ("Convert", 0),
        5: ("Const", 8),
        6: ("Multiply", 0),
        7: ("MatMul", 0),
        8: ("Const", 4),  # scales an activation: no weight of the second product
        9: ("Multiply", 0),
        10: ("Const", 32),
        11: ("MatMul", 0),
    }
    edges = [(1, 2), (0, 2), (3, 4), (4, 6), (5, 6), (2, 7), (6, 7), (7, 9), (8, 9), (9, 11), (10, 11)]
    openvino_model(file, layers, edges)
    assert openvino_decode_bytes(file) == 64 + 8 + 32
    # A tied head is the embedding, and is read whole; a weight of two products counts once.
    openvino_model(file, {**layers, 12: ("MatMul", 0)}, [*edges, (11, 12), (1, 12), (10, 12)])
    assert openvino_decode_bytes(file) == 64 + 8 + 32 + 1000


# -------------------------------------------------------------------------------------------------------- streams


def tokens(count: int, seen: list[int]) -> Callable[[Callable[[], bool]], None]:
    """A generation of so many tokens."""

    def generate(tell: Callable[[], bool]) -> None:
        for number in range(count):
            seen.append(number)
            if not tell():
                return

    return generate


def test_a_stream_counts_tokens_and_says_when_there_are_fewer() -> None:
    seen: list[int] = []
    stream = TokenStream(tokens(5, seen))
    assert [stream.wait(1), stream.wait(3), stream.wait(3), stream.wait(1)] == [1, 3, 1, 0]
    assert seen == [0, 1, 2, 3, 4]
    stream.close()


def test_closing_a_stream_ends_its_generation() -> None:
    started, go_on = threading.Event(), threading.Event()
    answers: list[bool] = []

    def generate(tell: Callable[[], bool]) -> None:
        answers.append(tell())
        started.set()
        assert go_on.wait(10)
        answers.append(tell())

    stream = TokenStream(generate)
    assert stream.wait(1) == 1
    assert started.wait(10)
    threading.Timer(0.05, go_on.set).start()
    stream.close()
    assert answers == [True, False]


def test_what_a_generation_raises_is_raised_where_it_is_waited_for() -> None:
    def generate(tell: Callable[[], bool]) -> None:
        tell()
        raise RuntimeError("out of luck")

    stream = TokenStream(generate)
    assert stream.wait(1) == 1
    with pytest.raises(RuntimeError, match="out of luck"):
        stream.wait(1)


# ----------------------------------------------------------------------------------------------------- preparation


def test_what_is_prepared_is_found_by_its_option(tmp_path: Path) -> None:
    directory = prepare_peers.peer_directory(tmp_path, SHAPE)
    (directory / "genai-int4").mkdir(parents=True)
    (directory / "q8_0.gguf").write_bytes(b"")
    (directory / "unfinished-q4_0.gguf").write_bytes(b"")
    found = prepare_peers.prepared(tmp_path, SHAPE)
    assert found == {
        "gguf": [directory / "q8_0.gguf"],
        "openvino": [],
        "genai": [directory / "genai-int4"],
        "ctranslate2": [],
    }
    other = dataclasses.replace(SHAPE, layers=3)
    assert not any(prepare_peers.prepared(tmp_path, other).values())


def test_every_target_is_made_by_somebody_from_what_was_made_before() -> None:
    made: list[str] = [""]
    for step in prepare_peers.STEPS:
        assert step.kind in make.KINDS
        assert step.source in made
        made.append(step.target)
    assert len(set(made)) == len(made)


def test_targets_are_chosen_and_skipped_by_words() -> None:
    names = [step.target for step in prepare_peers.chosen(prepare_peers.STEPS, "gguf,int4", "q4_0, genai")]
    assert names == ["f32.gguf", "bf16.gguf", "q8_0.gguf", "q4_k_m.gguf", "openvino-int4-g32"]


def test_a_step_makes_its_file_once(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf writes the file")
    step = prepare_peers.Step("f32.gguf", "gguf", "gguf", "f32")
    (tmp_path / "unfinished-f32.gguf").write_bytes(b"of a run that was stopped")
    assert prepare_peers.make(step, sys.executable, checkpoint, tmp_path).startswith("made in")
    assert [path.name for path in tmp_path.iterdir()] == ["f32.gguf"]
    assert prepare_peers.make(step, "no-such-python", checkpoint, tmp_path) == "present"


def test_two_preparations_do_not_write_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf writes the file")
    step = prepare_peers.Step("f32.gguf", "gguf", "gguf", "f32")
    states: list[str] = []
    threads = [
        threading.Thread(target=lambda: states.append(prepare_peers.make(step, sys.executable, checkpoint, tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    # Whoever made it may be the last to say so.
    assert sorted(state.split()[0] for state in states) == ["made", "present", "present"]


@pytest.mark.parametrize(
    ("step", "python", "reason"),
    [
        (prepare_peers.Step("q8_0.gguf", "gguf", "quantize_gguf", "q8_0", "f32.gguf"), sys.executable, "no f32.gguf"),
        (prepare_peers.Step("x", "gguf", "gguf", "f32"), "no-such-python", "No such file"),
        (prepare_peers.Step("x", "genai", "genai", "int3"), sys.executable, "not installed|failed"),
        (prepare_peers.Step("x", "gguf", "gguf", "f32"), "false", "failed: exit 1"),
    ],
)
def test_what_cannot_be_made_says_why_and_leaves_nothing(
    step: prepare_peers.Step, python: str, reason: str, checkpoint: Path, tmp_path: Path
) -> None:
    state = prepare_peers.make(step, python, checkpoint, tmp_path)
    assert state.startswith("unavailable: ")
    assert any(word in state for word in reason.split("|"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("runner", "option", "package"),
    [("ctranslate2_runner", "--ctranslate2", "ctranslate2"), ("openvino_genai_runner", "--openvino", "openvino")],
)
def test_the_runner_of_an_engine_that_is_not_there_says_so(runner: str, option: str, package: str) -> None:
    arguments = [runner, option, "x", "--threads=1", "--prompt=4", "--tokens=2", "--repeats=1", "--vocabulary=9"]
    # A module that is None cannot be imported, whatever is installed beside the tests.
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = {arguments!r}; "
    code += f"runpy.run_module('benchmarks.peers.{runner}', run_name='__main__')"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=prepare_peers.ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(process.stdout.removeprefix(RESULT)) == {"error": f"not installed: {package}"}
