"""The packages of the extra `onnx`, imported when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from llama_ext.errors import UnsupportedError

__all__ = ["require"]


def require(name: str) -> ModuleType:
    """Imports an optional package.

    Args:
        name: "onnx" or "onnxruntime".

    Returns:
        The module.

    Raises:
        UnsupportedError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(
            f"llama_ext.onnx needs the package {name}, which cannot be imported ({error}). "
            "Install it: pip install 'llama_ext[onnx]'"
        ) from error
