"""One run of training for a task: the loop of `llama_ext.training`, over the weights and adapter that the task trains."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_ext import _core
from llama_ext.errors import OptionError
from llama_ext.models.lora import LoRA
from llama_ext.runtime.classifier import LlamaForSequenceClassification
from llama_ext.runtime.loaded_model import LoadedModel

if TYPE_CHECKING:
    from llama_ext.training.batches import Example
    from llama_ext.training.history import History
    from llama_ext.training.options import TrainOptions
    from llama_ext.training.settings import RunSettings

__all__ = ["fit_adapter", "fit_whole"]


def fit_whole(
    model: LoadedModel,
    examples: Sequence[Example],
    validation: Sequence[Example] | None,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> History:
    """Trains all weights, which become float32 first. Arguments and errors: as `fit_adapter`."""
    from llama_ext.training.model import use_trainable_core
    from llama_ext.training.tuning import tuning_trainer

    checked, run = _checked(model, options, settings, validates=validation is not None, adapts=False)
    with model._trained_alone():
        model._refuse_adapters("training all weights")
        use_trainable_core(model)
        trainer = tuning_trainer(model, checked, None)
        return _run(model, trainer, None, examples, validation, checked, run)


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
        options: Of `LlamaForCausalLM.compile`; without lr it is `usual_lr`.
        settings: Of `LlamaForCausalLM.fit`: batch_size, epochs, max_steps, grad_accum, seed, checkpoint_dir, ...

    Returns:
        What happened.

    Raises:
        OptionError: An option is unknown or out of range.
        NumericError: The loss is not finite.
        CheckpointError: A checkpoint to go on from is of another run.
    """
    from llama_ext.training.tuning import tuning_trainer

    checked, run = _checked(model, options, settings, validates=validation is not None, adapts=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(model._trained_alone())
        if name not in model.adapters:
            if lora is None:
                raise OptionError(f"there is no adapter {name!r} yet: pass adapter=llama_ext.LoRA(...)")
            model.add_adapter(name, lora, seed=run.seed)
        model.set_adapter(name)
        if isinstance(model, LlamaForSequenceClassification):
            stack.enter_context(model._training_head_of(name))
        return _run(model, tuning_trainer(model, checked, name), name, examples, validation, checked, run)


def _checked(
    model: LoadedModel, options: Mapping[str, Any], settings: Mapping[str, Any], *, validates: bool, adapts: bool
) -> tuple[TrainOptions, RunSettings]:
    """All arguments, before anything of the model is changed."""
    from llama_ext.training.options import TrainOptions
    from llama_ext.training.schedules import usual_lr
    from llama_ext.training.settings import RunSettings

    for kind, given, what in ((TrainOptions, options, "options: compile"), (RunSettings, settings, "fit of a task")):
        known = {field.name for field in dataclasses.fields(kind)}
        unknown = next((name for name in given if name not in known), None)
        if unknown is not None:
            raise OptionError(f"{what} has no {unknown!r}, only {', '.join(sorted(known))}")
    run = RunSettings(**settings)
    run.check(validates=validates)
    return TrainOptions(**{"lr": usual_lr(model.config.hidden_size, adapts=adapts), **options}), run


def _run(
    model: LoadedModel,
    trainer: _core.Trainer,
    adapter: str | None,
    examples: Sequence[Example],
    validation: Sequence[Example] | None,
    options: TrainOptions,
    settings: RunSettings,
) -> History:
    from llama_ext.training.batches import Examples
    from llama_ext.training.loop import Run
    from llama_ext.training.tuning import TunedWeights

    source = Examples([(example,) for example in examples])
    held_out = None if validation is None else Examples([(example,) for example in validation])
    weights = TunedWeights(model, adapter)
    return Run(trainer, weights, options, settings, source, held_out).go()
