"""The check of a GPU runs every test and every tool that it should, and says of each what came of it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from devices import requires_cuda

# Finds nothing, a race, or never ends, each as one of its tools; notes its tests.
SANITIZER = """#!/bin/sh
for last; do :; done
echo "$2 $last" >>seen
case $2 in
memcheck) echo '========= ERROR SUMMARY: 0 errors' ;;
racecheck) echo '========= Error: Race reported'; exit 9 ;;
*) sleep 60 & echo $! >child; wait ;;
esac
"""


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "compute-sanitizer"
    path.write_text(SANITIZER)
    path.chmod(0o755)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    return str(path)


def test_each_sanitizer_is_told_of_with_what_it_found(sanitizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not gpu_check.sanitize(sanitizer, ["a", "b"], ("memcheck", "racecheck"), processes=1)
    said = capsys.readouterr().out
    for part in ("memcheck: clean after", "racecheck: FAILED after", "Race reported"):
        assert part in said
    assert "0 errors" not in said, "what is clean has nothing more to say"
    assert gpu_check.sanitize(sanitizer, ["a", "b"], ("memcheck",), processes=1)


def test_tests_are_dealt_out_to_the_processes_of_each_sanitizer(sanitizer: str, tmp_path: Path) -> None:
    assert gpu_check.sanitize(sanitizer, ["a", "b", "c"], ("memcheck",), processes=2)
    assert sorted((tmp_path / "seen").read_text().splitlines()) == ["memcheck b", "memcheck c"], "a and c, and b"
    assert gpu_check.sanitize(sanitizer, ["d"], ("memcheck",), processes=4), "no process is without a test"
    assert (tmp_path / "seen").read_text().splitlines()[2:] == ["memcheck d"]


def test_the_gpu_that_is_checked_is_the_only_one_that_tests_see(
    sanitizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_check.seeing("cuda") == {"CUDA_VISIBLE_DEVICES": "0"}
    assert gpu_check.seeing("cuda:2") == {"CUDA_VISIBLE_DEVICES": "2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert gpu_check.seeing("cuda:1") == {"CUDA_VISIBLE_DEVICES": "3"}
    Path(sanitizer).write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" >>seen\n')
    assert gpu_check.sanitize(sanitizer, ["a"], ("memcheck",), device="cuda:1")
    assert (tmp_path / "seen").read_text() == "3\n"


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_sanitizer_that_does_not_end_is_stopped_with_what_it_started(
    sanitizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not gpu_check.sanitize(sanitizer, ["a"], ("initcheck",), seconds=1.0)
    assert "initcheck: not finished (0 of 1 processes clean) after" in capsys.readouterr().out
    if (started := tmp_path / "child").exists():  # A machine with much else to do may not have come so far.
        deadline = time.monotonic() + 10  # A signal takes effect when the process has its turn.
        while is_running(started.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(started.read_text().strip())


def test_what_sanitizers_watch_is_there() -> None:
    names = gpu_check.collect([selection for selection in gpu_check.SANITIZED if "::" in selection])
    assert len(names) == len(set(names))
    for selection in gpu_check.SANITIZED:
        path, _, name = selection.partition("[")[0].partition("::")
        assert (gpu_check.ROOT / path).is_file()
        assert not name or any(each.startswith(f"{path}::{name}") for each in names), selection
    with pytest.raises(RuntimeError, match="not found"):
        gpu_check.collect(["tests/ops/test_dropout.py::test_that_is_not_there"])


@requires_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("passes", [True, False], ids=["pass", "fail"])
def test_tests_run_under_each_setting_and_a_failure_is_that_of_the_check(
    passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []

    def run(command: list[str], *, env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert env["CUDA_VISIBLE_DEVICES"]
        assert command[-1] == "tests"
        runs.append(env.get("LLAMA_EXT_CUDA_ONE_ROW", ""))
        return subprocess.CompletedProcess(command, 0 if passes or not runs[-1] else 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_check.main(["--tools"]) == (0 if passes else 1)
    assert runs == ["", "1"]


def test_tools_that_are_asked_for_and_missing_are_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert not gpu_check.check(runs_tests=False)
    assert "compute-sanitizer is not installed" in capsys.readouterr().out
