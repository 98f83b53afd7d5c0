"""Saves into one directory come one after the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from llama_ext import LlamaForCausalLM, OptionError
from llama_ext.io.folder_lock import LOCK_FILE, saving_into
from small_config import config_of

if sys.platform == "win32":
    pytest.skip("no locks there", allow_module_level=True)

_HOLDER = """
import sys, time
from llama_ext.io.folder_lock import saving_into
with saving_into(sys.argv[1]):
    print("has it", flush=True)
    sys.stdin.read()
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


def test_a_block_makes_its_directory_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with saving_into(folder):
        assert [entry.name for entry in folder.iterdir()] == [LOCK_FILE]
    assert list(tmp_path.iterdir()) == []
    with saving_into(folder):
        (folder / "x").touch()
    assert [entry.name for entry in folder.iterdir()] == ["x"]


def test_another_thread_waits(tmp_path: Path) -> None:
    with saving_into(tmp_path):
        thread, inside = enters(tmp_path)
        assert not inside.wait(0.2)
    assert inside.wait(10)
    thread.join()
    assert list(tmp_path.iterdir()) == []


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
        assert list(tmp_path.iterdir()) == []


def test_what_a_kill_leaves_holds_up_nobody(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    with saving_into(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


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


def test_many_at_once_are_inside_one_by_one(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            with saving_into(tmp_path / "x"):
                inside.append(index)
                most.append(len(inside))
                inside.remove(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 400
    assert set(most) == {1}


def test_ctrl_c_ends_the_waiting(tmp_path: Path) -> None:
    process = holder(tmp_path)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), saving_into(tmp_path):
        pytest.fail("two at once")
    assert time.monotonic() - started < 10
    timer.join()
    process.communicate(b"")
    with saving_into(tmp_path):
        pass


def test_where_no_lock_can_be_made_the_save_goes_on(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).mkdir()
    with saving_into(tmp_path):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == [LOCK_FILE]


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "victim")
    with saving_into(tmp_path):
        assert not (tmp_path / "victim").exists()


def test_a_path_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="empty"), saving_into(""):
        pass


def test_saves_at_once_leave_a_model_of_one_of_them(tmp_path: Path) -> None:
    models = {vocabulary: LlamaForCausalLM(config_of(vocab_size=vocabulary), seed=1) for vocabulary in (37, 53, 71, 90)}
    for _ in range(20):
        threads = [
            threading.Thread(target=model.save_pretrained, args=(tmp_path / "model",)) for model in models.values()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = LlamaForCausalLM.from_pretrained(tmp_path / "model")
        np.testing.assert_array_equal(found([[1, 2, 3]]), models[found.config.vocab_size]([[1, 2, 3]]))
