"""`import llama_ext` is cheap, complete and lazy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import llama_ext
from llama_ext import errors
from timing import SLACK


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return result.stdout.strip()


def test_import_takes_a_tenth_of_a_second() -> None:
    code = "import time; start = time.perf_counter(); import llama_ext; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(3)) < 0.1 * SLACK


def test_import_loads_neither_numpy_nor_the_compiled_core() -> None:
    code = (
        "import sys, llama_ext; print([name for name in ('numpy', 'llama_ext._core', 'rich') if name in sys.modules])"
    )
    assert python(code) == "[]"


@pytest.mark.parametrize("name", llama_ext.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(llama_ext, name) is not None
    assert name in dir(llama_ext)


def test_every_error_is_public() -> None:
    for name in errors.__all__:
        assert getattr(llama_ext, name) is getattr(errors, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LamaForCausalLM'"):
        _ = llama_ext.LamaForCausalLM  # type: ignore[attr-defined]


def test_info_says_what_was_chosen_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_EXT_ISA", raising=False)
    report = llama_ext.info()
    assert report.version == llama_ext.__version__
    assert report.isa in report.available_isas
    assert report.isa_reason == "the best available"
    assert report.threads == llama_ext.get_num_threads()
    assert bool(report.gpus) != bool(report.gpus_reason), "either a GPU, or why there is none"
    text = str(report)
    for part in (report.cpu, report.isa, report.threads_reason, report.gpus_reason, "build"):
        assert part in text


def test_info_says_when_the_environment_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    slowest = llama_ext.info().available_isas[0]
    monkeypatch.setenv("LLAMA_EXT_ISA", slowest)
    assert llama_ext.info().isa == slowest
    assert "LLAMA_EXT_ISA" in llama_ext.info().isa_reason


def test_the_number_of_threads_can_be_set_and_is_checked() -> None:
    before = llama_ext.get_num_threads()
    try:
        llama_ext.set_num_threads(1)
        assert llama_ext.get_num_threads() == 1
        for wrong in (0, -1, True, 1.5):
            with pytest.raises(llama_ext.OptionError, match="threads"):
                llama_ext.set_num_threads(wrong)  # type: ignore[arg-type]
    finally:
        llama_ext.set_num_threads(before)
