"""Which file a path means, where it may be a GGUF file or a directory with one."""

from __future__ import annotations

import os
from pathlib import Path

from llama_ext.errors import FormatError
from llama_ext.io.checkpoint import INDEX_FILE, SINGLE_FILE
from llama_ext.io.gguf_file import MAGIC

__all__ = ["find_gguf"]


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means.

    Args:
        path: A file or a directory.

    Returns:
        The file itself, by its suffix or its first bytes; of a directory without safetensors the one GGUF file in it; None
        when it is something else.

    Raises:
        FormatError: A directory with several of them.
    """
    # os.path rather than Path's methods: those raise for a name that is too long.
    if os.path.isdir(path):
        if os.path.lexists(path / SINGLE_FILE) or os.path.lexists(path / INDEX_FILE):
            return None
        try:
            found = sorted(name for name in os.listdir(path) if name.endswith(".gguf"))
        except OSError:  # whoever opens its files says so
            return None
        if len(found) > 1:
            raise FormatError(
                f"there are {len(found)} GGUF files here: {', '.join(found[:8])}. Name the one to load.", path=str(path)
            )
        return path / found[0] if found else None
    if path.suffix == ".gguf":
        return path
    try:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return path if file.read(len(MAGIC)) == MAGIC else None
    except OSError:
        pass
    return None
