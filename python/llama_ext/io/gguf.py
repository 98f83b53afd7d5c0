"""The refusal of GGUF files, which this version does not read."""

from __future__ import annotations

import os

from llama_ext.errors import UnsupportedError

__all__ = ["GGUF_ADVICE", "gguf_error"]

GGUF_ADVICE = "GGUF is not read by this version. Use the safetensors checkpoint that it was converted from."


def gguf_error(path: str | os.PathLike[str]) -> UnsupportedError:
    """What to raise for a GGUF file, or for a directory with nothing but one.

    Args:
        path: The file or directory, for the message.

    Returns:
        The error.
    """
    return UnsupportedError(f"{os.fspath(path)}: {GGUF_ADVICE}")
