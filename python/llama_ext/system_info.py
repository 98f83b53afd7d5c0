"""What this build sees of the machine, and what it chose: the answer to "why is it slow here?"."""

# Not named info.py: a submodule of that name would take the place of the function `llama_ext.info` once it is imported.

from __future__ import annotations

import os
from dataclasses import dataclass

from llama_ext import _core
from llama_ext._version import __version__
from llama_ext.runtime.profiling import nvtx_state

__all__ = ["Info", "info"]

# Facts about the build that the report has a line for.
_TOLD_ELSEWHERE = ("version", "isas")


@dataclass(frozen=True)
class Info:
    """The report of `llama_ext.info()`; `str()` of it is meant for people.

    Attributes:
        version: Of the package.
        cpu: What the processor calls itself.
        cpu_features: Its instruction-set extensions that matter here.
        isa: The instruction set that a model gets which is not given one.
        isa_reason: Why that one.
        available_isas: What this machine can run and this build holds, slowest first.
        compiled_isas: What this build holds.
        threads: The threads that a model gets which is not given a number.
        threads_reason: Why that many.
        gpus: The GPUs that a model can be put on.
        gpus_reason: Why there are none, or "" when there are.
        nvtx: Whether NVTX ranges are "on" or "off" (`llama_ext.set_nvtx_ranges`), or why there are none.
        build: The options of the build.
    """

    version: str
    cpu: str
    cpu_features: tuple[str, ...]
    isa: str
    isa_reason: str
    available_isas: tuple[str, ...]
    compiled_isas: tuple[str, ...]
    threads: int
    threads_reason: str
    gpus: tuple[str, ...]
    gpus_reason: str
    nvtx: str
    build: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        rows = [
            ("CPU", self.cpu),
            ("instruction set", f"{self.isa} ({self.isa_reason})"),
            ("available", ", ".join(self.available_isas)),
            ("threads", f"{self.threads} ({self.threads_reason})"),
            ("GPUs", ", ".join(self.gpus) if self.gpus else f"none ({self.gpus_reason})"),
            ("NVTX ranges", self.nvtx),
            ("build", ", ".join(f"{key}: {value}" for key, value in self.build if key not in _TOLD_ELSEWHERE)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"llama_ext {self.version}", *(f"  {name:<{width}}  {value}" for name, value in rows)])


def info() -> Info:
    """What was chosen on this machine, and why.

    Returns:
        A frozen record; `print(llama_ext.info())` gives a short report.

    Raises:
        DeviceError: LLAMA_EXT_ISA names an instruction set that this machine or this build lacks.
        OptionError: LLAMA_EXT_NUM_THREADS is no number of threads.
    """
    available = tuple(_core.available_isas())
    forced = os.environ.get("LLAMA_EXT_ISA", "")
    # A backend, because the core alone decides; one thread, because nothing will run on it.
    isa = _core.Backend("cpu", threads=1).isa
    threads, threads_reason = _core.default_threads()
    gpus, gpus_reason = _core.gpus()
    return Info(
        version=__version__,
        cpu=_core.cpu_name(),
        cpu_features=tuple(_core.cpu_features()),
        isa=isa,
        isa_reason="LLAMA_EXT_ISA asks for it" if forced else "the best available",
        available_isas=available,
        compiled_isas=tuple(_core.compiled_isas()),
        threads=threads,
        threads_reason=threads_reason,
        gpus=tuple(gpus),
        gpus_reason=gpus_reason,
        nvtx=nvtx_state(),
        build=tuple(sorted(_core.build_info().items())),
    )
