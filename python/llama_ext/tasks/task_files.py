"""What a task's directory holds beside a model or an adapter, and which base an adapter in it belongs to."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ext.errors import FormatError, LlamaExtError, OptionError, UnsupportedError
from llama_ext.io.atomic import atomic_write, named, remove
from llama_ext.io.checkpoint import remove_weights
from llama_ext.io.folder_lock import saving_into
from llama_ext.io.peft import CONFIG_FILE, WEIGHTS_FILE, read_adapter_base

if TYPE_CHECKING:
    from llama_ext.runtime.loaded_model import LoadedModel

__all__ = [
    "CLASSIFIER_FILE",
    "TRANSLATOR_FILE",
    "base_of",
    "refuse_another_task",
    "refuse_loading",
    "save_task",
    "saying_who_named",
]

# Beside the weights or the adapter: what these have no word for. Of a classifier's adapter, its labels; the prompt.
CLASSIFIER_FILE = "classifier.json"
TRANSLATOR_FILE = "translator.json"

_MODEL_CONFIG_FILE = "config.json"

# How a base is loaded where nothing is said, as `LlamaForCausalLM.from_pretrained` has it.
_DEFAULTS = {"dtype": "auto", "device": "cpu", "compute": "auto", "threads": None}


def refuse_loading(base: LoadedModel, **asked: Any) -> None:
    """Checks that nothing is said of how to load a base which is loaded already.

    Args:
        base: The model.
        **asked: dtype, device, compute and threads. What it has already may be said once more.

    Raises:
        OptionError: It was loaded in another way.
    """
    for name, value in asked.items():
        found = getattr(base, name)
        # "cuda" is the first GPU.
        if value == _DEFAULTS[name] or value == found or (value, found) == ("cuda", "cuda:0"):
            continue
        raise OptionError(
            f"{name}={value!r} is how a base is loaded, and this one is loaded already, with {name}={found!r}: load it so, or give "
            "its path"
        )


def refuse_another_task(folder: Path, file: str) -> None:
    """Checks that a folder is not what the other task has saved.

    Args:
        folder: What `save` of a task wrote.
        file: Of the task that is to be loaded: CLASSIFIER_FILE or TRANSLATOR_FILE.

    Raises:
        OptionError: It is.
    """
    if file == CLASSIFIER_FILE and (folder / TRANSLATOR_FILE).is_file():
        raise OptionError(f"{folder} is a translator, no classifier: Translator.load reads it")
    if file == TRANSLATOR_FILE and not (folder / file).exists() and _is_classifier(folder):
        raise OptionError(f"{folder} is a classifier, no translator: TextClassifier.load reads it")


def _is_classifier(folder: Path) -> bool:
    from llama_ext.runtime.loading import read_configs

    if (folder / CLASSIFIER_FILE).is_file():
        return True
    try:
        return read_configs(folder)[0].is_classifier
    except LlamaExtError:
        return False


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


def save_task(
    model: LoadedModel,
    adapter: str,
    directory: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None,
    file: str,
    values: Mapping[str, Any] | None,
) -> None:
    """Writes what a task has learned and its own file; an adapter and the files of tasks that other saves have left in the directory go.

    An adapter that was there is what loads until all of a model is written, and the model is from then on. A whole model of a task that
    was there goes once an adapter is written whose base is named and is another; any other model stays, as it may be the base.

    Args:
        model: The model.
        adapter: The name of the adapter to write; where there is none of this name, the whole model is.
        directory: Created if it does not exist.
        base: What the adapter is to name as its base.
        file: Of the task: CLASSIFIER_FILE or TRANSLATOR_FILE.
        values: What it is to say; None: nothing, there is to be none.

    Raises:
        OptionError: The whole model is to be written, and another adapter is active.
        OSError: It cannot be written.
    """
    with saving_into(directory):
        _save_task(model, adapter, named(directory), base=base, file=file, values=values)


def _save_task(
    model: LoadedModel,
    adapter: str,
    folder: Path,
    *,
    base: str | os.PathLike[str] | None,
    file: str,
    values: Mapping[str, Any] | None,
) -> None:
    if adapter in model.adapters:
        # Labels or a prompt that are there would be taken for the new adapter's, where this is cut short.
        replaces_whole = base is not None and not _is_same(folder, base) and _holds_whole(folder)
        remove(folder / file)
        model.save_adapter(folder, adapter, base=base)
        if replaces_whole:
            remove(folder / _MODEL_CONFIG_FILE)  # nothing loads without it
            remove_weights(folder)
    else:
        model.save_pretrained(folder)
        # Not before: a save that is refused or cut short leaves the adapter that was there.
        for old in (CONFIG_FILE, WEIGHTS_FILE, file):
            remove(folder / old)
    for other in (CLASSIFIER_FILE, TRANSLATOR_FILE):
        if other != file or values is None:
            remove(folder / other)
    if values is not None:
        _write_about(folder / file, values)


def _is_same(folder: Path, base: str | os.PathLike[str]) -> bool:
    return folder.resolve() == Path(base).resolve()


def _holds_whole(folder: Path) -> bool:
    """Whether a folder holds all of a model that a task has saved, and no adapter, whose base it might be."""
    if (folder / CONFIG_FILE).exists():
        return False
    return (folder / TRANSLATOR_FILE).is_file() or _is_classifier(folder)


def _write_about(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(dict(values), ensure_ascii=False, indent=2) + "\n").encode("utf-8"))
