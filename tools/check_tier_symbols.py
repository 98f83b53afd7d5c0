#!/usr/bin/env python3
"""Checks the object files of the CPU tiers.

1. No symbol that the linker may merge with another object's (weak, unique or common) lies outside the tier's own
   namespace: such a copy, compiled for AVX-512, could be the one an older CPU runs.
2. The hot loops of the AVX-512 products keep their sums in registers: a loop whose body multiplies must not touch the stack.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

MERGEABLE = set("WwVvuC")
PRODUCT = re.compile(r"\b(vfmadd\w*ps|vdpbf16ps|tdpbf16ps|vpdpbusd|vpmaddwd|vpmaddubsw)\b")
JUMP = re.compile(r"^\s*([0-9a-f]+):\s+(j\w+)\s+([0-9a-f]+)")
STACK = re.compile(r"\(%r[sb]p")


def mergeable_symbols(nm: str, path: Path) -> list[str]:
    """Symbols of `path` outside its namespace that a linker may replace by another object's."""
    namespace = f"llama_ext::isa_{path.name.split('.')[0]}::"
    listing = subprocess.run([nm, "-C", str(path)], check=True, capture_output=True, text=True).stdout
    bad = []
    for line in listing.splitlines():
        match = re.match(r"^[0-9a-f]*\s+(\S)\s+(.*)$", line)
        if match and match[1] in MERGEABLE and namespace not in match[2]:
            bad.append(match[2])
    return bad


def spilling_loops(objdump: str, path: Path) -> list[str]:
    """Innermost loops of tile functions that multiply and touch the stack."""
    listing = subprocess.run(
        [objdump, "-d", "-C", "--no-show-raw-insn", str(path)], check=True, capture_output=True, text=True
    )
    bad = []
    name, body = "", []
    for line in [*listing.stdout.splitlines(), "0 <end>:"]:
        header = re.match(r"^[0-9a-f]+ <(.*)>:$", line)
        if header is None:
            body.append(line)
            continue
        if re.search(r"\b(tile|panel)", name):
            bad += [f"{name} at {place}" for place in _loops_on_stack(body)]
        name, body = header[1], []
    return bad


def _loops_on_stack(body: list[str]) -> list[str]:
    address_of = {}
    for index, line in enumerate(body):
        match = re.match(r"^\s*([0-9a-f]+):", line)
        if match:
            address_of[match[1]] = index
    found = []
    for index, line in enumerate(body):
        jump = JUMP.match(line)
        if jump is None or jump[3] not in address_of or address_of[jump[3]] >= index:
            continue
        loop = body[address_of[jump[3]] : index]
        is_innermost = not any(
            (inner := JUMP.match(text)) and address_of.get(inner[3], len(body)) <= place + address_of[jump[3]]
            for place, text in enumerate(loop)
        )
        if is_innermost and any(PRODUCT.search(text) for text in loop) and any(STACK.search(text) for text in loop):
            found.append(jump[3])
    return found


def main() -> int:
    """Prints what is wrong and returns 1, or returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", nargs="+", type=Path)
    parser.add_argument("--nm", default="nm")
    parser.add_argument("--objdump", default="objdump")
    arguments = parser.parse_args()
    problems = []
    for path in arguments.objects:
        problems += [f"{path.name}: mergeable symbol {symbol}" for symbol in mergeable_symbols(arguments.nm, path)]
        if "avx512" in path.name or "amx" in path.name:
            problems += [
                f"{path.name}: sums on the stack in {loop}" for loop in spilling_loops(arguments.objdump, path)
            ]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
