"""The check of what ptxas says: it reads reports, and refuses what spills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_cuda_kernels.py"

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_80'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 368 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4nextPf' for 'sm_90a'
ptxas info    : Function properties for _Z4nextPf
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("stack", "stores", "loads"), [(0, 0, 0), (8, 0, 0), (0, 4, 0), (0, 0, 4)])
def test_spills_and_local_memory_are_refused(tmp_path: Path, stack: int, stores: int, loads: int) -> None:
    report = REPORT.format(stack=stack, stores=stores, loads=loads)
    (tmp_path / "x.o.ptxas").write_text(report)
    done = run("check", tmp_path / "x.o")
    is_clean = stack == stores == loads == 0
    assert (done.returncode == 0) == is_clean
    assert ("_Z4nextPf for sm_90a" in done.stderr) != is_clean
    assert "_Z4goodPf" not in done.stderr
    assert " 255 registers" in run("show", tmp_path / "x.o").stdout


def test_a_report_without_kernels_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.o.ptxas").write_text("")
    assert "no kernels found" in run("check", tmp_path / "x.o").stderr


def test_the_compiler_runs_and_what_it_says_of_kernels_is_kept(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler.py"
    said = REPORT.format(stack=0, stores=0, loads=0)
    compiler.write_text(f"import sys\nsys.stderr.write({said + 'a warning'!r})\nsys.exit(int(sys.argv[3] == 'fail'))\n")
    done = run("compile", sys.executable, compiler, "-o", tmp_path / "y.o", "pass")
    assert (done.returncode, done.stderr) == (0, "a warning")
    assert (tmp_path / "y.o.ptxas").read_text() == said
    failed = run("compile", sys.executable, compiler, "-o", tmp_path / "z.o", "fail")
    assert failed.returncode == 1
    assert "ptxas info" in failed.stderr
    assert not (tmp_path / "z.o.ptxas").exists()
