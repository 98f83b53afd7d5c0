"""An adapter as the loop sees it, and a trainer made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llama_ext import _core
from llama_ext._arrays import FloatArray
from llama_ext.io.peft import AdapterFiles
from llama_ext.models.llama import EMBEDDING, tensor_specs
from llama_ext.runtime import saving
from llama_ext.runtime.classifier import LlamaForSequenceClassification
from llama_ext.runtime.loaded_model import LoadedModel
from llama_ext.runtime.session_file import weights_hash
from llama_ext.training.model import fill
from llama_ext.training.options import TrainOptions

__all__ = ["TunedWeights", "tuning_trainer"]

# Of the hash of a base's weights: enough to tell any two apart, and an error shows all of them.
_DIGITS = 32


class TunedWeights:
    """An adapter, and the slots of the model's own weights that are trained, as the loop sees them.

    Args:
        model: Its core is trained.
        adapter: The name of the adapter, or None.
    """

    def __init__(self, model: LoadedModel, adapter: str | None) -> None:
        self._model = model
        self._adapter = adapter

    def read(self, slot: str) -> FloatArray:
        matrix = self._matrix(slot)
        if matrix is not None:
            return matrix[0].read(*matrix[1:])
        return np.asarray(self._model._core.read(slot), dtype=np.float32)

    def write(self, slot: str, array: FloatArray) -> None:
        values = np.ascontiguousarray(array)
        matrix = self._matrix(slot)
        if matrix is not None:
            matrix[0].write(*matrix[1:], values)
        else:
            self._model._core.load(slot, values, "float32")

    def save(self, folder: Path) -> None:
        if self._adapter is None:
            saving.save_model(self._model, folder)
            return
        if isinstance(self._model, LlamaForSequenceClassification):
            self._model._keep_trained_head()
        self._model.save_adapter(folder, self._adapter)

    def load(self, folder: Path) -> None:
        if self._adapter is None:
            fill(self._model._core, folder)
            return
        core = self._model._loaded(self._adapter).core
        with AdapterFiles(folder, self._model.config) as files:
            for slot in files.slots:
                for which in ("A", "B"):
                    core.write(slot, which, files.read(slot, which))
            head = files.read_head()
        if head is not None:
            self._model._core.load("head", head, "float32")

    def describe(self) -> dict[str, Any]:
        config = self._model.config.to_dict()
        for name in ("dtype", "torch_dtype"):
            config.pop(name, None)
        if self._adapter is None:
            return {"config": config, "adapter": None}
        loaded = self._model._loaded(self._adapter)
        trained = ("head",) if isinstance(self._model, LlamaForSequenceClassification) else ()
        # A checkpoint of an adapter has none of the base's weights: with others it would go on as another run, unnoticed.
        base = weights_hash(self._model._core, without=trained)[:_DIGITS]
        slots = [list(slot) for slot in loaded.core.slots()]
        return {"config": config, "adapter": {"slots": slots, "dropout": loaded.lora.dropout}, "base_weights": base}

    def flops_per_token(self, context: int) -> float | None:
        """6 for each weight of a product, 4 where it is frozen and has no gradient of its own; attention as if unmasked."""
        config = self._model.config
        products = sum(
            spec.shape[0] * spec.shape[1]
            for spec in tensor_specs(config)
            if len(spec.shape) == 2 and spec.name != EMBEDDING and spec.slot != "head"
        )
        attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
        return (4.0 if self._adapter is not None else 6.0) * products + 12.0 * attention

    def _matrix(self, slot: str) -> tuple[_core.Adapter, str, str] | None:
        """The adapter's matrix of a trainer's parameter "layers.0.q.lora_A"; None: it is the model's own."""
        base, _, which = slot.rpartition(".lora_")
        if not base or self._adapter is None:
            return None
        return self._model._loaded(self._adapter).core, base, which


def tuning_trainer(model: LoadedModel, options: TrainOptions, adapter: str | None) -> _core.Trainer:
    """A trainer of all weights, or of an adapter and a classifier's head."""
    extra: dict[str, Any] = {}
    if adapter is not None:
        loaded = model._loaded(adapter)
        extra["adapter"] = loaded.core
        extra["adapter_dropout"] = loaded.lora.dropout
        extra["trainable"] = ["head"] if model.config.is_classifier else []
    return _core.Trainer(
        model._core,
        optimizer=options.core_optimizer(),
        compute=options.precision,
        checkpoint_activations=options.checkpoint_activations,
        dropout=options.dropout,
        attention_dropout=options.attention_dropout,
        **extra,
    )
