"""Which instruction set runs: the best there is, or the one that is asked for, or an error that says what there is."""

from __future__ import annotations

import numpy as np
import pytest

import llama_ext
from devices import ISAS, each_isa
from llama_ext import DeviceError, _core
from subprocesses import run_script

TIERS = ["x86-64-v2", "avx2", "avx2-vnni", "avx512", "avx512-bf16", "amx"]

WHICH = """
import llama_ext
from llama_ext import _core
info = llama_ext.info()
print(_core.Backend().isa, info.isa, info.isa_reason, sep="|")
"""


@pytest.fixture(autouse=True)
def no_forced_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_EXT_ISA", raising=False)


def test_the_build_holds_every_tier_and_the_machine_runs_a_part_of_them_in_order() -> None:
    assert _core.compiled_isas() == TIERS
    assert [isa for isa in TIERS if isa in ISAS] == ISAS
    assert ISAS[:1] == ["x86-64-v2"]


def test_without_a_wish_the_strongest_worthwhile_tier_runs() -> None:
    features = _core.cpu_features()
    # AVX-512 of the CPUs before Ice Lake and Zen 4 (which brought VBMI2) costs more clock than it gains.
    worthwhile = [isa for isa in ISAS if not isa.startswith("avx512") or "avx512_vbmi2" in features]
    assert _core.Backend().isa == worthwhile[-1]


def test_each_tier_needs_the_features_it_is_named_after() -> None:
    features = set(_core.cpu_features())
    v2 = {"sse4.2", "popcnt"}
    v3 = v2 | {"avx2", "fma", "f16c"}
    v4 = v3 | {"avx512", "avx512_vnni"}
    needs = {
        "x86-64-v2": v2,
        "avx2": v3,
        "avx2-vnni": v3 | {"avx_vnni"},
        "avx512": v4,
        "avx512-bf16": v4 | {"avx512_bf16"},
        "amx": v4 | {"avx512_bf16", "amx_bf16"},
    }
    for isa in TIERS:
        assert (isa in ISAS) == (needs[isa] <= features), isa


@each_isa
def test_a_backend_runs_the_tier_it_is_asked_for(isa: str) -> None:
    assert _core.Backend("cpu", 1, isa).isa == isa


@each_isa
def test_the_environment_forces_a_tier_in_this_process(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_EXT_ISA", isa)
    assert _core.Backend().isa == isa
    assert llama_ext.info().isa == isa
    assert llama_ext.ops.pack(np.ones((2, 3), np.float32)).backend.isa == isa


@each_isa
def test_the_environment_forces_a_tier_in_a_fresh_process_and_info_says_why(isa: str) -> None:
    backend, named, reason = run_script(WHICH, LLAMA_EXT_ISA=isa).strip().split("|")
    assert backend == named == isa
    assert "LLAMA_EXT_ISA" in reason


def test_an_empty_environment_variable_asks_for_nothing() -> None:
    backend, named, reason = run_script(WHICH, LLAMA_EXT_ISA="").strip().split("|")
    assert backend == named == _core.Backend().isa
    assert "LLAMA_EXT_ISA" not in reason


def test_what_is_asked_for_by_name_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_EXT_ISA", ISAS[-1])
    assert _core.Backend("cpu", 1, ISAS[0]).isa == ISAS[0]


WRONG = ["avx-512", "AVX2", "avx2 ", "sse", "neon", "avx512,avx2", *[isa for isa in TIERS if isa not in ISAS]]


@pytest.mark.parametrize("isa", WRONG)
def test_a_tier_that_is_not_there_is_an_error_that_lists_what_is(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(error: pytest.ExceptionInfo[DeviceError], source: str) -> None:
        message = str(error.value)
        assert f"{source}: '{isa}'" in message
        for available in ISAS:
            assert available in message

    with pytest.raises(DeviceError) as error:
        _core.Backend("cpu", 1, isa)
    check(error, "isa")
    monkeypatch.setenv("LLAMA_EXT_ISA", isa)
    for make in (_core.Backend, llama_ext.info, lambda: llama_ext.ops.pack(np.ones((1, 1), np.float32))):
        with pytest.raises(DeviceError) as error:
            make()
        check(error, "LLAMA_EXT_ISA")


def test_a_wrong_tier_does_not_keep_the_package_from_being_imported() -> None:
    assert run_script("import llama_ext; print('imported')", LLAMA_EXT_ISA="none") == "imported\n"


@pytest.mark.parametrize("device", ["cuda:99", "cuda:", "cuda:-1", "cuda:x", "cuda:12345", "cuda0", "gpu", "", "CPU"])
def test_a_device_that_is_not_there_is_an_error(device: str) -> None:
    with pytest.raises(DeviceError, match="device"):
        _core.Backend(device)


def test_info_reports_what_the_core_sees() -> None:
    info = llama_ext.info()
    assert info.available_isas == tuple(ISAS)
    assert info.compiled_isas == tuple(TIERS)
    assert info.cpu == _core.cpu_name() != ""
    assert info.cpu_features == tuple(_core.cpu_features())
    assert info.isa == _core.Backend().isa
    assert info.isa_reason
    text = str(info)
    for part in (info.isa, info.cpu, info.isa_reason, info.threads_reason):
        assert part in text
