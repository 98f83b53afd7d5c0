"""An earlier run's checkpoints, while `llama-ext train --overwrite` replaces them: none is lost before there is another one."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import Run, command
from llama_ext.cli.outputs import has_replaced, replaced_checkpoints, settle_replaced
from llama_ext.training import checkpoints

OLD = ["best-00000002", "step-00000002", "step-00000003", "step-00000300"]
SMALL = ["--layers", 1, "--width", 16, "--heads", 2, "--context", 16, "--batch-size", 4, "--warmup", 2]

# Ends as by SIGKILL when so many directories have been moved, or when the new run has saved what is named.
_KILLED = """
import os, pathlib, sys
from llama_ext.cli.outputs import replaced_checkpoints

folder, left, names = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
rename = pathlib.Path.rename

def counted(self, target):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    return rename(self, target)

pathlib.Path.rename = counted
with replaced_checkpoints(folder, True):
    for name in names:
        (folder / name).mkdir()
        (folder / name / "run").write_text("new")
    if left < 100:
        raise ValueError
    os._exit(9)
"""


def fill(folder: Path, names: list[str], run: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "run").write_text(run)


def there(folder: Path) -> dict[str, str]:
    """Of which run each checkpoint is; and nothing else may be there but `mine`."""
    return {path.name: (path / "run").read_text() for path in folder.iterdir() if path.name != "mine"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    fill(folder, OLD, "old")
    (folder / "mine").mkdir()
    return folder


def killed(folder: Path, *names: str, moves: int = 1000) -> None:
    """A run that replaces the checkpoints is killed."""
    process = subprocess.run([sys.executable, "-c", _KILLED, folder, str(moves), *names], check=False)
    assert process.returncode == 9


def test_a_new_checkpoint_takes_the_place_of_all_old_ones(folder: Path) -> None:
    with replaced_checkpoints(folder, overwrite=True):
        assert [path.name for path in folder.iterdir() if path.name in OLD] == []
        assert has_replaced(folder)
        fill(folder, ["step-00000003"], "new")
    assert there(folder) == {"step-00000003": "new"}
    assert (folder / "mine").is_dir()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("new", "left"),
    [
        ([], dict.fromkeys(OLD, "old")),
        # Nobody can go on from the best weights, and they are not the old run's.
        (["best-00000002", "best-00000004"], dict.fromkeys(OLD, "old")),
        (["best-00000002", "step-00000004"], {"best-00000002": "new", "step-00000004": "new"}),
    ],
)
def test_old_checkpoints_come_back_where_there_is_none_to_go_on_from(
    folder: Path, error: type[BaseException], new: list[str], left: dict[str, str]
) -> None:
    def train() -> None:
        fill(folder, new, "new")
        raise error

    with pytest.raises(error), replaced_checkpoints(folder, overwrite=True):
        train()
    assert there(folder) == left
    assert (folder / "mine").is_dir()


@pytest.mark.parametrize("moved", range(len(OLD) + 1))
def test_an_interrupt_between_two_moves_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    rename = Path.rename
    calls = 0

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == moved + 1:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced_checkpoints(folder, overwrite=True):
        pytest.fail("it was interrupted before")
    assert there(folder) == dict.fromkeys(OLD, "old")


@pytest.mark.parametrize("moves", [0, 2, len(OLD), len(OLD) + 1, len(OLD) + 2, len(OLD) + 4])
def test_a_kill_between_two_moves_there_or_back_loses_nothing(folder: Path, moves: int) -> None:
    killed(folder, "best-00000002", moves=moves)
    assert has_replaced(folder)
    assert settle_replaced(folder) == (moves > 0)
    assert there(folder) == dict.fromkeys(OLD, "old")
    assert not settle_replaced(folder)


def test_what_a_killed_run_has_replaced_goes_once_it_has_a_checkpoint(folder: Path) -> None:
    killed(folder, "best-00000002", "best-00000004")
    assert settle_replaced(folder)
    assert there(folder) == dict.fromkeys(OLD, "old")
    killed(folder, "best-00000002", "step-00000002")
    assert not settle_replaced(folder)
    assert there(folder) == {"best-00000002": "new", "step-00000002": "new"}


def test_a_folder_that_is_not_there_has_nothing_to_settle(tmp_path: Path) -> None:
    assert not has_replaced(tmp_path / "x")
    assert not settle_replaced(tmp_path / "x")
    with replaced_checkpoints(tmp_path / "x", overwrite=True):
        assert not (tmp_path / "x").exists()


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 40)
    return path


def contents(folder: Path) -> dict[Path, bytes]:
    """All files but those that a kill has left half written, which the next save removes."""
    files = [path for path in folder.rglob("*") if path.is_file() and "/." not in path.relative_to(folder).as_posix()]
    return {path: path.read_bytes() for path in files}


def test_a_run_that_fails_before_its_first_checkpoint_leaves_the_earlier_run(
    run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model"
    options = ["--out", out, *SMALL, "--steps", 3, "--eval-every", 1]
    assert run("train", file, *options).code == 0
    before = contents(out)
    bests = []

    def full(folder: Path, *_: object, **__: object) -> None:
        bests.extend(folder.glob("best-*"))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", full)
        assert run("train", file, *options, "--overwrite", "--seed", 1).code == 1
    assert bests
    assert contents(out) == before
    result = run("train", file, *options, "--resume")
    assert result.code == 0, result.err


def test_a_run_that_was_killed_before_its_first_checkpoint_gives_the_earlier_one_back(
    run: Run, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    options = ["--out", out, *SMALL, "--schedule", "constant"]
    assert run("train", file, *options, "--steps", 3).code == 0
    before = contents(out)
    log = tmp_path / "log"
    long = ["--steps", 100000, "--save-every", 100000, "--eval-every", 2, "--seed", 1]
    process = subprocess.Popen(command("train", file, *options, *long, "--overwrite", "--log-file", log))
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count('"validation"') > 1):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait(timeout=30)
    assert contents(out) != before
    # Nothing is done by a command that is refused.
    meanwhile = contents(out)
    result = run("train", file, *options, "--steps", 5)
    assert result.code == 2
    assert "say --resume to go on with the run in it, or --overwrite" in result.err
    assert contents(out) == meanwhile
    # A mistake that the run itself finds shows what has come back.
    result = run("train", file, *options, "--steps", 5, "--resume", "--lr", -1)
    assert result.code == 2
    assert "the earlier checkpoints are back" in result.err
    assert contents(out) == before
    result = run("train", file, *options, "--steps", 5, "--resume")
    assert result.code == 0, result.err
    assert "5 steps, " in result.err
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*")) == ["step-00000003", "step-00000005"]
