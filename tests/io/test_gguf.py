"""Which file a path means."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ext.errors import FormatError
from llama_ext.io.gguf import find_gguf


def test_a_file_is_known_by_its_suffix_or_its_first_bytes(tmp_path: Path) -> None:
    for name, data in (("x.gguf", b""), ("blob", b"GGUF"), ("model.safetensors", b"GGU"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
    assert find_gguf(tmp_path / "x.gguf") == tmp_path / "x.gguf"
    assert find_gguf(tmp_path / "blob") == tmp_path / "blob"
    for name in ("model.safetensors", "empty", "missing", "x" * 5000):
        assert find_gguf(tmp_path / name) is None


def test_a_directory_is_its_only_file_unless_there_are_safetensors(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None
    (tmp_path / "b.gguf").touch()
    assert find_gguf(tmp_path) == tmp_path / "b.gguf"
    (tmp_path / "a.gguf").touch()
    with pytest.raises(FormatError, match=r"2 GGUF files here: a\.gguf, b\.gguf"):
        find_gguf(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert find_gguf(tmp_path) is None
