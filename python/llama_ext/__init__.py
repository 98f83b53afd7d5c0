"""Load, run and train Llama models on a CPU or an NVIDIA GPU, fast, without torch.

Everything but the errors is imported when it is first used (PEP 562), so that `import llama_ext` costs next to nothing
and a command that only parses its arguments never loads NumPy or the compiled core.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from llama_ext._version import __version__
from llama_ext.errors import (
    CheckpointError,
    ContextLengthError,
    DeviceError,
    DTypeError,
    FormatError,
    LimitError,
    LlamaExtError,
    NumericError,
    OptionError,
    OutOfMemoryError,
    ShapeError,
    TokenIdError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from llama_ext import interpret, onnx, ops, training
    from llama_ext.limits import Limits
    from llama_ext.models.config import LlamaConfig
    from llama_ext.models.lora import LoRA
    from llama_ext.runtime.classifier import LlamaForSequenceClassification
    from llama_ext.runtime.conversion import convert
    from llama_ext.runtime.generation import GenerationOutput, Piece
    from llama_ext.runtime.model import LlamaForCausalLM
    from llama_ext.runtime.profiling import set_nvtx_ranges
    from llama_ext.runtime.quantization import QuantizationReport, QuantizedTensor, quantize
    from llama_ext.runtime.scoring import LogLikelihood, Perplexity
    from llama_ext.runtime.session import Session
    from llama_ext.runtime.threads import get_num_threads, set_num_threads
    from llama_ext.runtime.tokenizer import Tokenizer
    from llama_ext.system_info import Info, info
    from llama_ext.tasks import ClassificationReport, TextClassifier, TranslationReport, Translator

__all__ = [
    "CheckpointError",
    "ClassificationReport",
    "ContextLengthError",
    "DTypeError",
    "DeviceError",
    "FormatError",
    "GenerationOutput",
    "Info",
    "LimitError",
    "Limits",
    "LlamaConfig",
    "LlamaExtError",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "LoRA",
    "LogLikelihood",
    "NumericError",
    "OptionError",
    "OutOfMemoryError",
    "Perplexity",
    "Piece",
    "QuantizationReport",
    "QuantizedTensor",
    "Session",
    "ShapeError",
    "TextClassifier",
    "TokenIdError",
    "Tokenizer",
    "TranslationReport",
    "Translator",
    "UnsupportedError",
    "__version__",
    "convert",
    "get_num_threads",
    "info",
    "interpret",
    "onnx",
    "ops",
    "quantize",
    "set_num_threads",
    "set_nvtx_ranges",
    "training",
]

# Where each lazy name lives. `interpret`, `ops`, `onnx` and `training` are modules themselves.
_LAZY = {
    "GenerationOutput": "llama_ext.runtime.generation",
    "Info": "llama_ext.system_info",
    "Limits": "llama_ext.limits",
    "LlamaConfig": "llama_ext.models.config",
    "LlamaForCausalLM": "llama_ext.runtime.model",
    "LlamaForSequenceClassification": "llama_ext.runtime.classifier",
    "LoRA": "llama_ext.models.lora",
    "ClassificationReport": "llama_ext.tasks",
    "TextClassifier": "llama_ext.tasks",
    "TranslationReport": "llama_ext.tasks",
    "Translator": "llama_ext.tasks",
    "LogLikelihood": "llama_ext.runtime.scoring",
    "Perplexity": "llama_ext.runtime.scoring",
    "Piece": "llama_ext.runtime.generation",
    "QuantizationReport": "llama_ext.runtime.quantization",
    "QuantizedTensor": "llama_ext.runtime.quantization",
    "Session": "llama_ext.runtime.session",
    "Tokenizer": "llama_ext.runtime.tokenizer",
    "convert": "llama_ext.runtime.conversion",
    "get_num_threads": "llama_ext.runtime.threads",
    "info": "llama_ext.system_info",
    "quantize": "llama_ext.runtime.quantization",
    "set_num_threads": "llama_ext.runtime.threads",
    "set_nvtx_ranges": "llama_ext.runtime.profiling",
}


def __getattr__(name: str) -> object:
    if name in ("interpret", "ops", "onnx", "training"):
        return importlib.import_module(f"llama_ext.{name}")
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'llama_ext' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
