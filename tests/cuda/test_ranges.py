"""What a profiler is told: a library that NVTX loads as it loads a profiler's writes down every range, and a model runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import llama_ext
from devices import requires_cuda
from llama_ext import _core
from subprocesses import run_script

HAS_RANGES = bool(_core.gpus()[0]) and _core.has_nvtx_ranges()
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

pytestmark = [
    pytest.mark.gpu,
    requires_cuda,
    pytest.mark.skipif(not HAS_RANGES, reason="built without nvtx3/nvToolsExt.h"),
]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler for the library that records ranges")

MODEL = """
import numpy as np
import llama_ext
config = llama_ext.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                               num_key_value_heads=1, max_position_embeddings=64)
model = llama_ext.LlamaForCausalLM(config, device="cuda", seed=1)
"""


class Node(list["Node"]):
    """A range: its name, and the ranges in it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @property
    def names(self) -> list[str]:
        return [each.name for each in self]


def recorded(tmp_path: Path, script: str, **environment: str) -> tuple[list[str], Node]:
    """The domains, and the ranges as a tree."""
    assert COMPILER is not None
    library, file = tmp_path / "recorder.so", tmp_path / "ranges.txt"
    source = Path(__file__).with_name("nvtx_recorder.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    file.write_text("")
    run_script(script, NVTX_INJECTION64_PATH=str(library), NVTX_RECORDER_FILE=str(file), **environment)
    domains: list[str] = []
    open_ranges = [Node("")]
    for line in file.read_text().splitlines():
        word, _, rest = line.partition(" ")
        if word == "domain":
            domains.append(rest)
        elif word == "push":
            in_domain, _, name = rest.partition(" ")
            assert in_domain == "1"
            open_ranges[-1].append(Node(name))
            open_ranges.append(open_ranges[-1][-1])
        else:
            open_ranges.pop()
    assert len(open_ranges) == 1, "a range was not ended"
    return domains, open_ranges[0]


@needs_compiler
def test_a_pass_its_layers_and_their_operations_are_nested_ranges(tmp_path: Path) -> None:
    script = MODEL + "session = model.session(max_length=32)\nsession.append([1, 2, 3, 4, 5])\nsession.append([6])\n"
    domains, ranges = recorded(tmp_path, script, LLAMA_EXT_NVTX="1")
    assert domains == ["llama_ext"]
    prefill, decode = (each for each in ranges if each.name.startswith(("prefill", "decode")))
    assert (prefill.name, decode.name) == ("prefill 5 rows", "decode 1 row")
    for each in (prefill, decode):
        assert each.names == ["embedding", "layer 0", "layer 1", "rms_norm", "matmul"]
        for layer in (each[1], each[2]):
            products = layer.names[: layer.names.index("attend")]
            assert products
            assert set(products) == {"matmul"}
            assert layer.names[len(products) :] == ["attend", "matmul", "feed_forward"]


@needs_compiler
def test_a_recorded_token_has_ranges_when_it_is_recorded_and_one_for_every_replay(tmp_path: Path) -> None:
    _, ranges = recorded(
        tmp_path,
        MODEL + "model.generate(np.array([1, 2, 3]), max_new_tokens=9, temperature=1.0, seed=4)",
        LLAMA_EXT_NVTX="1",
    )
    recordings = [each for each in ranges if each.name == "record decode 1 row"]
    replays = [each for each in ranges if each.name == "replay decode 1 row"]
    assert len(recordings) == 1
    assert recordings[0].names == ["embedding", "layer 0", "layer 1", "matmul", "sample_next"]
    assert len(replays) >= 5
    assert all(not each for each in replays)


@needs_compiler
def test_ranges_are_off_unless_asked_for_and_can_be_switched(tmp_path: Path) -> None:
    forward = "model(np.array([[1, 2, 3]]))\n"
    assert recorded(tmp_path, MODEL + forward) == ([], Node(""))
    switched = MODEL + forward + "llama_ext.set_nvtx_ranges(True)\n" + forward
    switched += "assert llama_ext.info().nvtx == 'on'\nllama_ext.set_nvtx_ranges(False)\n" + forward
    _, ranges = recorded(tmp_path, switched)
    assert ranges.names == ["prefill 3 rows"]


@needs_compiler
def test_a_step_of_training_has_ranges_of_both_directions(tmp_path: Path) -> None:
    script = MODEL + "ids = np.array([[1, 2, 3, 4]])\nmodel.loss_and_gradients(ids, ids)\n"
    _, ranges = recorded(tmp_path, script, LLAMA_EXT_NVTX="1")
    layers = [each.name for each in ranges if each.name.startswith("layer")]
    assert layers == ["layer 0 forward", "layer 1 forward", "layer 1 backward", "layer 0 backward"]
    forward, backward = (next(each for each in ranges if each.name == f"layer 0 {way}ward") for way in ("for", "back"))
    assert "causal_attention" in forward.names
    assert {"causal_attention_backward", "matmul_backward", "rms_norm_backward"} <= set(backward.names)


def test_another_value_of_the_variable_is_an_error() -> None:
    script = """
        import llama_ext
        from llama_ext import _core
        try:
            _core.Backend("cuda")
        except llama_ext.OptionError as error:
            print(error)
    """
    assert run_script(script, LLAMA_EXT_NVTX="yes") == "LLAMA_EXT_NVTX must be 0 or 1, got 'yes'\n"


def test_info_says_whether_ranges_are_on() -> None:
    assert llama_ext.info().nvtx in ("on", "off")
    assert "NVTX ranges" in str(llama_ext.info())
