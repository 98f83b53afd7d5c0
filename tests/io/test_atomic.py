"""Saves replace a link that lies in their way, write through one only where the user named it, and leave no mixture."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import llama_ext
from llama_ext.io.atomic import atomic_write, check_file, check_folder, exchange
from llama_ext.io.checkpoint import write_sharded
from llama_ext.models.generation_config import GenerationDefaults


def _model(seed: int = 0, letters: str | None = None, **options: Any) -> llama_ext.LlamaForCausalLM:
    config = llama_ext.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        **options,
    )
    tokenizer = None if letters is None else llama_ext.Tokenizer.characters(letters)
    return llama_ext.LlamaForCausalLM(config, tokenizer, seed=seed)


def test_a_followed_link_survives_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for content in (b"new", b"newer"):
        with atomic_write(tmp_path / "link", follow_links=True) as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_saving_a_model_over_a_folder_of_links_leaves_the_files_they_name(tmp_path: Path) -> None:
    # As a snapshot in the Hub's cache, whose links name blobs that other snapshots share.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    _model(seed=1).save_pretrained(blobs)
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    snapshot.mkdir()
    for name in before:
        (snapshot / name).symlink_to(blobs / name)
    _model(seed=2).save_pretrained(snapshot)
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before
    assert not any(path.is_symlink() for path in snapshot.iterdir())
    assert (snapshot / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_a_save_that_is_refused_leaves_a_model_that_loads(tmp_path: Path) -> None:
    _model(seed=1, letters="abc").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "a\ud800"}))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = llama_ext.LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(llama_ext.OptionError, match="the chat template 'default' has half of a surrogate pair"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert model.tokenizer is not None
    model.tokenizer.chat_template = None
    model.save_pretrained(tmp_path)
    assert llama_ext.LlamaForCausalLM.from_pretrained(tmp_path).generate("a", max_new_tokens=2)


@pytest.mark.parametrize("path", [None, 3, b"model", "a\0b", "a\ud800"])
def test_what_no_file_can_be_called_is_not_saved_into(
    path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = _model(letters="abc")
    assert model.tokenizer is not None
    for save in (
        model.save_pretrained,
        model.tokenizer.save_pretrained,
        model.config.save_pretrained,
        model.session().save,
    ):
        with pytest.raises(llama_ext.OptionError, match="the path to save into"):
            save(path)
    assert os.listdir() == []


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """Failure elsewhere: saving to /dev/null as root left a file in its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    (tmp_path / "link").symlink_to(pipe)
    with atomic_write(tmp_path / "link", follow_links=True) as file:
        file.write(b"through")
    reader.join(10)
    assert found == [b"through"]
    assert pipe.is_fifo()
    assert (tmp_path / "link").is_symlink()


def test_a_file_in_a_missing_directory_is_named_and_so_is_the_directory(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sub" / "x"
    for follow_links in (True, False):
        missing = pytest.raises(FileNotFoundError, match=r"the directory .*sub does not exist: create it")
        with missing as caught, atomic_write(path, follow_links=follow_links):
            pass
        assert caught.value.filename == str(path)
        assert ".tmp" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="does not exist: create it first"):
        check_file(path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_below_a_file_and_one_that_is_a_directory_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, kind, reason in (
        (tmp_path / "file" / "x", NotADirectoryError, "file is not a directory"),
        (tmp_path, IsADirectoryError, "this is a directory: name a file"),
        (Path("/"), IsADirectoryError, "this is a directory: name a file"),
    ):
        with pytest.raises(kind, match=reason) as caught:
            check_file(path)
        assert caught.value.filename == str(path)
        with pytest.raises(kind, match=reason) as caught, atomic_write(path):
            pass
        assert caught.value.filename == str(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_and_a_rename_that_fails_name_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x")
    # What the block reads keeps its own name.
    with pytest.raises(FileNotFoundError) as missing, atomic_write(tmp_path / "x"):
        (tmp_path / "source").read_bytes()
    assert missing.value.filename == str(tmp_path / "source")

    def refuse(source: str, target: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(source), None, os.fspath(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError) as refused, atomic_write(tmp_path / "x"):
        pass
    assert str(refused.value) == f"[Errno {errno.EACCES}] Permission denied: '{tmp_path / 'x'}'"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["模" * 80, "x" + "模" * 84, "ä" * 127, "🙂" * 63, "x" * 255])
def test_any_name_that_a_file_may_have_can_be_saved_over(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")
    check_file(path)
    with atomic_write(path) as file:
        file.write(b"new")
        # Systems that take only UTF-8 would refuse half a character.
        assert all(os.fsencode(each).decode() for each in os.listdir(tmp_path))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == [name]


def test_a_name_that_is_no_text_can_be_saved_over(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff" * 255)
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    check_folder(tmp_path)
    check_file(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="no files can be written into this directory") as caught:
            check_folder(folder)
        assert caught.value.filename == str(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_session_is_saved_through_a_link(tmp_path: Path) -> None:
    model = _model()
    session = model.session(max_length=8)
    session.append([1, 2, 3])
    (tmp_path / "link").symlink_to(tmp_path / "target")
    session.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert model.load_session(tmp_path / "target").tokens == [1, 2, 3]


def _contents(model: llama_ext.LlamaForCausalLM) -> tuple[Any, ...]:
    assert model.tokenizer is not None
    logits = model([[1, 2, 3, 4]]).tobytes()
    return model.config.rope_parameters, logits, model.tokenizer.decode([0, 1, 2]), model.generation_defaults


class Crash:
    """Lets a number of files be replaced or removed; from then on nothing is, as if the process had been killed."""

    def __init__(self, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left = steps
        for name in ("replace", "unlink"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise OSError("killed")
            return function(*arguments)

        return call


@pytest.mark.parametrize("shard_bytes", [1000, 1 << 30], ids=["shards", "one_file"])
def test_a_save_that_is_cut_short_leaves_the_old_model_or_the_new_one_or_none(
    shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The two differ in everything that a file says, and not in the names and shapes of their tensors.
    monkeypatch.setitem(write_sharded.__kwdefaults__, "max_shard_bytes", shard_bytes)
    old = _model(seed=1, letters="abc", rope_theta=1e4)
    old.generation_defaults = GenerationDefaults(top_k=4)
    new = _model(seed=2, letters="xyz", rope_theta=10.0)
    new.generation_defaults = GenerationDefaults(temperature=0.5)
    old.save_pretrained(tmp_path / "old")
    found = []
    for steps in itertools.count():
        folder = tmp_path / str(steps)
        shutil.copytree(tmp_path / "old", folder)
        with monkeypatch.context() as patched:
            Crash(steps, patched)
            try:
                new.save_pretrained(folder)
                ended = True
            except OSError:
                ended = False
        try:
            contents = _contents(llama_ext.LlamaForCausalLM.from_pretrained(folder))
            found.append({_contents(old): "old", _contents(new): "new"}.get(contents, "mixture"))
        except llama_ext.FormatError as error:
            found.append("none" if str(folder / "config.json") in str(error) else str(error))
        new.save_pretrained(folder)
        assert _contents(llama_ext.LlamaForCausalLM.from_pretrained(folder)) == _contents(new)
        if ended:
            break
    assert list(dict.fromkeys(found)) == ["old", "none", "new"]
    assert found[-1] == "new"


def test_what_cannot_be_written_is_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    _model(seed=1).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(llama_ext.OptionError, match="extra"):
        _model(seed=2, extra={"note": object()}).save_pretrained(tmp_path)
    model = _model(seed=2)
    model.generation_defaults = GenerationDefaults(ignored={"note": object()})
    with pytest.raises(llama_ext.FormatError, match="generation defaults"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges names in one step")
def test_names_are_exchanged_of_directories_that_hold_something(tmp_path: Path) -> None:
    for name in ("a", "ü"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "was").write_text(name)
    if not exchange(tmp_path / "a", tmp_path / "ü"):
        pytest.skip("this file system cannot exchange names")
    assert (tmp_path / "a" / "was").read_text() == "ü"
    assert (tmp_path / "ü" / "was").read_text() == "a"
    with pytest.raises(FileNotFoundError) as caught:
        exchange(tmp_path / "a", tmp_path / "none")
    assert caught.value.filename == str(tmp_path / "a")


def test_an_empty_path_is_not_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = _model(letters="abcdefgh")
    model.add_adapter("a", llama_ext.LoRA(r=1))
    model.set_adapter(None)
    assert model.tokenizer is not None
    for save in (
        model.save_pretrained,
        model.config.save_pretrained,
        model.tokenizer.save_pretrained,
        lambda path: model.save_adapter(path, "a"),
        lambda path: llama_ext.convert("demo", path),
        lambda path: llama_ext.quantize("demo", path, dtype="int8"),
        lambda path: write_sharded(path, []),
    ):
        with pytest.raises(llama_ext.OptionError, match="the path to save into is empty"):
            save("")
    for check in (check_folder, check_file):
        with pytest.raises(FileNotFoundError, match="is empty"):
            check("")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_directory_is_told_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="this is a file, and a directory is to be written") as caught:
        _model().save_pretrained(tmp_path / "file")
    assert caught.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""
