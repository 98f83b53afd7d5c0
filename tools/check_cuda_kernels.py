#!/usr/bin/env python3
"""Keeps what ptxas says of each kernel, and refuses kernels that spill registers.

check_cuda_kernels.py compile nvcc ... -o x.o    runs the compiler; what ptxas says goes to x.o.ptxas
check_cuda_kernels.py check x.o ...              no kernel may spill, and none may keep arrays in local memory
check_cuda_kernels.py show x.o ...               prints registers and shared memory of each kernel
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass
class Kernel:
    """What ptxas says of one kernel for one architecture."""

    name: str
    architecture: str
    stack: int = -1
    spills: int = -1
    registers: int = 0


def compile_and_keep(command: list[str]) -> int:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines(keepends=True)
    about_kernels = [line for line in lines if line.startswith("ptxas info") or MEMORY.search(line)]
    sys.stderr.writelines(line for line in lines if line not in about_kernels or done.returncode != 0)
    if "-o" in command and done.returncode == 0:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text("".join(about_kernels), encoding="utf-8")
    return done.returncode


def kernels_of(report: str) -> list[Kernel]:
    kernels: list[Kernel] = []
    for line in report.splitlines():
        if match := ENTRY.search(line):
            kernels.append(Kernel(match[1], match[2]))
        elif kernels and (match := MEMORY.search(line)):
            kernels[-1].stack, kernels[-1].spills = int(match[1]), int(match[2]) + int(match[3])
        elif kernels and (match := REGISTERS.search(line)):
            kernels[-1].registers = int(match[1])
    return kernels


def read(objects: list[str]) -> list[Kernel]:
    kernels = [kernel for each in objects for kernel in kernels_of(Path(each + ".ptxas").read_text(encoding="utf-8"))]
    if not kernels:
        raise SystemExit("no kernels found: was the build made with -Xptxas -v?")
    return kernels


def short(name: str) -> str:
    """The part of a mangled name that tells kernels apart: the file's own namespace comes first, with a hash."""
    return re.sub(r"^_ZN9llama_ext4cuda\d+_GLOBAL__N__\w{8}_\d+_\w+?_cu_\w{8}", "", name)[:90]


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in {"compile", "check", "show"}:
        raise SystemExit(__doc__)
    if arguments[0] == "compile":
        return compile_and_keep(arguments[1:])
    kernels = read(arguments[1:])
    if arguments[0] == "show":
        for kernel in kernels:
            print(
                f"{kernel.architecture:8} {kernel.registers:4} registers {kernel.stack:5} stack  {short(kernel.name)}"
            )
        return 0
    bad = [kernel for kernel in kernels if kernel.spills != 0 or kernel.stack != 0]
    for kernel in bad:
        print(
            f"{kernel.name} for {kernel.architecture}: {kernel.spills} bytes of spills, {kernel.stack} bytes of local "
            f"memory, {kernel.registers} registers",
            file=sys.stderr,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
