"""A task's `fit`: the loop of `llama_ext.training`, over all weights or over the adapter that the task trains."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_ext import _core
from llama_ext._options import shown
from llama_ext.errors import OptionError
from llama_ext.models.lora import LoRA
from llama_ext.runtime.classifier import LlamaForSequenceClassification
from llama_ext.runtime.loaded_model import LoadedModel

if TYPE_CHECKING:
    from llama_ext.training.batches import Example, Source
    from llama_ext.training.history import History
    from llama_ext.training.options import TrainOptions
    from llama_ext.training.settings import RunSettings

__all__ = ["fit_task"]

# How often a task sees its data, where nothing is said.
_EPOCHS = 3


def fit_task(
    model: LoadedModel,
    name: str,
    adapter: LoRA | None,
    examples: Sequence[Example],
    validation: Sequence[Example] | None,
    *,
    epochs: int | None,
    lr: float | None,
    batch_size: int,
    seed: int,
    options: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> History:
    """Trains all weights, which become float32 first; or an adapter, and a classifier's head with it, and nothing else.

    What is refused changes nothing: neither weights, nor which adapters there are, nor which one is active.

    Args:
        model: The model.
        name: Of the adapter.
        adapter: What to adapt, where there is no adapter of this name yet; None: go on with the one there is, or else train
            all weights.
        examples: Sequences and their labels.
        validation: To be scored after each epoch, or None.
        epochs: None: 3, unless `settings` has max_steps.
        lr: None: `usual_lr`.
        batch_size, seed: Of `LlamaForCausalLM.fit`.
        options: Further ones of `LlamaForCausalLM.compile`.
        settings: Further ones of `LlamaForCausalLM.fit`: max_steps, grad_accum, checkpoint_dir, ...

    Returns:
        What happened.

    Raises:
        OptionError: An option is unknown, out of range or contradicts another one; there is another adapter of this name; or all
            weights are to be trained, and there are adapters that were made for them; or there is nothing to validate with.
        UnsupportedError: All weights are to be trained, and they are quantised.
        NumericError: The loss is not finite.
        CheckpointError: A checkpoint to go on from is of another run.
    """
    if epochs is None and settings.get("max_steps") is None:
        epochs = _EPOCHS
    _check_options(options, lr)
    given = {"warmup": 0.1, "weight_decay": 0.01, **({} if lr is None else {"lr": lr}), **(options or {})}
    run = {"epochs": epochs, "batch_size": batch_size, "seed": seed, **settings}
    there = model.adapters.get(name)
    _check_adapters(model, name, adapter, there)
    if adapter is None and there is None:
        return _fit_whole(model, examples, validation, given, run)
    return _fit_adapter(model, name, adapter, examples, validation, given, run)


def _check_options(options: object, lr: float | None) -> None:
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(
            f"options must be a mapping of options of compile, as {{'dropout': 0.1}}, got {shown(options)}"
        )
    if lr is not None and options is not None and "lr" in options:
        raise OptionError(
            f"lr={shown(lr)} and options={{'lr': {shown(options['lr'])}}} both say the learning rate: give one of them"
        )


def _check_adapters(model: LoadedModel, name: str, adapter: LoRA | None, there: LoRA | None) -> None:
    if adapter is not None and not isinstance(adapter, LoRA):
        raise OptionError(f"adapter must be a llama_ext.LoRA or None, got {type(adapter).__name__}")
    if adapter is not None and there is not None and there != adapter:
        raise OptionError(
            f"there is an adapter {name!r} with other settings already: leave adapter out to go on with it, or forget it first "
            f"with model.delete_adapter({name!r})"
        )
    if adapter is None and there is None and model.adapters:
        other = next(iter(model.adapters))
        raise OptionError(
            f"training all weights changes what the adapter {other!r} was made for: pass adapter=llama_ext.LoRA(...) to train one "
            f"beside it, or forget it first with model.delete_adapter({other!r})"
        )


def _fit_whole(
    model: LoadedModel,
    examples: Sequence[Example],
    validation: Sequence[Example] | None,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> History:
    from llama_ext.training.loop import Run
    from llama_ext.training.model import made_trainable
    from llama_ext.training.tuning import TunedWeights, tuning_trainer

    checked, run = _checked(model, options, settings, validates=validation is not None, adapts=False)
    source, held_out = _sources(examples, validation)
    with model._trained_alone(), contextlib.ExitStack() as undo:
        made_trainable(model, undo)
        trainer = tuning_trainer(model, checked, None)
        return Run(trainer, TunedWeights(model, None), checked, run, source, held_out).go(undo.pop_all)


def _fit_adapter(
    model: LoadedModel,
    name: str,
    lora: LoRA | None,
    examples: Sequence[Example],
    validation: Sequence[Example] | None,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> History:
    from llama_ext.training.loop import Run
    from llama_ext.training.tuning import TunedWeights, tuning_trainer

    checked, run = _checked(model, options, settings, validates=validation is not None, adapts=True)
    source, held_out = _sources(examples, validation)
    with model._trained_alone():
        was_active, is_new = model.active_adapter, name not in model.adapters
        trainer: _core.Trainer | None = None
        try:
            with contextlib.ExitStack() as stack:
                if is_new and lora is not None:
                    model.add_adapter(name, lora, seed=run.seed)
                model.set_adapter(name)
                if isinstance(model, LlamaForSequenceClassification):
                    stack.enter_context(model._training_head_of(name))
                trainer = tuning_trainer(model, checked, name)
                return Run(trainer, TunedWeights(model, name), checked, run, source, held_out).go()
        except BaseException:
            if trainer is None or trainer.steps == 0:
                # Refused by the run itself, for its checkpoints for example: nothing was learned.
                if is_new and name in model.adapters:
                    model.delete_adapter(name)
                model.set_adapter(was_active)
            raise


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
            raise OptionError(f"{what} has no {shown(unknown)}, only {', '.join(sorted(known))}")
    run = RunSettings(**settings)
    run.check(validates=validates)
    return TrainOptions(**{"lr": usual_lr(model.config.hidden_size, adapts=adapts), **options}), run


def _sources(examples: Sequence[Example], validation: Sequence[Example] | None) -> tuple[Source, Source | None]:
    from llama_ext.training.batches import Examples

    if validation is not None and not validation:
        raise OptionError("validation_data is empty: give something to score, or None")
    source = Examples([(example,) for example in examples])
    return source, None if validation is None else Examples([(example,) for example in validation])
