"""One run of training for a task: the loop of `llama_ext.training`, over the weights and adapter that the task trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ext import _core
from llama_ext._arrays import FloatArray
from llama_ext.errors import OptionError
from llama_ext.io.peft import AdapterFiles
from llama_ext.models.llama import EMBEDDING, tensor_specs
from llama_ext.models.lora import LoRA
from llama_ext.runtime.loaded_model import LoadedModel

if TYPE_CHECKING:
    from llama_ext.training.batches import Example
    from llama_ext.training.history import History
    from llama_ext.training.options import TrainOptions

__all__ = ["fit_adapter", "fit_whole", "new_trainer"]


class TaskWeights:
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
            from llama_ext.runtime.saving import save_model

            save_model(self._model, folder)
            return
        remember_head(self._model, self._adapter)
        self._model.save_adapter(folder, self._adapter)

    def load(self, folder: Path) -> None:
        if self._adapter is None:
            from llama_ext.runtime.loading import open_model

            with open_model(folder) as files:
                files.load_into(self._model._core)
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
        slots = None if self._adapter is None else self._model._loaded(self._adapter).core.slots()
        return {"config": config, "adapter": None if slots is None else [list(slot) for slot in slots]}

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


def remember_head(model: LoadedModel, adapter: str) -> None:
    """Keeps the head as it is now with an adapter that was trained together with it."""
    if model.config.is_classifier:
        head = np.array(model._core.read("head"), dtype=np.float32)
        model._adapters[adapter] = model._adapters[adapter]._replace(head=head)


def fit_whole(
    model: LoadedModel,
    examples: Sequence[Example],
    validation: Sequence[Example] | None,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> History:
    """Trains all weights, which become float32 first. Arguments and errors: as `fit_adapter`."""
    from llama_ext.training.model import trainable_copy
    from llama_ext.training.options import TrainOptions

    checked = TrainOptions(**options)
    core = model._core
    if core.dtype != "float32" or not core.separate_gate_up:
        model._core = trainable_copy(core)
    model._fingerprint = None
    trainer = new_trainer(model, checked, None)
    return _run(model, trainer, None, examples, validation, checked, settings)


def fit_adapter(
    model: LoadedModel,
    name: str,
    lora: LoRA | None,
    examples: Sequence[Example],
    validation: Sequence[Example] | None,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> History:
    """Trains an adapter of a model, and a classifier's head with it; everything else stays as it is.

    Args:
        model: The model.
        name: Of the adapter.
        lora: What to adapt, where there is no adapter of this name yet.
        examples: Sequences and their labels.
        validation: To be scored after each epoch, or None.
        options: Of `LlamaForCausalLM.compile`.
        settings: Of `LlamaForCausalLM.fit`: batch_size, epochs, max_steps, grad_accum, seed, checkpoint_dir, ...

    Returns:
        What happened.

    Raises:
        OptionError: An option is unknown or out of range.
        NumericError: The loss is not finite.
        CheckpointError: A checkpoint to go on from is of another run.
    """
    from llama_ext.training.options import TrainOptions

    checked = TrainOptions(**options)
    if name not in model.adapters:
        if lora is None:
            raise OptionError(f"there is no adapter {name!r} yet: pass adapter=llama_ext.LoRA(...)")
        model.add_adapter(name, lora, seed=int(settings.get("seed", 0)))
    model.set_adapter(name)
    trainer = new_trainer(model, checked, name)
    try:
        return _run(model, trainer, name, examples, validation, checked, settings)
    finally:
        remember_head(model, name)


def new_trainer(model: LoadedModel, options: TrainOptions, adapter: str | None) -> _core.Trainer:
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


def _run(
    model: LoadedModel,
    trainer: _core.Trainer,
    adapter: str | None,
    examples: Sequence[Example],
    validation: Sequence[Example] | None,
    options: TrainOptions,
    settings: Mapping[str, Any],
) -> History:
    from llama_ext.training.batches import Examples
    from llama_ext.training.loop import Run, RunSettings

    source = Examples([(example,) for example in examples])
    held_out = None if validation is None else Examples([(example,) for example in validation])
    weights = TaskWeights(model, adapter)
    return Run(trainer, weights, options, RunSettings(**settings), source, held_out).go()
