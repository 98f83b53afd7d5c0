"""What this machine allows: read bandwidth and peak arithmetic, probed by limits.cpp, which is compiled on demand.

Example:
    python -m benchmarks.limits --threads 2
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Limits", "best_of", "build", "default_thread_counts", "instructions", "probe"]

SOURCE = Path(__file__).with_name("limits.cpp")
_FLAGS = ("-std=c++20", "-O3", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")

# What the instruction sets of `llama_ext.info()` may use, weakest first; each has also what is before it. The two int8 ones of
# AVX2 are pairs with an addition: VPMADDWD is exact for all codes of 8 bits, VPMADDUBSW does twice as much, and is within
# reach only of codes of 4 bits, whose sums fit into 16 bits for some steps.
_INSTRUCTIONS_OF_ISA = {
    "x86-64-v2": ("f32_mul_add_128",),
    "avx2": ("f32_fma_128", "f32_fma_256", "int8_madd_256", "int8_maddubs_256"),
    "avx2-vnni": ("int8_dot_256",),
    "avx512": ("f32_fma_512", "int8_dot_512"),
    "avx512-bf16": ("bf16_dot_512",),
    "amx": ("bf16_amx", "int8_amx"),
}
# A processor without instructions for a narrow type widens it.
_ALSO = {"f32": ("f32",), "bf16": ("bf16", "f32"), "int8": ("int8", "bf16", "f32")}


@dataclasses.dataclass(frozen=True)
class Limits:
    """One probe.

    Attributes:
        read: GB/s (10^9 bytes) by number of threads.
        peak: GFLOP/s by instruction, then number of threads; GOP/s for the int8 ones. A multiply-add is two.
        bytes: The memory that was read.
        huge_pages: Whether the system was willing to use them.
    """

    read: dict[int, float]
    peak: dict[str, dict[int, float]]
    bytes: int
    huge_pages: bool

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Limits:
        """Checks and converts what limits.cpp prints, or `to_dict` wrote.

        Raises:
            ValueError: A key is missing, unknown, or not of the right type; the message names it.
        """
        expected = {"bytes", "huge_pages", "read_gb_per_s", "peak_gflop_per_s"}
        if set(values) != expected:
            raise ValueError(f"limits: expected the keys {sorted(expected)}, got {sorted(values)}")
        if not isinstance(values["bytes"], int) or not isinstance(values["huge_pages"], bool):
            raise ValueError("limits: bytes must be an integer and huge_pages a boolean")
        peaks = values["peak_gflop_per_s"]
        if not isinstance(peaks, Mapping) or not peaks:
            raise ValueError("limits: peak_gflop_per_s must have at least one instruction")
        return cls(
            read=_rates("read_gb_per_s", values["read_gb_per_s"]),
            peak={name: _rates(name, rates) for name, rates in peaks.items()},
            bytes=values["bytes"],
            huge_pages=values["huge_pages"],
        )

    def to_dict(self) -> dict[str, Any]:
        """The object for JSON."""
        return {
            "bytes": self.bytes,
            "huge_pages": self.huge_pages,
            "read_gb_per_s": {str(threads): rate for threads, rate in self.read.items()},
            "peak_gflop_per_s": {
                name: {str(threads): rate for threads, rate in rates.items()} for name, rates in self.peak.items()
            },
        }

    def best_peak(self, kind: str, threads: int, isa: str | None = None) -> tuple[str, float]:
        """The fastest instruction for products of `kind`.

        Args:
            kind: "f32", "bf16" or "int8": what the products are made of. Wider instructions count too. For "int8" without
                VPDPBUSD that is VPMADDUBSW, a limit that codes of 8 bits cannot reach: at best half of it, with VPMADDWD.
            threads: One of the numbers that were probed.
            isa: Only what this instruction set has; None is all that the processor has.

        Returns:
            Its name and GFLOP/s.

        Raises:
            KeyError: Nothing was probed with that many threads, or an unknown `kind` or `isa`.
        """
        allowed = None if isa is None else instructions(isa)
        candidates = {
            name: rates[threads]
            for name, rates in self.peak.items()
            if name.split("_")[0] in _ALSO[kind] and (allowed is None or name in allowed)
        }
        name = max(candidates, key=candidates.__getitem__)
        return name, candidates[name]


def instructions(isa: str) -> set[str]:
    """What limits.cpp probes and an instruction set of `llama_ext.info()` may use.

    Raises:
        KeyError: There is no such instruction set.
    """
    order = list(_INSTRUCTIONS_OF_ISA)
    if isa not in order:
        raise KeyError(f"unknown instruction set {isa!r}; known: {', '.join(order)}")
    return {name for each in order[: order.index(isa) + 1] for name in _INSTRUCTIONS_OF_ISA[each]}


def _rates(what: str, values: object) -> dict[int, float]:
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"limits: {what} must map numbers of threads to rates, got {values!r}")
    result = {}
    for threads, rate in values.items():
        if not str(threads).isdigit() or isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0:
            raise ValueError(f"limits: {what} must map numbers of threads to rates, got {threads!r}: {rate!r}")
        result[int(threads)] = float(rate)
    return result


def best_of(probes: Sequence[Limits]) -> Limits:
    """The largest rate of each kind, undisturbed by neighbours. Every probe has what the last has."""
    last = probes[-1]
    return Limits(
        read={threads: max(probe.read[threads] for probe in probes) for threads in last.read},
        peak={
            name: {threads: max(probe.peak[name][threads] for probe in probes) for threads in rates}
            for name, rates in last.peak.items()
        },
        bytes=last.bytes,
        huge_pages=last.huge_pages,
    )


def default_cache() -> Path:
    """Where compiled probes and generated models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llama_ext" / "benchmarks"


def find_compiler() -> str:
    """The C++ compiler: CXX, or the first of c++, g++, clang++.

    Raises:
        RuntimeError: There is none.
    """
    for name in (os.environ.get("CXX", ""), *_COMPILERS):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise RuntimeError(f"probing the limits needs a C++20 compiler: none of {', '.join(_COMPILERS)} found. Set CXX")


def build(cache: Path) -> Path:
    """Compiles limits.cpp, unless the cache has it already.

    Args:
        cache: A directory, created when it does not exist.

    Returns:
        The program.

    Raises:
        RuntimeError: There is no compiler, or it fails; the message has what it said.
    """
    compiler = find_compiler()
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join((compiler, *_FLAGS)).encode()).hexdigest()[:16]
    program = cache / f"limits-{key}"
    if program.exists():
        return program
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f"{program.name}.{os.getpid()}"
    result = subprocess.run(
        [compiler, *_FLAGS, str(SOURCE), "-o", str(unfinished)], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{compiler} cannot compile {SOURCE.name}:\n{result.stderr[-2000:]}")
    unfinished.rename(program)
    return program


def default_thread_counts(threads: int) -> list[int]:
    """1, 2, ... `threads` when they are few, else powers of two and `threads`."""
    if threads <= 4:
        return list(range(1, threads + 1))
    return sorted({1 << bit for bit in range(threads.bit_length())} | {threads})


def probe(
    counts: Sequence[int], *, cache: Path | None = None, seconds: float = 0.2, read_bytes: int = 2 << 30
) -> Limits:
    """Measures.

    Args:
        counts: Numbers of threads.
        cache: For the compiled program; None is the default.
        seconds: For each rate; each takes at least three rounds.
        read_bytes: How much memory to read; far beyond the last-level cache.

    Returns:
        The limits.

    Raises:
        RuntimeError: It cannot be compiled, or fails.
        ValueError: It printed something else.
    """
    program = build(cache or default_cache())
    command = [str(program), "--threads", ",".join(map(str, counts))]
    command += ["--seconds", str(seconds), "--bytes", str(read_bytes)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{program.name} failed ({result.returncode}): {result.stderr[-2000:]}")
    return Limits.from_dict(json.loads(result.stdout))


def read_rate(program: Path, threads: int) -> float:
    """How fast memory is read right now, in a third of a second: less sure than `probe`, for a look before and after a measurement.

    Args:
        program: As `build` returns it.
        threads: That read.

    Returns:
        GB/s.

    Raises:
        RuntimeError: It fails.
    """
    command = [str(program), "--only", "read", "--threads", str(threads), "--seconds", "0.1", "--bytes", str(1 << 29)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{program.name} failed ({result.returncode}): {result.stderr[-2000:]}")
    return float(json.loads(result.stdout)["read_gb_per_s"][str(threads)])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="the most threads to probe")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each rate")
    options = parser.parse_args()
    print(json.dumps(probe(default_thread_counts(options.threads), seconds=options.seconds).to_dict(), indent=2))


if __name__ == "__main__":
    main()
