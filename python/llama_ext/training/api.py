"""The bodies of `compile`, `fit`, `evaluate`, `train_step`, `loss_and_gradients` and `lr_find`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ext import _core
from llama_ext._arrays import FloatArray, IntArray
from llama_ext._options import number, shown, whole
from llama_ext._plots import new_figure
from llama_ext.errors import ContextLengthError, NumericError, OptionError
from llama_ext.runtime.logits import id_block
from llama_ext.training.batches import IGNORED, Batch, Row, Source, collate
from llama_ext.training.data import Reading, block_examples, is_pair, read_data
from llama_ext.training.history import Evaluation, History, perplexity_of, smoothed
from llama_ext.training.loop import Run, StepResult, accumulate, clip_scale
from llama_ext.training.model import (
    ModelWeights,
    made_trainable,
    new_trainer,
    parameter_names,
    trainable_copy,
    use_trainable_core,
)
from llama_ext.training.options import TrainOptions
from llama_ext.training.settings import RunSettings
from llama_ext.training.tuning import TunedWeights, tuning_trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = [
    "LearningRates",
    "Training",
    "compile_model",
    "evaluate",
    "fit",
    "loss_and_gradients",
    "lr_find",
    "train_step",
]

# Logits that are in memory at once, in bytes.
_LOGITS = 64 << 20
# Of the losses that `lr_find` saw: few steps, each with another rate.
_SMOOTHING = 0.8
# A loss so many times the best one ends `lr_find`.
_DIVERGED = 4.0


@dataclass
class Training:
    """What a model knows of its training: the options, and the optimiser of `train_step`."""

    options: TrainOptions
    trainer: _core.Trainer | None = None
    # Of the trainer.
    core: _core.Model | None = None
    adapter: _core.Adapter | None = None


def compile_model(model: LlamaForCausalLM, **options: Any) -> None:
    """The body of `compile`."""
    model._training = Training(TrainOptions(**options))


def _training(model: LlamaForCausalLM) -> Training:
    if model._training is None:
        model._training = Training(TrainOptions())
    return model._training


def _reading(model: LlamaForCausalLM, context: int | None, *, pack: bool = False, shuffle: bool = True) -> Reading:
    most = model.config.max_position_embeddings
    for name, value in (("pack", pack), ("shuffle", shuffle)):
        if not isinstance(value, bool):
            raise OptionError(f"{name} must be True or False, got {shown(value)}")
    length = most if context is None else whole("context", context, 1)
    if length > most:
        raise ContextLengthError(f"context is {length}, the model's context is {most}")
    return Reading(model.tokenizer, model.bos_token_id, model.config.vocab_size, length, pack, shuffle)


def fit(
    model: LlamaForCausalLM,
    x: object,
    y: object,
    *,
    validation_data: object,
    context: int | None,
    pack: bool,
    shuffle: bool,
    **settings: Any,
) -> History:
    """The body of `fit`."""
    options = _training(model).options
    checked = RunSettings(**settings)
    reading = _reading(model, context, pack=pack, shuffle=shuffle)
    source = read_data(x, y, reading)
    validation = None
    if validation_data is not None:
        held_out, answers = validation_data, None
        if isinstance(validation_data, tuple) and len(validation_data) == 2:
            if all(is_pair(each) for each in validation_data):
                raise OptionError(
                    "validation_data: two pairs in a tuple could be prompts and answers as well: give a list of pairs"
                )
            held_out, answers = validation_data
        named = dataclasses.replace(reading, pack=False, x="validation_data", y="the labels of validation_data")
        validation = read_data(held_out, answers, named)
    # Before the weights become float32.
    checked.check(validates=validation is not None)
    with model._trained_alone(), contextlib.ExitStack() as undo:
        # Moments of `train_step` would be those of other weights, and their memory is wanted.
        model._training = Training(options)
        name = model.active_adapter
        if name is not None:
            trainer, weights = tuning_trainer(model, options, name), TunedWeights(model, name)
            return Run(trainer, weights, options, checked, source, validation).go()
        model._refuse_adapters("training all weights")
        trainer = new_trainer(made_trainable(model, undo), options)
        return Run(trainer, ModelWeights(model), options, checked, source, validation).go(undo.pop_all)


def evaluate(model: LlamaForCausalLM, x: object, y: object, *, batch_size: int, context: int | None) -> Evaluation:
    """The body of `LlamaForCausalLM.evaluate`: the model as it is for inference, whatever its weights."""
    batch_size = whole("batch_size", batch_size, 1)
    source = read_data(x, y, _reading(model, context))
    losses: list[float] = []
    counted = correct = 0
    for batch, sequences in _groups(source, batch_size, _LOGITS // (4 * model.config.vocab_size)):
        for logits, labels in zip(_logits(model, sequences), np.split(*_cuts(batch)), strict=True):
            keep = np.flatnonzero(labels != IGNORED)
            kept = np.ascontiguousarray(logits[keep])
            wanted = np.ascontiguousarray(labels[keep])
            loss = np.empty(keep.size, dtype=np.float32)
            model._core.backend.cross_entropy(kept, wanted, loss)
            losses.append(math.fsum(loss.tolist()))
            counted += int(keep.size)
            correct += int(np.count_nonzero(kept.argmax(axis=1) == wanted))
    mean = math.fsum(losses) / counted
    if not math.isfinite(mean):
        raise NumericError(f"the loss is {mean}: a logit or a weight is not finite")
    return Evaluation(mean, correct / counted, perplexity_of(mean), counted)


def _logits(model: LlamaForCausalLM, sequences: list[IntArray]) -> list[FloatArray]:
    return model._core.logits(sequences, model._core_adapters(None, len(sequences)))


def _groups(source: Source, batch_size: int, tokens: int) -> Any:
    """Batches of at most `batch_size` rows and about so many tokens, with their sequences."""
    rows: list[Row] = []
    size = 0
    for row in source.all_rows():
        length = sum(sequence.tokens.size for sequence in row)
        if rows and (len(rows) == batch_size or size + length > tokens):
            yield collate(rows), [sequence.tokens for each in rows for sequence in each]
            rows, size = [], 0
        rows.append(row)
        size += length
    if rows:
        yield collate(rows), [sequence.tokens for each in rows for sequence in each]


def _cuts(batch: Batch) -> tuple[Any, Any]:
    return batch.labels, np.cumsum(batch.lengths)[:-1]


def _block(model: LlamaForCausalLM, input_ids: object, labels: object) -> Batch:
    ids = id_block(input_ids)
    targets = ids if labels is None else id_block(labels)
    examples = block_examples(ids, targets, _reading(model, None))
    if not examples:
        raise OptionError("there is nothing to learn: no label counts, and the first of each row predicts nothing")
    return collate([(example,) for example in examples])


def train_step(model: LlamaForCausalLM, input_ids: object, labels: object) -> StepResult:
    """The body of `train_step`."""
    with model._trained_alone():
        return _step(model, input_ids, labels)


def _step(model: LlamaForCausalLM, input_ids: object, labels: object) -> StepResult:
    training = _training(model)
    options = training.options
    batch = _block(model, input_ids, labels)
    name = model.active_adapter
    adapter = None if name is None else model._loaded(name).core
    if name is None:
        model._refuse_adapters("train_step of all weights")
    core = use_trainable_core(model) if name is None else model._core
    if training.trainer is None or training.core is not core or training.adapter is not adapter:
        training.trainer = tuning_trainer(model, options, name)
        training.core, training.adapter = core, adapter
    trainer = training.trainer
    try:
        result = accumulate(trainer, [batch], 0, trainer.steps)
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            raise NumericError(
                f"the loss is {result.loss} and the norm of the gradients {result.grad_norm}. Nothing was changed by this step"
            )
        warmup = options.warmup if isinstance(options.warmup, int) else 0
        lr = options.lr * min(1.0, (trainer.steps + 1) / warmup) if warmup else options.lr
        trainer.step(lr=lr, gradient_scale=clip_scale(result.grad_norm, options.clip_norm))
    except BaseException:
        # The next step would add its own to what is left of these.
        trainer.zero_gradients()
        raise
    return result


# No moments, no dropout: only gradients are wanted.
_PLAIN: dict[str, Any] = {
    "optimizer": "sgd",
    "momentum": 0.0,
    "nesterov": False,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


def loss_and_gradients(
    model: LlamaForCausalLM, input_ids: object, labels: object
) -> tuple[float, dict[str, FloatArray]]:
    """The body of `loss_and_gradients`."""
    model._refuse_active(
        "loss_and_gradients gives the gradients of the base's weights", "train_step trains the adapter"
    )
    batch = _block(model, input_ids, labels)
    core = model._core
    if core.dtype != "float32" or not core.separate_gate_up:
        core = trainable_copy(core)
    trainer = new_trainer(core, dataclasses.replace(_training(model).options, **_PLAIN))
    result = accumulate(trainer, [batch], 0, 0)
    names = parameter_names(model)
    return result.loss, {names[slot]: trainer.gradient(slot) for slot, _ in trainer.parameters()}


@dataclass(frozen=True)
class LearningRates:
    """What `lr_find` saw.

    Attributes:
        lr: The learning rates that were tried, rising.
        loss: The loss of the step with each, before the weights changed.
        suggestion: A tenth of the rate whose step led to the lowest smoothed loss.
    """

    lr: list[float]
    loss: list[float]
    suggestion: float

    def plot(self) -> Figure:
        """Draws losses over learning rates, and where the suggestion lies.

        Returns:
            The figure: `figure.savefig("lr.png")`.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        figure = new_figure("LearningRates.plot", (8, 5))
        axes = figure.add_subplot()
        axes.plot(self.lr, self.loss, color="tab:blue", alpha=0.3, label="loss")
        axes.plot(self.lr, smoothed(self.loss, _SMOOTHING), color="tab:blue", label="loss, smoothed")
        axes.axvline(self.suggestion, color="tab:green", linestyle="--", label=f"suggestion {self.suggestion:.2g}")
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("nats a token")
        axes.legend()
        return figure


def lr_find(
    model: LlamaForCausalLM,
    x: object,
    y: object,
    *,
    batch_size: int,
    start: float,
    end: float,
    steps: int,
    seed: int,
    context: int | None,
) -> LearningRates:
    """The body of `lr_find`."""
    model._refuse_active("lr_find tries learning rates of the base", "delete_adapter forgets it")
    steps = whole("steps", steps, 2)
    batch_size = whole("batch_size", batch_size, 1)
    seed = whole("seed", seed, 0, 2**64 - 1)
    start = number("start", start, above=0.0)
    end = number("end", end, above=start)
    source = read_data(x, y, _reading(model, context))
    options = _training(model).options
    trainer = new_trainer(trainable_copy(model._core), options)
    rates: list[float] = []
    losses: list[float] = []
    for step in range(steps):
        batch = collate(source.rows(step, batch_size, seed))
        try:
            result = accumulate(trainer, [batch], seed, step)
        except NumericError:
            break
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            break
        rates.append(start * (end / start) ** (step / (steps - 1)))
        losses.append(result.loss)
        if result.loss > _DIVERGED * min(losses):
            break
        trainer.step(lr=rates[-1], gradient_scale=clip_scale(result.grad_norm, options.clip_norm))
    if len(rates) < 2:
        raise NumericError(f"the loss is not finite from the start, at a learning rate of {start:g}")
    curve = smoothed(losses, _SMOOTHING)
    # The loss of a step is that of the weights which the rate before it made.
    return LearningRates(rates, losses, rates[max(0, int(np.argmin(curve)) - 1)] / 10)
