"""The check of the tiers' object files: it reads what nm and objdump list, and refuses what it cannot find."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_tier_symbols.py"

SYMBOLS = """\
0000000000000010 t llama_ext::isa_avx512::tile()
0000000000000000 W llama_ext::isa_avx512::shared()
                 U memcpy
"""
# As GNU's objdump writes it; LLVM's writes the target of a jump as 0x14.
CODE = """\
0000000000000010 <llama_ext::isa_avx512::tile()>:
  10:\t{frame}
  14:\tvfmadd231ps {operand},%zmm1,%zmm2
  1a:\tjne    {target} <llama_ext::isa_avx512::tile()+0x4>
  1c:\tret
"""
LOOP = {"frame": "nop", "operand": "(%rax)", "target": "14"}


def run(folder: Path, symbols: str, code: str, *options: str, tier: str = "avx512") -> subprocess.CompletedProcess[str]:
    """The check, of programs that print these listings."""
    for name, listing in (("nm", symbols), ("objdump", code)):
        (folder / f"{name}.txt").write_text(listing)
        (folder / name).write_text(f"#!/bin/sh\ncat '{folder / name}.txt'\n")
        (folder / name).chmod(0o755)
    options = options or ("--objdump", str(folder / "objdump"))
    command = [sys.executable, str(TOOL), "--nm", str(folder / "nm"), *options, f"{tier}.cpp.o"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", ["14", "0x14"])
@pytest.mark.parametrize(
    ("frame", "operand", "is_clean"),
    [
        ("nop", "(%rax)", True),
        ("nop", "0x40(%rsp)", False),
        ("nop", "-0x40(%rbp)", True),  # Clang's: a pointer like any other
        ("mov    %rsp,%rbp", "-0x40(%rbp)", False),
        ("movq\t%rsp, %rbp", "-0x40(%rbp)", False),
        ("lea    0x10(%rsp),%rbp", "-0x40(%rbp)", False),
    ],
)
def test_a_loop_with_sums_on_the_stack_is_refused(
    tmp_path: Path, target: str, frame: str, operand: str, is_clean: bool
) -> None:
    done = run(tmp_path, SYMBOLS, CODE.format(frame=frame, operand=operand, target=target))
    assert (done.returncode == 0) == is_clean, done.stderr
    found = "" if is_clean else "avx512.cpp.o: sums on the stack in llama_ext::isa_avx512::tile() at 14\n"
    assert done.stderr == found


@pytest.mark.parametrize("tier", ["avx2", "avx2_vnni", "avx512", "amx"])
def test_of_loops_on_the_stack_only_tiles_of_codes_are_let_be_and_only_where_registers_are_few(
    tmp_path: Path, tier: str
) -> None:
    symbols, code = (text.replace("avx512", tier) for text in (SYMBOLS, CODE))
    clean = code.format(**LOOP)
    dirty = code.format(**LOOP | {"operand": "0x40(%rsp)"})
    assert run(tmp_path, symbols, dirty, tier=tier).returncode == 1
    done = run(tmp_path, symbols, clean + dirty.replace("tile", "tile_codes"), tier=tier)
    assert (done.returncode == 0) == (tier in ("avx2", "avx2_vnni")), done.stderr
    assert run(tmp_path, symbols, clean + dirty.replace("tile", "panel_codes_exact"), tier=tier).returncode == 1


def test_a_mergeable_symbol_outside_the_tiers_namespace_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, SYMBOLS + "0000000000000040 W std::min()\n", CODE.format(**LOOP))
    assert done.returncode == 1
    assert done.stderr == "avx512.cpp.o: mergeable symbol std::min()\n"


@pytest.mark.parametrize(
    "code", ["", CODE.format(**LOOP).replace("tile", "other"), CODE.format(**LOOP | {"target": "18"})]
)
def test_code_without_a_loop_to_check_is_refused(tmp_path: Path, code: str) -> None:
    done = run(tmp_path, SYMBOLS, code)
    assert done.returncode == 1
    assert "no loop that multiplies found" in done.stderr


def test_an_object_without_functions_is_refused_and_lto_named(tmp_path: Path) -> None:
    done = run(tmp_path, "0000000000000001 C __gnu_lto_slim\n", CODE.format(**LOOP))
    assert done.returncode == 1
    assert "no functions found" in done.stderr
    assert "-flto" in done.stderr


def test_without_objdump_symbols_alone_are_checked(tmp_path: Path) -> None:
    assert run(tmp_path, SYMBOLS, "", "--objdump=").returncode == 0
