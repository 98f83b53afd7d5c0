#!/usr/bin/env python3
"""Checks the object files of the CPU tiers.

1. No symbol that the linker may merge with another object's (weak, unique or common) lies outside the tier's own
   namespace: such a copy, compiled for AVX-512, could be the one an older CPU runs.
2. The hot loops of products keep their sums in registers: a loop whose body multiplies must not touch the stack. Left out are SSE,
   and with AVX2's sixteen registers the tiles of codes, whose totals lie there.

Finding nothing to check is a failure as well: an object of link-time optimisation holds no code yet.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MERGEABLE = set("WwVvuC")
PRODUCT = re.compile(r"\b(vfmadd\w*ps|vdpbf16ps|tdpbf16ps|vpdpbusd|vpmaddwd|vpmaddubsw)\b")
# LLVM's objdump writes 0x before the target, GNU's does not.
JUMP = re.compile(r"^\s*([0-9a-f]+):\s+(j\w+)\s+(?:0x)?([0-9a-f]+)\b")
# %rbp is where the stack begins in a function that sets it so, and in others a pointer like any other.
FRAME = re.compile(r"\b(mov\w*\s+%rsp|lea\w*\s+\S*\(%rsp\)),\s*%rbp")
STACK = re.compile(r"\(%rsp")
STACK_OF_FRAME = re.compile(r"\(%r[sb]p")


def symbol_problems(nm: str, path: Path) -> list[str]:
    """Symbols of `path` outside its namespace that a linker may replace by another object's."""
    namespace = f"llama_ext::isa_{path.name.split('.')[0]}::"
    listing = subprocess.run([nm, "-C", str(path)], check=True, capture_output=True, text=True).stdout
    symbols = re.findall(r"^[0-9a-f]*\s+(\S)\s+(.*)$", listing, re.MULTILINE)
    if not any(kind in "tT" for kind, _ in symbols):
        return [f"no functions found by {nm}. Was it compiled with -flto?"]
    return [f"mergeable symbol {name}" for kind, name in symbols if kind in MERGEABLE and namespace not in name]


def spill_problems(objdump: str, path: Path) -> list[str]:
    """Innermost loops of tile functions that multiply and touch the stack."""
    has_few_registers = path.name.startswith("avx2")
    listing = subprocess.run(
        [objdump, "-d", "-C", "--no-show-raw-insn", str(path)], check=True, capture_output=True, text=True
    )
    bad = []
    checked = 0
    name, body = "", []
    for line in [*listing.stdout.splitlines(), "0 <end>:"]:
        header = re.match(r"^[0-9a-f]+ <(.*)>:$", line)
        if header is None:
            body.append(line)
            continue
        if re.search(r"\b(tile|panel)", name) and not (has_few_registers and "tile_codes" in name):
            stack = STACK_OF_FRAME if any(FRAME.search(text) for text in body) else STACK
            for place, loop in _product_loops(body):
                checked += 1
                if any(stack.search(text) for text in loop):
                    bad.append(f"sums on the stack in {name} at {place}")
        name, body = header[1], []
    if not checked:
        return [f"no loop that multiplies found by {objdump} in a function named tile or panel: none was checked"]
    return bad


def _product_loops(body: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Address and lines of each innermost loop that multiplies."""
    address_of = {}
    for index, line in enumerate(body):
        match = re.match(r"^\s*([0-9a-f]+):", line)
        if match:
            address_of[match[1]] = index
    for index, line in enumerate(body):
        jump = JUMP.match(line)
        if jump is None or jump[3] not in address_of or address_of[jump[3]] >= index:
            continue
        loop = body[address_of[jump[3]] : index]
        is_innermost = not any(
            (inner := JUMP.match(text)) and address_of.get(inner[3], len(body)) <= place + address_of[jump[3]]
            for place, text in enumerate(loop)
        )
        if is_innermost and any(PRODUCT.search(text) for text in loop):
            yield jump[3], loop


def main() -> int:
    """Prints what is wrong and returns 1, or returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", nargs="+", type=Path)
    parser.add_argument("--nm", default="nm")
    parser.add_argument("--objdump", help="without it the second is not checked")
    arguments = parser.parse_args()
    problems = []
    for path in arguments.objects:
        found = symbol_problems(arguments.nm, path)
        if arguments.objdump and path.name.startswith(("avx", "amx")):
            found += spill_problems(arguments.objdump, path)
        problems += [f"{path.name}: {problem}" for problem in found]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
