"""The loop of `fit`: batches, gradients, steps, validation, checkpoints. It knows a `Trainer` and `Weights`, and no model."""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ext._options import shown
from llama_ext.errors import CheckpointError, NumericError, OptionError
from llama_ext.training import checkpoints
from llama_ext.training.batches import Batch, Row, Source, collate
from llama_ext.training.callbacks import states_of
from llama_ext.training.driver import Trainer, Weights
from llama_ext.training.history import Evaluation, History, StepRecord, Validation, perplexity_of
from llama_ext.training.interrupts import Abandoned, Interrupts
from llama_ext.training.options import TrainOptions
from llama_ext.training.outliers import OutlierRule
from llama_ext.training.reporting import Log, TrainingBar
from llama_ext.training.schedules import learning_rate
from llama_ext.training.settings import RunSettings

__all__ = ["Run", "StepResult", "accumulate", "clip_scale", "dropout_seed", "evaluate"]

# torch's clip_grad_norm_ adds this to the norm.
_CLIP_EPS = 1e-6
_SMOOTHING = 0.95


@dataclass(frozen=True)
class StepResult:
    """One optimiser step.

    Attributes:
        loss: Mean over the counted labels, in nats, before the weights changed.
        grad_norm: Of all gradients together, before clipping.
    """

    loss: float
    grad_norm: float


def dropout_seed(seed: int, step: int, part: int) -> int:
    """The seed of dropout in a part of a step, in [0, 2^63)."""
    digest = hashlib.sha256(f"{seed}/dropout/{step}/{part}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def clip_scale(norm: float, clip_norm: float | None) -> float:
    """What gradients of this norm are multiplied with."""
    return 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + _CLIP_EPS))


def accumulate(trainer: Trainer, batches: Sequence[Batch], seed: int, step: int) -> StepResult:
    """The gradient of the mean loss over all labels of the batches together, not of the mean of their means."""
    counted = sum(batch.counted for batch in batches)
    losses = []
    for part, batch in enumerate(batches):
        loss, _ = trainer.accumulate(
            batch.tokens, batch.labels, batch.lengths, scale=1.0 / counted, seed=dropout_seed(seed, step, part)
        )
        losses.append(loss)
    return StepResult(math.fsum(losses) / counted, trainer.gradient_norm())


def evaluate(trainer: Trainer, source: Source, batch_size: int) -> Evaluation:
    """The score of everything in a source.

    Raises:
        NumericError: The loss is not finite.
    """
    losses, counted, correct = [], 0, 0
    rows: list[Row] = []

    def flush() -> None:
        nonlocal counted, correct
        batch = collate(rows)
        loss, labels, right = trainer.evaluate(batch.tokens, batch.labels, batch.lengths)
        losses.append(loss)
        counted += labels
        correct += right
        rows.clear()

    for row in source.all_rows():
        rows.append(row)
        if len(rows) == batch_size:
            flush()
    if rows:
        flush()
    loss = math.fsum(losses) / counted
    if not math.isfinite(loss):
        raise NumericError(f"the validation loss is {loss}: the weights have left what can be computed with")
    return Evaluation(loss, correct / counted, perplexity_of(loss), counted)


def _states(values: Any, callbacks: int) -> list[Mapping[str, Any]]:
    if not isinstance(values, list) or len(values) != callbacks:
        raise ValueError(f"expected the states of {callbacks} callbacks, got {shown(values)}")
    for value in values:
        if not isinstance(value, dict):
            raise TypeError(f"the state of a callback is {shown(value)}, expected an object")
    return values


class Run:
    """One call of `fit`.

    Args:
        trainer: With the options' optimiser, and no steps done yet.
        weights: Of the trainer.
        options: Of `compile`.
        settings: Of `fit`.
        source: To learn from.
        validation: To score, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        weights: Weights,
        options: TrainOptions,
        settings: RunSettings,
        source: Source,
        validation: Source | None = None,
    ) -> None:
        self._trainer = trainer
        self._weights = weights
        self._options = options
        self._settings = settings
        self._source = source
        self._validation = validation
        self._folder = None if settings.checkpoint_dir is None else Path(settings.checkpoint_dir)
        settings.check(validates=validation is not None)
        per_epoch = 1 if settings.overfit_batch else source.steps_per_epoch(settings.batch_size * settings.grad_accum)
        self.history = History(steps_per_epoch=per_epoch)
        self.total_steps = settings.max_steps or (settings.epochs or 1) * per_epoch
        self.step = 0
        self._name = secrets.token_hex(16)
        # What a callback said; an interrupt goes before it, in this call of `fit`.
        self._stop: str | None = None
        self._interrupted = False
        # A step whose validation was interrupted.
        self._unfinished = False
        self._saved: int | None = None
        # What this run goes on from, where it is this folder's and unfinished.
        self._to_finish: checkpoints.Checkpoint | None = None
        self._smoothed = (0.0, 0.0)
        self._interrupts = Interrupts()
        self._agreed: dict[str, Any] | None = None

    # -- what callbacks see -------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Ends the run after this step."""
        self._stop = self._stop or reason

    # -- the run ------------------------------------------------------------------------------------------------------

    def go(self, begun: Callable[[], object] | None = None) -> History:
        """Trains.

        Args:
            begun: Called before the first step, when nothing is left that refuses the run, or when a checkpoint was restored.

        Raises:
            CheckpointError and others: As `LlamaForCausalLM.fit`.
            KeyboardInterrupt: A second Ctrl-C.
        """
        if self._folder is None:
            return self._go(begun)
        # What cannot be saved is told now, and not after the first epoch.
        states_of(self._settings.callbacks)
        with checkpoints.locked(self._folder):
            return self._go(begun)

    def _go(self, begun: Callable[[], object] | None) -> History:
        resumed = self._resume()
        if resumed and begun is not None:
            begun()  # the weights are the checkpoint's
            begun = None
        for callback in self._settings.callbacks:
            callback.on_start(self, resumed)
        self._rule = OutlierRule(self._options.skip_outliers, self.history.steps)
        for record in self.history.steps:
            self._smooth(record)
        flops = self._weights.flops_per_token(self._source.context)
        log = Log(self._settings.log_file)
        try:
            with (
                self._interrupts,
                TrainingBar(
                    self.total_steps,
                    self.step,
                    flops,
                    self._settings.peak_flops,
                    steps_per_epoch=self.history.steps_per_epoch,
                    shown=self._settings.verbose > 0,
                ) as bar,
            ):
                if self._settings.log_file is not None:
                    log.write("resume" if resumed else "start", step=self.step, **self._described(flops))
                if begun is not None:
                    begun()
                self._loop(bar, log)
                self.history.stopped = "interrupted" if self._interrupted else self._stop or "done"
                if self._folder is not None and self._saved != self.step:
                    self._save(log)
                log.write("end", step=self.step, stopped=self.history.stopped)
        finally:
            log.close()
        return self.history

    def _loop(self, bar: TrainingBar, log: Log) -> None:
        try:
            if self._unfinished:
                self._finish_step(bar, log)
            while self.step < self.total_steps and self._stop is None:
                record = self._one_step()
                self._note(record, bar, log)
                for callback in self._settings.callbacks:
                    callback.on_step_end(self, record)
                self._finish_step(bar, log)
        except (Abandoned, KeyboardInterrupt) as stop:
            # The first Ctrl-C may also arrive on the way into or out of what it abandons.
            if isinstance(stop, KeyboardInterrupt) and not self._interrupts.is_first():
                raise
            self._interrupted = True

    def _one_step(self) -> StepRecord:
        settings = self._settings
        started = time.perf_counter()
        lr = learning_rate(self._options, self.step, self.total_steps)
        try:
            with self._interrupts.abandonable():
                index = 0 if settings.overfit_batch else self.step
                rows = self._source.rows(index, settings.batch_size * settings.grad_accum, settings.seed)
                starts = range(0, len(rows), settings.batch_size)
                batches = [collate(rows[begin : begin + settings.batch_size]) for begin in starts]
                result = self._gradients(batches)
            skipped = self._rule.skips(result.loss, result.grad_norm, self.step + 1)
            if skipped:
                self._trainer.zero_gradients()
            else:
                self._trainer.step(lr=lr, gradient_scale=clip_scale(result.grad_norm, self._options.clip_norm))
        except BaseException:
            # Of a step that was given up there are gradients, or parts of them, and nothing else.
            self._trainer.zero_gradients()
            raise
        self._rule.note(result.loss, result.grad_norm, skipped)
        tokens = sum(int(batch.tokens.size) for batch in batches)
        epoch = self.step // self.history.steps_per_epoch + 1
        self.step += 1
        speed = tokens / max(time.perf_counter() - started, 1e-9)
        return StepRecord(self.step, epoch, result.loss, lr, result.grad_norm, tokens, speed, skipped)

    def _gradients(self, batches: Sequence[Batch]) -> StepResult:
        try:
            return accumulate(self._trainer, batches, self._settings.seed, self.step)
        except NumericError:
            # A trainer may refuse a loss that is not finite; whether that ends the run is the rule's to say.
            return StepResult(math.nan, math.nan)

    def _note(self, record: StepRecord, bar: TrainingBar, log: Log) -> None:
        self.history.steps.append(record)
        self._unfinished = True
        loss = self._smooth(record)
        bar.update(record, loss)
        values = {name: getattr(record, name) for name in ("step", "epoch", "loss", "lr", "grad_norm", "tokens")}
        share = bar.share_of_peak(record.tokens_per_second)
        known = {} if share is None else {"share_of_peak": share}
        seconds = (self.total_steps - self.step) * record.tokens / record.tokens_per_second
        log.write(
            "step",
            **values,
            smoothed_loss=loss,
            tokens_per_second=record.tokens_per_second,
            eta_seconds=seconds,
            skipped=record.skipped,
            **known,
        )

    def _smooth(self, record: StepRecord) -> float:
        total, mass = self._smoothed
        if math.isfinite(record.loss):
            total = _SMOOTHING * total + (1 - _SMOOTHING) * record.loss
            mass = _SMOOTHING * mass + (1 - _SMOOTHING)
            self._smoothed = total, mass
        return total / mass if mass else math.nan

    def _finish_step(self, bar: TrainingBar, log: Log) -> None:
        """What follows a step: validation, the end of an epoch, a checkpoint."""
        settings = self._settings
        ends_epoch = self.step % self.history.steps_per_epoch == 0
        last = self.step == self.total_steps
        due = ends_epoch if settings.validate_every is None else self.step % settings.validate_every == 0
        if self._validation is not None and (due or last):
            self._validate(self._validation, bar, log)
        self._unfinished = False
        if ends_epoch:
            for callback in settings.callbacks:
                callback.on_epoch_end(self, self.step // self.history.steps_per_epoch)
        due = ends_epoch if settings.save_every is None else self.step % settings.save_every == 0
        if self._folder is not None and due:
            self._save(log)

    def _validate(self, source: Source, bar: TrainingBar, log: Log) -> None:
        with self._interrupts.abandonable():
            found = evaluate(self._trainer, source, self._settings.batch_size)
        metrics = self._options.metrics
        validation = Validation(
            self.step,
            found.loss,
            found.accuracy if "accuracy" in metrics else None,
            found.perplexity if "perplexity" in metrics else None,
        )
        best = all(found.loss < each.loss for each in self.history.validations)
        self.history.validations.append(validation)
        bar.validated(validation)
        log.write("validation", step=self.step, loss=found.loss, accuracy=found.accuracy, tokens=found.tokens)
        if best and self._settings.keep_best and self._folder is not None:
            checkpoints.save_best(self._folder, self._weights, self.step)
        for callback in self._settings.callbacks:
            callback.on_validation(self, validation)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, log: Log) -> None:
        if self._folder is None:
            return
        history = self.history
        state = {
            "validations": [vars(each) for each in history.validations],
            "callbacks": states_of(self._settings.callbacks),
            "unfinished": self._unfinished,
            # Said in a step that is finished only when the run goes on; of a finished one it is the callbacks' to say again.
            "stop": self._stop if self._unfinished else None,
            "position": {
                "epoch": self.step // history.steps_per_epoch + 1,
                "step_of_epoch": self.step % history.steps_per_epoch,
                "seed": self._settings.seed,
            },
        }
        if self._to_finish is not None and self._to_finish.step == self.step:
            checkpoints.finish_checkpoint(self._to_finish, state)
        else:
            checkpoints.save_checkpoint(
                self._folder,
                self._trainer,
                self._weights,
                step=self.step,
                run=self._name,
                settings=self._must_agree(),
                state=state,
                arrays={"history": history.table()},
                keep_last=self._settings.keep_last,
            )
        path = checkpoints.checkpoint_path(self._folder, self.step)
        self._saved = self.step
        log.write("checkpoint", step=self.step, path=str(path))

    def _resume(self) -> bool:
        path = self._where_to_resume()
        if path is None:
            if self._folder is not None and checkpoints.has_checkpoints(self._folder):
                raise OptionError(
                    f"checkpoint_dir {self._folder} has checkpoints already: go on from the last one with resume=True, "
                    "or name another directory"
                )
            return False
        checkpoint = checkpoints.load_checkpoint(path)
        self._refuse_other_runs(checkpoint)
        checkpoints.check_same(checkpoint, self._must_agree())
        if checkpoint.step > self.total_steps:
            raise CheckpointError(
                f"{checkpoint.step} steps are done, this run has {self.total_steps}. Let it have more, or name an earlier "
                "checkpoint with resume=.",
                path=str(checkpoint.path),
            )
        checkpoints.check_whole(checkpoint)
        arrays = checkpoints.tables(checkpoint)
        try:
            self.history.steps = History.records(arrays["history"])
            self.history.validations = [Validation.of(each) for each in checkpoint.state["validations"]]
            self._unfinished = bool(checkpoint.state["unfinished"])
            self._stop = checkpoint.state.get("stop")
            if not (self._stop is None or isinstance(self._stop, str)):
                raise ValueError(f"the stop {shown(self._stop)}")
            if len(self.history.steps) != checkpoint.step:
                raise ValueError(f"a history of {len(self.history.steps)} steps after {checkpoint.step}")
            states = _states(checkpoint.state["callbacks"], len(self._settings.callbacks))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the state of the run is malformed: {error}", path=str(checkpoint.path)) from error
        # What a callback raises is its own, and says nothing of the file.
        for callback, state in zip(self._settings.callbacks, states, strict=True):
            callback.load_state(state)
        # Last, as all the rest may be malformed.
        checkpoints.restore(checkpoint, self._trainer, self._weights)
        self.step = checkpoint.step
        self._name = checkpoint.run
        if self._folder is not None:
            saved = checkpoints.checkpoint_path(self._folder, self.step)
            if saved.resolve() == checkpoint.path.resolve():
                self._saved, self._to_finish = (None, checkpoint) if self._unfinished else (self.step, None)
        return True

    def _refuse_other_runs(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Checks that a run which goes on in a folder is the only one there: steps of two runs have the same names."""
        if self._folder is None:
            return
        # A damaged one beside it may be why a run goes back to it. Elsewhere it is nobody knows whose.
        elsewhere = checkpoint.path.resolve().parent != self._folder.resolve()
        others = checkpoints.of_other_runs(self._folder, checkpoint.run, unreadable=elsewhere)
        if others:
            raise OptionError(
                f"checkpoint_dir {self._folder} has checkpoints that are not of the run of {checkpoint.path}, such as "
                f"{others[0].name}: name another directory, or move them away"
            )

    def _where_to_resume(self) -> Path | None:
        resume = self._settings.resume
        if resume is None or resume is False:
            return None
        if resume is True:
            # Nothing to go on from is a run's beginning: the same command starts it and restarts it.
            return None if self._folder is None else checkpoints.find_checkpoint(self._folder)
        return Path(resume)

    def _must_agree(self) -> dict[str, Any]:
        """What a checkpoint and a run that goes on from it have in common."""
        if self._agreed is None:
            self._agreed = self._agreement()
        return self._agreed

    def _agreement(self) -> dict[str, Any]:
        settings = self._settings
        options = self._options.to_dict()
        # Where the learning rate does not depend on how long the run is, it may become longer. Warm-up ends with a short run.
        warmup = self._options.warmup
        open_ended = self._options.schedule == "constant" and isinstance(warmup, int) and warmup <= self.total_steps
        return {
            "compile": options,
            "fit": {
                "batch_size": settings.batch_size,
                "grad_accum": settings.grad_accum,
                "seed": settings.seed,
                "overfit_batch": settings.overfit_batch,
                "validate_every": settings.validate_every,
                "total_steps": None if open_ended else self.total_steps,
                "callbacks": [type(callback).__name__ for callback in settings.callbacks],
            },
            "data": self._source.fingerprint,
            "validation_data": None if self._validation is None else self._validation.fingerprint,
            "model": self._weights.describe(),
        }

    def _described(self, flops: float | None) -> dict[str, Any]:
        return {
            "run": self._name,
            "total_steps": self.total_steps,
            "steps_per_epoch": self.history.steps_per_epoch,
            "flops_per_token": flops,
            **self._must_agree(),
        }
