"""An adapter as the loop sees it, and a trainer made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_ext import _core
from llama_ext.errors import CheckpointError
from llama_ext.io.peft import AdapterFiles
from llama_ext.runtime import saving
from llama_ext.runtime.classifier import LlamaForSequenceClassification
from llama_ext.runtime.loaded_model import LoadedModel
from llama_ext.runtime.session_file import weights_hash
from llama_ext.training.model import fill, flops_per_token
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
            different = sorted({slot for slot, *_ in core.slots()} ^ set(files.slots))
            if different or files.has_head != self._model.config.is_classifier:
                raise CheckpointError(
                    f"the checkpoint's tensors are not this adapter's: {', '.join(different[:4]) or 'the head'}.",
                    path=str(folder),
                )
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

    def flops_per_token(self, context: int) -> float:
        return flops_per_token(self._model.config, context, adapts=self._adapter is not None)


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
