"""Saves into one directory come one after the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_ext import LlamaForCausalLM, OptionError, Tokenizer
from llama_ext.io import folder_lock
from llama_ext.io.folder_lock import saving_into
from llama_ext.training.checkpoints import locked
from small_config import config_of

if sys.platform == "win32":
    pytest.skip("Windows has no flock, and saves do not wait there", allow_module_level=True)

_HOLDER = """
import sys, time
from llama_ext.io.folder_lock import saving_into
with saving_into(sys.argv[1]):
    print("has it", flush=True)
    sys.stdin.read()
"""


# Its child lives until its input ends.
_FORKER = """
import os, sys
from llama_ext.io.folder_lock import saving_into
with saving_into(sys.argv[1]):
    child = os.fork()
    if child == 0:
        sys.stdin.read()
        os._exit(0)
print("has had it", flush=True)
os.waitpid(child, 0)
"""


def holder(folder: Path) -> subprocess.Popen[bytes]:
    """Another process that has the directory until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"has it\n"
    return process


def enters(folder: Path) -> tuple[threading.Thread, threading.Event]:
    """A thread that tells when it has the directory."""
    inside = threading.Event()

    def work() -> None:
        with saving_into(folder):
            inside.set()

    thread = threading.Thread(target=work)
    thread.start()
    return thread, inside


def together(count: int, work: Callable[[int], None]) -> None:
    """Does it in so many threads at once; what one raises is raised."""
    raised: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_block_makes_its_directory_and_leaves_nothing(tmp_path: Path) -> None:
    folder, before = tmp_path / "a" / "b", open_descriptors()
    with saving_into(folder):
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
    with saving_into(folder):
        (folder / "x").touch()
    assert [entry.name for entry in folder.iterdir()] == ["x"]
    assert open_descriptors() == before


def test_another_thread_waits(tmp_path: Path) -> None:
    with saving_into(tmp_path):
        thread, inside = enters(tmp_path)
        assert not inside.wait(0.2)
    assert inside.wait(10)
    thread.join()


def test_another_process_is_waited_for_and_a_kill_ends_its_save(tmp_path: Path) -> None:
    for ends_by_itself in (True, False):
        process = holder(tmp_path)
        thread, inside = enters(tmp_path)
        assert not inside.wait(0.2)
        if ends_by_itself:
            process.communicate(b"")
        else:
            process.kill()
            process.communicate()
        assert inside.wait(10)
        thread.join()


def test_blocks_of_one_thread_may_be_nested_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    with saving_into(tmp_path / "real"), saving_into(tmp_path / "link"), saving_into(tmp_path / "." / "real"):
        thread, inside = enters(tmp_path / "real")
        assert not inside.wait(0.2)
    thread.join()


def test_other_directories_do_not_wait(tmp_path: Path) -> None:
    with saving_into(tmp_path / "one"):
        thread, inside = enters(tmp_path / "two")
        assert inside.wait(10)
        thread.join()


@pytest.mark.parametrize("is_kept", [True, False])
def test_many_at_once_are_inside_one_by_one(is_kept: bool, tmp_path: Path) -> None:
    """Where nothing is saved the directory goes each time, and whoever waits for it makes it again."""
    folder = tmp_path / "x" / "y"
    inside: list[int] = []
    most: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            with saving_into(folder):
                inside.append(index)
                time.sleep(0.0005)
                most.append(len(inside))
                inside.remove(index)
                if is_kept:
                    (folder / "saved").touch()
                assert folder.is_dir()

    together(8, work)
    assert most == [1] * 160


def test_saves_that_fail_take_the_directory_from_nobody(tmp_path: Path) -> None:
    model = LlamaForCausalLM(config_of(), seed=1)

    def work(index: int) -> None:
        for _ in range(10):
            if index % 2 == 0:
                with pytest.raises(ZeroDivisionError), saving_into(tmp_path / "model"):
                    raise ZeroDivisionError
            else:
                model.save_pretrained(tmp_path / "model")

    together(4, work)
    np.testing.assert_array_equal(LlamaForCausalLM.from_pretrained(tmp_path / "model")([[1, 2]]), model([[1, 2]]))


def test_ctrl_c_ends_the_waiting(tmp_path: Path) -> None:
    process, before = holder(tmp_path), open_descriptors()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), saving_into(tmp_path):
        pytest.fail("two at once")
    assert time.monotonic() - started < 10
    timer.join()
    assert open_descriptors() == before
    process.communicate(b"")
    with saving_into(tmp_path):
        pass


def test_a_process_that_is_forked_in_a_save_does_not_go_on_with_it(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _FORKER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"has had it\n"
    thread, inside = enters(tmp_path)
    assert inside.wait(10)
    thread.join()
    process.communicate(b"")


def test_where_there_are_no_locks_saves_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    before = open_descriptors()
    with saving_into(tmp_path / "x"):
        (tmp_path / "x" / "saved").touch()
    assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["saved"]
    assert open_descriptors() == before


def test_a_callback_may_save_where_the_checkpoints_of_its_training_are(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        thread, inside = enters(tmp_path / "run")
        assert inside.wait(10)
        thread.join()
        with saving_into(tmp_path / "run"):
            (tmp_path / "run" / "x").touch()


def test_a_directory_that_another_one_has_replaced_is_locked_instead(tmp_path: Path) -> None:
    process = holder(tmp_path / "x")
    thread, inside = enters(tmp_path / "x")
    assert not inside.wait(0.2)
    (tmp_path / "x").rename(tmp_path / "old")
    with saving_into(tmp_path / "x"):
        process.communicate(b"")
        assert not inside.wait(0.2)
        (tmp_path / "x" / "saved").touch()
    assert inside.wait(10)
    thread.join()


def test_a_path_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="empty"), saving_into(""):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="this is a file"), saving_into(tmp_path / "file"):
        pass


def test_saves_at_once_leave_a_model_of_one_of_them(tmp_path: Path) -> None:
    models = {vocabulary: LlamaForCausalLM(config_of(vocab_size=vocabulary), seed=1) for vocabulary in (37, 53, 71, 90)}
    for _ in range(20):
        together(4, lambda index: list(models.values())[index].save_pretrained(tmp_path / "model"))
        found = LlamaForCausalLM.from_pretrained(tmp_path / "model")
        np.testing.assert_array_equal(found([[1, 2, 3]]), models[found.config.vocab_size]([[1, 2, 3]]))


def test_tokenizers_at_once_are_of_one_of_them(tmp_path: Path) -> None:
    made = [Tokenizer.train([text], kind="char", eos_token=end) for text, end in (("abc", "<a>"), ("abcdefgh", "<b>"))]
    for _ in range(20):
        together(2, lambda index: made[index].save_pretrained(tmp_path / "t"))
        found = Tokenizer.from_pretrained(tmp_path / "t")
        assert (len(found), found.eos_token) in [(len(each), each.eos_token) for each in made]
