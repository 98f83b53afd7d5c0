"""What every loaded model is, whatever its head: weights in the core, a config, a tokenizer, adapters."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from typing import NoReturn

from llama_ext import _core
from llama_ext._options import shown
from llama_ext.errors import LlamaExtError, OptionError
from llama_ext.models.config import LlamaConfig
from llama_ext.models.generation_config import GenerationDefaults
from llama_ext.runtime import loading, saving
from llama_ext.runtime.adapted import Adapted
from llama_ext.runtime.model_files import ModelFiles
from llama_ext.runtime.prompts import begin_token
from llama_ext.runtime.threads import checked_threads
from llama_ext.runtime.tokenizer import Tokenizer
from llama_ext.runtime.weight_types import WeightTypes

__all__ = ["LoadedModel"]

_COMPUTE = ("auto", "exact")
_KV_DTYPES = ("auto", "float32", "bfloat16", "int8")


class LoadedModel(Adapted):
    """A Llama with its weights in memory; see `LlamaForCausalLM` and `LlamaForSequenceClassification`."""

    tokenizer: Tokenizer | None
    generation_defaults: GenerationDefaults
    _config_ends: tuple[int, ...]
    _training_turn: threading.RLock

    def _prepare(
        self,
        config: LlamaConfig,
        tokenizer: Tokenizer | None,
        defaults: GenerationDefaults,
        *,
        types: WeightTypes,
        device: str,
        compute: str,
        threads: int | None,
        kv_dtype: str,
        files: ModelFiles | None = None,
    ) -> None:
        """Everything but the weights: the arguments are checked before any of them is read."""
        if compute not in _COMPUTE:
            raise OptionError(f"compute must be one of {', '.join(_COMPUTE)}, got {compute!r}")
        if kv_dtype not in _KV_DTYPES:
            raise OptionError(f"kv_dtype must be one of {', '.join(_KV_DTYPES)}, got {kv_dtype!r}")
        if kv_dtype == "auto":
            kv_dtype = "bfloat16" if types[""][0] not in ("float32", "float16") and compute != "exact" else "float32"
        if not isinstance(device, str):
            raise OptionError(f"device must be a str, such as 'cpu' or 'cuda', got {shown(device)}")
        self.config = config
        self.tokenizer = tokenizer
        self.generation_defaults = defaults
        self._config_ends = config.eos_token_ids
        self._compute = compute
        self._kv_dtype = kv_dtype
        self._fingerprint = None
        self._adapters = {}
        self._active = None
        self._training_turn = threading.RLock()
        backend = _core.Backend(device, checked_threads(threads))
        packed = {} if files is None else files.packed(backend.matrix_layout, types)
        self._core = _core.Model(backend, loading.core_config(config), types, packed, compute=compute)

    def __reduce__(self) -> NoReturn:
        # What pickle and copy.deepcopy call, and expect.
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied. Give another process the path of the model, to load it there; "
            "threads may share one; save_pretrained and from_pretrained make a copy"
        )

    @contextlib.contextmanager
    def _trained_alone(self) -> Iterator[None]:
        """A block of code that changes weights, an adapter's or the model's. A callback of it may train, too.

        Raises:
            LlamaExtError: Another thread is in such a block: both would get a mixture.
        """
        if not self._training_turn.acquire(blocking=False):
            raise LlamaExtError(
                "this model is being trained by another call: one thread at a time may train it. Give each thread its own"
            )
        try:
            yield
        finally:
            self._training_turn.release()

    @property
    def dtype(self) -> str:
        """How matrices are kept: "float32", "bfloat16", "float16", or an encoding of whole numbers such as "int8" or "int4"."""
        return self._core.dtype

    @property
    def compute(self) -> str:
        """The arithmetic that was asked for: "auto" or "exact"."""
        return self._compute

    @property
    def kv_dtype(self) -> str:
        """How generations and sessions keep keys and values: "float32", "bfloat16" or "int8"."""
        return self._kv_dtype

    @property
    def device(self) -> str:
        """Where the weights are."""
        return self._core.backend.device

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return self._core.backend.threads

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._core.backend.isa

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return self._core.nbytes

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text: the tokenizer's, else the config's unless it is no special token of the tokenizer."""
        return begin_token(self.config.bos_token_id, self.tokenizer)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a generation: those of generation_config.json, else the config's; see `tokenizer` above."""
        return tuple(self.generation_defaults.eos_token_id or self._config_ends)

    def num_parameters(self) -> int:
        """How many numbers the weights are; a tied output head counts once.

        Returns:
            The count.
        """
        return sum(math.prod(shape) for _, shape, _ in self._core.slots())

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes a checkpoint that this package and transformers read: weights, config and tokenizer.

        Weights are written one by one, in the dtype they are kept in. Quantised ones are written as they lie in memory, for
        this package alone: loading them maps the file and does nothing else. A save that is cut short leaves what was there
        before, or the new model, or a directory without config.json, which does not load: save again.

        Adapters are no part of it.

        Args:
            directory: Created if it does not exist; files of the same names are replaced.

        Raises:
            OSError: It cannot be written.
            OptionError: The config's `extra` holds something that JSON cannot; or an adapter is active: the files would not give what the model gives.
            UnsupportedError: Quantised weights on a device that does not pack them.
        """
        self._refuse_active("save_pretrained writes the base alone", "save_adapter writes the adapter")
        saving.save_model(self, directory)
