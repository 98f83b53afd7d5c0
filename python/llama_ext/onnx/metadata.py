"""What an exported graph says about itself, and the hash of the report that proves it."""

from __future__ import annotations

import os

import onnx

from llama_ext._version import __version__
from llama_ext.errors import FormatError
from llama_ext.io.atomic import atomic_write

__all__ = ["DTYPE_KEY", "PROFILE_KEY", "REPORT_KEY", "VERSION_KEY", "get_metadata", "set_metadata", "set_report_hash"]

VERSION_KEY = "llama_ext.version"
PROFILE_KEY = "llama_ext.profile"
DTYPE_KEY = "llama_ext.dtype"
REPORT_KEY = "llama_ext.report_sha256"


def set_metadata(model: onnx.ModelProto, profile: str, dtype: str) -> None:
    """Names the profile, the dtype and the version of this package."""
    for key, value in ((VERSION_KEY, __version__), (PROFILE_KEY, profile), (DTYPE_KEY, dtype)):
        model.metadata_props.add(key=key, value=value)


def get_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a graph's file says about itself.

    Args:
        path: The .onnx file.

    Returns:
        By key; empty for a graph that is not ours.

    Raises:
        FormatError: It is no such file.
    """
    return {prop.key: prop.value for prop in _read(path).metadata_props}


def set_report_hash(path: str | os.PathLike[str], digest: str) -> None:
    """Writes the hash of a verification's report into a graph, whole or not at all; the weights are not touched.

    Args:
        path: The .onnx file.
        digest: SHA-256 of the report, in hexadecimal.

    Raises:
        FormatError: It is no such file.
        OSError: It cannot be written.
    """
    model = _read(path)
    found = next((prop for prop in model.metadata_props if prop.key == REPORT_KEY), None)
    if found is None:
        model.metadata_props.add(key=REPORT_KEY, value=digest)
    else:
        found.value = digest
    write_model(path, model)


def write_model(path: str | os.PathLike[str], model: onnx.ModelProto) -> None:
    """Writes a graph, the same bytes each time."""
    with atomic_write(path) as file:
        file.write(model.SerializeToString(deterministic=True))


def _read(path: str | os.PathLike[str]) -> onnx.ModelProto:
    try:
        return onnx.load(os.fspath(path), load_external_data=False)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror or error}", path=os.fspath(path)) from error
    except Exception as error:  # protobuf's own classes
        raise FormatError(f"this is no ONNX graph: {error}", path=os.fspath(path)) from error
