"""The backends that every operation is tested on: the reference, each instruction set there is with 1, 2 and 3 threads, and the
CUDA backend, on a GPU or, where LLAMA_EXT_CUDA_LIBRARY names the emulated library (tests/cuda_emulation), on the CPU."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import pytest

from llama_ext import _core

ISAS: list[str] = _core.available_isas()

# Weights of these are multiplied in bfloat16 by compute="auto": activations are rounded to it as well.
NATIVE_BF16 = frozenset({"avx512-bf16", "amx"})


@dataclass(frozen=True)
class Device:
    """A way to make a backend; `isa` is "" for the reference and "cuda" for the first GPU."""

    isa: str
    threads: int

    def __str__(self) -> str:
        if self.is_cuda:
            return "cuda"
        return f"{self.isa}-t{self.threads}" if self.isa else "reference"

    @property
    def is_cuda(self) -> bool:
        return self.isa == "cuda"

    @property
    def backend(self) -> _core.Backend:
        return _backend(self)

    def rounds_activations(self, dtype: str, compute: str) -> bool:
        """Whether a product with such weights first rounds its activations to bfloat16."""
        return dtype == "bfloat16" and compute == "auto" and self.isa in {*NATIVE_BF16, "cuda"}


@functools.cache
def _backend(device: Device) -> _core.Backend:
    if not device.isa:
        return _core.Backend("reference")
    if device.is_cuda:
        return _core.Backend("cuda:0")
    return _core.Backend("cpu", device.threads, device.isa)


REFERENCE = Device("", 1)
CPU = [Device(isa, threads) for isa in ISAS for threads in (1, 2, 3)]

CUDA = Device("cuda", 1)
HAS_CUDA = bool(_core.gpus()[0])
if os.environ.get("LLAMA_EXT_CUDA_LIBRARY") and not HAS_CUDA:
    # Else all tests of a GPU would be skipped, and nobody see it.
    raise RuntimeError(f"LLAMA_EXT_CUDA_LIBRARY names a library that offers no GPU: {_core.gpus()[1]}")
IS_EMULATED = HAS_CUDA and CUDA.backend.isa == "emulated"
WHY_NO_CUDA = f"no GPU, and none emulated: {_core.gpus()[1]}"
requires_cuda = pytest.mark.skipif(not HAS_CUDA, reason=WHY_NO_CUDA)
only_hopper = pytest.mark.skipif(
    IS_EMULATED and os.environ.get("LLAMA_EXT_CUDA_EMULATION_CAPABILITY", "90") != "90",
    reason="the emulated card has none of Hopper's instructions",
)
only_emulated = pytest.mark.skipif(not IS_EMULATED, reason="only an emulated GPU can be told to be another or to fail")

_missing = [isa for isa in _core.compiled_isas() if isa not in ISAS]


def _skipped(value: object, isa: str) -> object:
    return pytest.param(value, id=isa, marks=pytest.mark.skip(reason=f"this machine does not have {isa}"))


def _params(devices: list[Device]) -> list[object]:
    found = [pytest.param(device, id=str(device)) for device in devices]
    return found + [_skipped(Device(isa, 1), isa) for isa in _missing]


def _cuda() -> list[object]:
    return [pytest.param(CUDA, id=str(CUDA), marks=[pytest.mark.gpu, requires_cuda])]


# The kernels and the reference, which NumPy checks; each set of kernels once.
all_devices = pytest.mark.parametrize("device", [*_params([REFERENCE, *CPU]), *_cuda()])
each_tier_and_thread_count = pytest.mark.parametrize("device", _params(CPU))
each_isa = pytest.mark.parametrize("isa", [*ISAS, *[_skipped(isa, isa) for isa in _missing]])

# The arithmetics of a product: float32, bfloat16 weights as fast as can be, and the same with float32 products.
each_mode = pytest.mark.parametrize(
    ("dtype", "compute"),
    [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "exact")],
    ids=["f32", "bf16", "bf16-exact"],
)
