"""What a task's directory holds beside a model or an adapter, and which base an adapter in it belongs to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_ext.errors import FormatError, OptionError, UnsupportedError
from llama_ext.io.atomic import atomic_write
from llama_ext.io.peft import CONFIG_FILE, read_adapter_base

__all__ = ["base_of", "saying_who_named", "write_about"]


def base_of(folder: Path, base: Any) -> Any:
    """The base of the adapter in a folder; None: the folder holds no adapter, but a model.

    Args:
        folder: What `save` of a task wrote.
        base: A model, its path or its Hub id, which counts before what adapter_config.json names; or None.

    Returns:
        `base`, or the path or id that is named; None for a model.

    Raises:
        OptionError: An adapter that names no base, and none is given; or one is given for a whole model.
        FormatError: adapter_config.json is malformed.
    """
    if not (folder / CONFIG_FILE).exists():
        if base is not None:
            raise OptionError(f"{folder} is no adapter: it needs no base")
        return None
    found = base if base is not None else read_adapter_base(folder)
    if found is None:
        raise OptionError(f"{folder} is an adapter that names no base: pass base=")
    return found


@contextlib.contextmanager
def saying_who_named(folder: Path, base: Any) -> Iterator[None]:
    """Loads what `base_of` gave: that it is not there is told with the file that names it, as nobody has typed that name just now.

    Args:
        folder: As of `base_of`.
        base: As of `base_of`.

    Raises:
        FormatError: What is loaded is not there or malformed.
        UnsupportedError: It is on the Hub, or of a kind that this version does not know.
    """
    try:
        yield
    except (FormatError, UnsupportedError) as error:
        file = folder / CONFIG_FILE
        if base is not None or not file.exists():
            raise
        raise type(error)(
            f"{error} That base is named by {file}; base= (--base of a command) loads another."
        ) from error


def write_about(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a small file of JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(dict(values), ensure_ascii=False, indent=2) + "\n").encode("utf-8"))
