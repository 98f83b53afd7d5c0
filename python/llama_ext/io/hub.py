"""From what a person calls a model to a path on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llama_ext.errors import FormatError, OptionError, UnsupportedError

__all__ = ["DEMO", "resolve", "resolve_small_files"]

# The model that is packaged with the library.
DEMO = "demo"

# Weights only as safetensors: pickled ones are never read, so they are not worth the download either.
_SMALL_PATTERNS = ["*.json", "tokenizer.model", "*.jinja"]
_PATTERNS = [*_SMALL_PATTERNS, "*.safetensors"]
_FILES = (".gguf", ".safetensors", ".json", ".model")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


def resolve(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Finds a model: a path as it is, "demo" in this package, and "organisation/name" on the Hugging Face Hub.

    Args:
        path_or_id: A directory or file, "demo", or a Hub id. An existing path comes first.
        revision: A branch, tag or commit of the Hub; for a Hub id only.

    Returns:
        An existing path.

    Raises:
        FormatError: It is nothing of these, or the Hub does not give it.
        OptionError: A revision of something that is not on the Hub.
        UnsupportedError: A Hub id, and huggingface_hub is not installed.
    """
    name = os.fspath(path_or_id)
    if not name:
        raise FormatError(
            "the path of a model is empty. Expected a directory, a .gguf file, 'demo' or a Hub id like 'organisation/name'."
        )
    path = Path(name)
    found: Path | None = None
    if os.path.exists(name):
        found = path
    elif name == DEMO:
        found = Path(__file__).resolve().parents[1] / "data" / "demo"
        if not found.is_dir():
            raise FormatError("the packaged model is missing. Reinstall llama_ext.", path=str(found))
    if found is not None:
        if revision is not None:
            raise OptionError(f"{name} is a local path: it has no revision {revision!r}.")
        return found
    if not _may_be_hub_id(path_or_id):
        raise FormatError(
            "there is no such directory or file, and it is neither 'demo' nor a Hub id like 'organisation/name'.",
            path=name,
        )
    return _download(name, revision, _PATTERNS)


def resolve_small_files(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Finds what `resolve` finds, for one who reads the config or the tokenizer alone: of a Hub id no weights are downloaded.

    Args:
        path_or_id: As `resolve`.
        revision: As `resolve`.

    Returns:
        A path; one that can only be a path need not exist: who opens it says what was expected there.

    Raises:
        FormatError, OptionError, UnsupportedError: As `resolve`.
    """
    name = os.fspath(path_or_id)
    if name and name != DEMO and not os.path.exists(name):
        if _may_be_hub_id(path_or_id):
            return _download(name, revision, _SMALL_PATTERNS)
        if revision is None:
            return Path(name)
    return resolve(path_or_id, revision)


def _may_be_hub_id(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether to ask the Hub for what is not here."""
    name = os.fspath(path_or_id)
    if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        return False
    # A file of a name like that, or something in a directory that is here, was mistyped: nothing to ask others about.
    path = Path(name)
    return path.suffix not in _FILES and not path.parent.is_dir()


def _download(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UnsupportedError(
            f"{hub_id}: there is no such directory here; to download it from the Hugging Face Hub, "
            "pip install llama_ext[hub]."
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the package documents no common base: HTTP, cache, network and validation errors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FormatError(
            f"there is no such directory here, and the Hugging Face Hub did not give it: {reason}", path=hub_id
        ) from error
