"""A GPU that is not to be had: what is said, and with which numbers. The emulator says what a driver would."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import llama_ext
from devices import HAS_CUDA, IS_EMULATED, only_emulated, requires_cuda
from llama_ext import DeviceError, _core
from subprocesses import run_script

SCRIPT = """
import llama_ext
from llama_ext import _core
try:
    backend = _core.Backend({device!r})
    {then}
    print("no error")
except llama_ext.LlamaExtError as error:
    print(type(error).__name__, error)
"""


def error_of(device: str = "cuda", then: str = "pass", **settings: object) -> str:
    environment = {f"LLAMA_EXT_CUDA_EMULATION_{name.upper()}": str(value) for name, value in settings.items()}
    return run_script(SCRIPT.format(device=device, then=then), **environment)


@pytest.mark.gpu
@only_emulated
def test_each_reason_for_no_gpu_is_a_device_error_with_what_was_found_and_what_is_needed() -> None:
    assert "DeviceError" in (text := error_of(driver=0))
    assert "no NVIDIA driver was found; one of version 580 or later is needed" in text
    assert "device='cpu'" in text
    text = error_of(driver=12040)
    assert "it supports CUDA 12.4, and CUDA 13.0 (driver 580 or later) is needed" in text
    assert "the driver finds no NVIDIA GPU" in error_of(devices=0)
    text = error_of(capability=75)
    assert "compute capability 7.5, and 8.0 (Ampere) or later is needed" in text
    assert "device 'cuda:2': there are 2 GPUs, numbered from 0" in error_of("cuda:2", devices=2)
    assert error_of("cuda:1", devices=2) == "no error\n"


@pytest.mark.gpu
@only_emulated
def test_memory_that_is_not_there_is_an_error_with_both_numbers() -> None:
    allocate = "import numpy; backend.matrix(numpy.zeros((1000, 1000), numpy.float32))"
    text = error_of(then=allocate, memory=1_000_000)
    assert text.startswith(
        "OutOfMemoryError a matrix needs 4096000 bytes on cuda:0, which has 1000000 of 1000000 bytes"
    )
    model = """
    config = llama_ext.LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
                                   num_attention_heads=2, max_position_embeddings=16)
    llama_ext.LlamaForCausalLM(config, device="cuda")
    """.strip().replace("\n    ", "\n    ")
    text = error_of(then=model, memory=300_000)
    assert text.startswith("OutOfMemoryError the weights needs ")
    assert text.endswith(" bytes on cuda:0, which has 300000 of 300000 bytes free\n")


@pytest.mark.gpu
@only_emulated
def test_info_says_why_there_is_no_gpu() -> None:
    text = run_script("import llama_ext; print(llama_ext.info())", LLAMA_EXT_CUDA_EMULATION_DRIVER="12000")
    assert "none (the NVIDIA driver is too old" in text
    text = run_script("import llama_ext; print(llama_ext.info())")
    assert "cuda:0: compute capability 9.0" in text


@pytest.mark.gpu
@requires_cuda
def test_a_gpu_has_no_instruction_sets_and_says_what_it_is() -> None:
    with pytest.raises(llama_ext.OptionError, match="no instruction set"):
        _core.Backend("cuda", 0, "avx2")
    assert _core.Backend("cuda").device == "cuda:0"


# The library that users get.

REAL = Path(_core.__file__).with_name("libllama_ext_cuda.so")
built = pytest.mark.skipif(not REAL.is_file(), reason="this build has no CUDA backend: nvcc was not there")


@built
@pytest.mark.skipif(HAS_CUDA and not IS_EMULATED, reason="there is a GPU, and nothing to complain of")
def test_the_real_library_opens_without_a_driver_and_says_that_there_is_none() -> None:
    script = SCRIPT.format(device="cuda", then="pass")
    text = run_script(script, LLAMA_EXT_CUDA_LIBRARY=str(REAL))
    assert text.startswith("DeviceError device 'cuda:0': ")
    assert "driver" in text
    assert re.search("550|580", text) or "finds no NVIDIA GPU" in text
    assert "device='cpu'" in text
    assert "driver" in run_script("import llama_ext; print(llama_ext.info())", LLAMA_EXT_CUDA_LIBRARY=str(REAL))


@pytest.mark.gpu
@pytest.mark.skipif(not (REAL.is_file() or IS_EMULATED), reason="there is no CUDA backend: nvcc was not there")
def test_a_library_of_other_headers_is_refused(tmp_path: Path) -> None:
    library = Path(os.environ["LLAMA_EXT_CUDA_LIBRARY"]) if IS_EMULATED else REAL
    other = tmp_path / "libllama_ext_cuda.so"
    build = re.compile(re.escape(llama_ext.__version__).encode() + rb"\+[0-9a-f]{12}")
    content, count = build.subn(lambda found: found[0][:-12] + b"0123456789ab", library.read_bytes())
    assert count == 1
    other.write_bytes(content)
    text = run_script(SCRIPT.format(device="cuda", then="pass"), LLAMA_EXT_CUDA_LIBRARY=str(other))
    assert text.startswith(f"DeviceError {other} is of build {llama_ext.__version__}+0123456789ab, llama_ext of ")
    assert text.endswith(". Build what LLAMA_EXT_CUDA_LIBRARY names of the sources that are installed\n")


def test_a_build_without_the_library_says_so() -> None:
    text = run_script(SCRIPT.format(device="cuda", then="pass"), LLAMA_EXT_CUDA_LIBRARY="/nowhere/libllama_ext_cuda.so")
    assert text.startswith("DeviceError this build of llama_ext has no CUDA backend (/nowhere/")


def test_what_is_no_such_library_is_refused(tmp_path: Path) -> None:
    text_file = tmp_path / "library.so"
    text_file.write_text("not a library")
    text = run_script(SCRIPT.format(device="cuda", then="pass"), LLAMA_EXT_CUDA_LIBRARY=str(text_file))
    assert text.startswith("DeviceError the CUDA backend cannot be opened: ")
    other = Path(_core.__file__)
    text = run_script(SCRIPT.format(device="cuda", then="pass"), LLAMA_EXT_CUDA_LIBRARY=str(other))
    assert "is not the CUDA backend of llama_ext" in text


@pytest.mark.parametrize("device", ["cuda:", "cuda:-1", "cuda:1x", "cuda:99999", "cuda0"])
def test_names_of_no_gpu_are_device_errors(device: str) -> None:
    with pytest.raises(DeviceError, match="device"):
        _core.Backend(device)


def test_the_emulator_is_only_used_where_it_was_asked_for() -> None:
    assert not IS_EMULATED or os.environ.get("LLAMA_EXT_CUDA_LIBRARY")
