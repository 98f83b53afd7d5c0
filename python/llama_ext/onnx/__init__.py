"""Models as ONNX graphs: `export` writes them, `verify` proves them, `OrtModel` runs them.

It needs the packages of the extra `onnx`: pip install 'llama_ext[onnx]'. They are imported when a name of here is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_ext.onnx.exporting import ExportResult, export
    from llama_ext.onnx.ort_model import OrtModel
    from llama_ext.onnx.verification import ParityReport, verify

__all__ = ["ExportResult", "OrtModel", "ParityReport", "export", "verify"]

# Where each lazy name lives, and the package that it needs.
_LAZY = {
    "ExportResult": ("llama_ext.onnx.exporting", "onnx"),
    "OrtModel": ("llama_ext.onnx.ort_model", "onnxruntime"),
    "ParityReport": ("llama_ext.onnx.verification", "onnxruntime"),
    "export": ("llama_ext.onnx.exporting", "onnx"),
    "verify": ("llama_ext.onnx.verification", "onnxruntime"),
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'llama_ext.onnx' has no attribute {name!r}")
    from llama_ext.onnx.requirements import require

    module, package = _LAZY[name]
    require(package)
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
