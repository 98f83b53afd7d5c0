"""The adapters of a model: added, loaded, chosen, saved, merged. What the files are is in `llama_ext.io.peft`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from llama_ext import _core
from llama_ext._arrays import FloatArray, widen_bfloat16
from llama_ext._options import shown, whole_seed
from llama_ext.errors import NumericError, OptionError, UnsupportedError
from llama_ext.io.peft import AdapterFiles, write_adapter
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models.config import LlamaConfig
from llama_ext.models.lora import LoRA
from llama_ext.runtime.weight_types import is_quantized

__all__ = ["Adapted", "AdapterChoice", "LoadedAdapter"]

# Which adapter each sequence of a call gets: a name for all, or a name or None (the base) for each. None: the active one.
AdapterChoice = str | Sequence[str | None] | None

_MOST_CHARACTERS = 200

# A name for annotations in the class, where `_core` is an attribute.
CoreAdapter = _core.Adapter


class LoadedAdapter(NamedTuple):
    """An adapter in memory.

    Attributes:
        lora: What it adapts.
        core: Its matrices.
        head: A classifier's head (labels, C) that was trained with it, or None: the base's.
    """

    lora: LoRA
    core: _core.Adapter
    head: FloatArray | None = None


class Adapted:
    """The part of a model that knows its adapters. They are small beside the weights, which they leave as they are."""

    config: LlamaConfig
    _core: _core.Model
    _adapters: dict[str, LoadedAdapter]
    _active: str | None
    _fingerprint: str | None  # of the weights, once a session is saved or loaded

    @property
    def adapters(self) -> Mapping[str, LoRA]:
        """The adapters that are loaded, by name."""
        return MappingProxyType({name: adapter.lora for name, adapter in self._adapters.items()})

    @property
    def active_adapter(self) -> str | None:
        """The adapter that is used where a call names none; None: the base alone."""
        return self._active

    def add_adapter(self, name: str, adapter: LoRA, *, seed: int = 0) -> None:
        """Adds an adapter to be trained, and makes it the active one. It changes nothing yet: A is random, B is zero.

        Args:
            name: Its name here.
            adapter: What it adapts.
            seed: Of A, in [0, 2^64): uniform in +-1 / sqrt(columns), as PEFT initialises it.

        Raises:
            OptionError: The name is taken or no name, the model has no such matrices, or the seed is out of range.
            UnsupportedError: It wants to adapt the embedding or the head.
            OutOfMemoryError: It does not fit into memory.
        """
        self._check_new(name)
        if not isinstance(adapter, LoRA):
            raise OptionError(f"adapter must be a llama_ext.LoRA, got {type(adapter).__name__}")
        number = whole_seed(seed)
        core = self._new_adapter(adapter.resolve(self.config))
        for index, (slot, rank, _) in enumerate(core.slots()):
            columns = core.read(slot, "A").shape[1]
            # Kaiming's uniform with a = sqrt(5): a bound of sqrt(6 / (1 + 5) / columns). A stream of its own for each matrix.
            rng = np.random.Generator(np.random.Philox(key=number, counter=[0, 0, index, 0]))
            values = rng.random((rank, columns), dtype=np.float32)
            core.write(slot, "A", (2 * values - 1) * np.float32(1 / math.sqrt(columns)))
        self._adapters[name] = LoadedAdapter(adapter, core)
        self.set_adapter(name)

    def load_adapter(
        self, directory: str | os.PathLike[str], name: str = "default", *, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        """Loads an adapter that PEFT or `save_adapter` wrote, and makes it the active one.

        Args:
            directory: With adapter_config.json and adapter_model.safetensors.
            name: Its name here.
            limits: What a file may ask for.

        Raises:
            OptionError: The name is taken or no name.
            FormatError: A file is missing, truncated or malformed.
            CheckpointError: A tensor is missing, unexpected, of another shape, or not finite.
            UnsupportedError: It does something else than LoRA on the layers' projections: DoRA, biases, ...
            LimitError: A number in a file is beyond `limits`.
            OutOfMemoryError: It does not fit into memory.
        """
        self._check_new(name)
        with AdapterFiles(directory, self.config, limits=limits) as files:
            core = self._new_adapter(files.slots)
            for slot in files.slots:
                for which in ("A", "B"):
                    core.write(slot, which, files.read(slot, which))
            self._adapters[name] = LoadedAdapter(files.lora, core, files.read_head())
        self.set_adapter(name)

    def set_adapter(self, name: str | None) -> None:
        """Chooses the adapter that is used where a call names none.

        Args:
            name: Of a loaded adapter; None: the base alone.

        Raises:
            OptionError: There is no such adapter.
        """
        if name is not None:
            self._loaded(name)
        self._active = name

    def save_adapter(
        self, directory: str | os.PathLike[str], name: str | None = None, *, base: str | os.PathLike[str] | None = None
    ) -> None:
        """Writes an adapter as PEFT does: adapter_config.json and adapter_model.safetensors, in float32.

        Args:
            directory: Created if it does not exist.
            name: Of a loaded adapter; None: the active one.
            base: The path or Hub id of the base, to be named in the config; PEFT's loaders look there.

        Raises:
            OptionError: There is no such adapter.
            OSError: It cannot be written.
        """
        adapter = self._loaded(self._named_or_active(name))
        named = None if base is None else os.fspath(base)
        write_adapter(directory, adapter.lora, self.config, adapter.core.read, head=adapter.head, base=named)

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter; where it was active, the base alone is.

        Args:
            name: Of a loaded adapter.

        Raises:
            OptionError: There is no such adapter.
        """
        self._loaded(name)
        del self._adapters[name]
        if self._active == name:
            self.set_adapter(None)

    def merge_adapter(self, name: str | None = None) -> None:
        """Adds an adapter to the weights, W + scale B A, and forgets it: what is saved and exported then has it.

        The sum is computed in float32 and rounded once to what the weights are kept as; float32 ones give what the adapter gave
        to about 1e-6. Sessions that are open keep the old weights.

        Args:
            name: Of a loaded adapter; None: the active one.

        Raises:
            OptionError: There is no such adapter, or others are loaded, which were made for the weights as they are.
            UnsupportedError: The weights are quantised: rounding the sum would lose a part of the adapter. Load the base with
                dtype="float32" or "bfloat16", merge, and quantise the result.
            NumericError: A sum is beyond the range of the weights' dtype.
            OutOfMemoryError: The new weights do not fit into memory beside the old ones.
        """
        name = self._named_or_active(name)
        adapter = self._loaded(name)
        others = [other for other in self._adapters if other != name]
        if others:
            raise OptionError(
                f"merge_adapter({name!r}): the adapter {others[0]!r} was made for the weights as they are: delete_adapter it first"
            )
        types = self._core.types()
        if is_quantized(types):
            raise UnsupportedError(
                f"an adapter is not merged into {self._core.dtype} weights, which would round a part of it away. Load the base "
                "with dtype='float32' or 'bfloat16', merge, save, and quantise the result"
            )
        core = self._core.converted(types, self._core.separate_gate_up)
        for slot, _, scale in adapter.core.slots():
            dtype = types.get(slot, types[""])[0]
            a, b = adapter.core.read(slot, "A"), adapter.core.read(slot, "B")
            stored = core.read(slot)
            weights = widen_bfloat16(stored) if dtype == "bfloat16" else stored.astype(np.float32)
            # The scale as the last factor, in float64 and rounded once: as the adapter's own product has it.
            weights += (b.astype(np.float64) @ a.astype(np.float64) * scale).astype(np.float32)
            _load(core, slot, weights, dtype)
        if adapter.head is not None:
            _load(core, "head", adapter.head, types.get("head", types[""])[0])
        self._core = core
        self.delete_adapter(name)
        self._fingerprint = None

    # -- for the rest of the package -----------------------------------------------------------------------------------

    def _loaded(self, name: object) -> LoadedAdapter:
        found = self._adapters.get(name) if isinstance(name, str) else None
        if found is None:
            known = ", ".join(map(repr, self._adapters)) or "none is loaded"
            raise OptionError(f"there is no adapter {name!r}; known: {known}")
        return found

    def _named_or_active(self, name: str | None) -> str:
        if name is None:
            name = self._active
        if name is None:
            raise OptionError("no adapter is active: name one")
        return name

    def _chosen(self, choice: AdapterChoice, sequences: int) -> list[LoadedAdapter | None]:
        """The adapter of each of so many sequences.

        Raises:
            OptionError: There is no such adapter, or not one for each sequence.
        """
        if choice is None:
            choice = self._active
        if choice is None or isinstance(choice, str):
            return [None if choice is None else self._loaded(choice)] * sequences
        if not isinstance(choice, Sequence):
            raise OptionError(f"adapter must be a name or a list of names, got {type(choice).__name__}")
        if len(choice) != sequences:
            raise OptionError(f"adapter names {len(choice)} adapters for {sequences} sequences: give one for each")
        return [None if name is None else self._loaded(name) for name in choice]

    def _core_adapters(self, choice: AdapterChoice, sequences: int) -> list[CoreAdapter | None]:
        """As `_chosen`, for the core; empty when no sequence has one."""
        chosen = self._chosen(choice, sequences)
        return [None if each is None else each.core for each in chosen] if any(chosen) else []

    def _refuse_active(self, what: str, advice: str) -> None:
        """Raises OptionError while an adapter is active, which would be left out."""
        if self._active is not None:
            raise OptionError(
                f"{what}, and the adapter {self._active!r} is active. {advice}; merge_adapter makes it a part of the weights; "
                "set_adapter(None) chooses the base"
            )

    def _refuse_adapters(self, what: str) -> None:
        """Raises OptionError while adapters are loaded: they were made for the weights as they are."""
        for name in self._adapters:
            raise OptionError(
                f"{what} changes what the adapter {name!r} was made for: set_adapter it to train it instead, or delete_adapter it"
            )

    def _check_new(self, name: object) -> None:
        if not isinstance(name, str) or not name or len(name) > _MOST_CHARACTERS:
            raise OptionError(
                f"an adapter's name must be a text of 1 to {_MOST_CHARACTERS} characters, got {shown(name)}"
            )
        if name in self._adapters:
            raise OptionError(f"there is an adapter {name!r} already: delete_adapter it first, or take another name")

    def _new_adapter(self, targets: Mapping[str, tuple[int, float]]) -> CoreAdapter:
        """Zeros; the model gets gate and up as separate matrices, as adapters and training need them."""
        adapter = _core.Adapter(self._core, targets)
        if not self._core.separate_gate_up:
            self._core = self._core.converted(self._core.types(), True)
        return adapter


def _load(core: _core.Model, slot: str, values: FloatArray, dtype: str) -> None:
    """Sets a matrix, rounded to what it is kept as."""
    largest = float(np.finfo(np.float16).max) if dtype == "float16" else float(np.finfo(np.float32).max)
    if not np.abs(values).max(initial=0.0) <= largest:
        raise NumericError(
            f"with the adapter, a weight of {slot} is beyond the range of {dtype}: load the base as float32"
        )
    core.load(slot, values, "float32")
