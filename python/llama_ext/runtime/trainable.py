"""How a model is trained: the methods of `LlamaForCausalLM` that `llama_ext.training` does the work of.

That package is imported when it is used: a model runs without it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from llama_ext._arrays import FloatArray

if TYPE_CHECKING:
    from llama_ext.runtime.model import LlamaForCausalLM
    from llama_ext.training.api import LearningRates, Training
    from llama_ext.training.callbacks import Callback
    from llama_ext.training.history import Evaluation, History
    from llama_ext.training.loop import StepResult

__all__ = ["Trainable"]


class Trainable:
    """The part of `LlamaForCausalLM` that learns. Nothing else may use a model while it is trained."""

    _training: Training | None = None

    def compile(
        self,
        optimizer: str = "adamw",
        lr: float = 3e-4,
        weight_decay: float = 0.1,
        decay: str = "matrices",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        schedule: str = "cosine",
        warmup: int | float = 0,
        clip_norm: float | None = 1.0,
        precision: str = "float32",
        metrics: Sequence[str] = ("accuracy",),
        *,
        min_lr: float = 0.1,
        decay_fraction: float = 0.2,
        momentum: float | None = None,
        nesterov: bool | None = None,
        checkpoint_activations: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        skip_outliers: float | None = None,
    ) -> None:
        """Says how `fit` and `train_step` train. Without it they use the defaults below.

        Args:
            optimizer: "adamw" (decoupled decay), "adam" (decay as L2), "sgd", or "muon": orthogonalised momentum for the matrices
                of blocks, AdamW for the rest.
            lr: Highest learning rate, > 0.
            weight_decay: >= 0.
            decay: What decays: "matrices", or "all" (norms and biases as well).
            betas: Of adamw, adam and muon's AdamW, each in [0, 1).
            eps: Of the same, > 0.
            schedule: "cosine", "linear", "constant" or "wsd" (constant, then a linear decay).
            warmup: Steps in which the learning rate rises; a number below 1 that is not whole is their share of all steps.
            clip_norm: Gradients whose norm is larger are scaled to it; None does not clip.
            precision: "float32", or "bfloat16" for products of bfloat16 numbers; weights, gradients and moments stay float32. Under an adapter,
                quantised weights are multiplied in float32 on a CPU, and rounded to bfloat16 on a GPU.
            metrics: Of validation: "accuracy" and "perplexity".
            min_lr: Where cosine, linear and wsd end, as a share of lr in [0, 1].
            decay_fraction: The share of all steps in which wsd decays, in (0, 1].
            momentum: Of sgd (0.9) and muon (0.95), in [0, 1).
            nesterov: Of sgd (False) and muon (True).
            checkpoint_activations: Keep only what enters each block and compute the rest once more: less memory, more time.
            dropout: Of what each block adds to the residual stream, and of embeddings, in [0, 1).
            attention_dropout: Of attention's weights, in [0, 1).
            skip_outliers: Leave a step out whose loss or norm of gradients lies so many standard deviations above the mean of the
                last 128 steps (once there are 32), or is not finite; 6 is usual. None leaves none out, and raises where a
                number is not finite.

        Raises:
            OptionError: An option is unknown, out of range, or belongs to another optimiser.
        """
        from llama_ext.training import api

        api.compile_model(
            self._model(),
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            decay=decay,
            betas=betas,
            eps=eps,
            schedule=schedule,
            warmup=warmup,
            clip_norm=clip_norm,
            precision=precision,
            metrics=metrics,
            min_lr=min_lr,
            decay_fraction=decay_fraction,
            momentum=momentum,
            nesterov=nesterov,
            checkpoint_activations=checkpoint_activations,
            dropout=dropout,
            attention_dropout=attention_dropout,
            skip_outliers=skip_outliers,
        )

    def fit(
        self,
        x: object,
        y: object = None,
        *,
        batch_size: int = 32,
        epochs: int | None = None,
        max_steps: int | None = None,
        grad_accum: int = 1,
        validation_data: object = None,
        seed: int = 0,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | bool | None = None,
        callbacks: Sequence[Callback] = (),
        verbose: int = 1,
        context: int | None = None,
        pack: bool = False,
        shuffle: bool = True,
        validate_every: int | None = None,
        save_every: int | None = None,
        keep_last: int = 3,
        keep_best: bool = False,
        overfit_batch: bool = False,
        log_file: str | os.PathLike[str] | None = None,
        peak_flops: float | None = None,
    ) -> History:
        """Trains all weights, which become float32; or, where an adapter is active, the adapter alone. Moments begin anew.

        The loss of a step is the sum of negative log-likelihoods over the number of labels that count, of the whole step: neither
        lengths of texts nor `grad_accum` weigh anything.

        Ctrl-C ends the run after the last whole step: a checkpoint is written if there is a `checkpoint_dir`, and the history is
        returned with `stopped="interrupted"`. A second Ctrl-C raises KeyboardInterrupt at once.

        Args:
            x: One of
                a text, a 1-D array or list of token ids, or a `TokenFile`: a long stream, seen in random crops of `context` tokens
                  (an epoch has as many as fit into the stream side by side);
                a list of texts or of lists of ids: documents. Texts end with the tokenizer's EOS if it has one; one that is longer
                  than `context` becomes several rows;
                a list of (prompt, answer) pairs of texts, or a list of prompts with `y` as the list of answers: only answers and
                  EOS are learned. Both are encoded as one text; see docs/training.md about the border;
                an integer array (B, T).
            y: Answers as above; or labels (B, T) as in transformers: position t of `x` is trained to predict y[:, t + 1], -100
                does not count. None: `x` itself.
            batch_size: Rows of a batch, which run together.
            epochs: How often the data is seen. None: once, or what `max_steps` makes of it.
            max_steps: Steps of the optimiser, instead of `epochs`.
            grad_accum: Batches of a step. Memory is that of one.
            validation_data: As `x`, or a tuple (x, y); scored whole after each epoch, and after the last step (not where a callback
                ends the run before it). A stream is cut into consecutive windows of `context`.
            seed: Of order, crops and dropout, in [0, 2^64). Nothing else is random.
            checkpoint_dir: Where to save after each epoch and at the end: `step-00000010/`, a model that `from_pretrained`
                loads and what is needed to go on. It holds one run.
            resume: A checkpoint, or a directory of them, of which the last one counts; True: of `checkpoint_dir`, or from the
                beginning when it has none. The run goes on as if it had not ended: the same bits on the same instruction set.
                Later checkpoints in `checkpoint_dir` stay until the run comes to them, and then are replaced.
            callbacks: `llama_ext.training.Callback` objects, such as `EarlyStopping`.
            verbose: 0 shows neither a progress bar, on a terminal, nor lines of progress on stderr elsewhere.
            context: Tokens of a row, at most the model's context. None: the model's.
            pack: Put documents together into rows of `context` tokens. They do not see each other, and each begins at position 0.
                Nothing is ever padded, so this is for steps of even size and not for speed.
            shuffle: A new order each epoch. False: in order, and a stream window by window.
            validate_every: Steps between validations, instead of an epoch.
            save_every: Steps between checkpoints, instead of an epoch.
            keep_last: How many checkpoints stay, of this run and up to the step that is saved; others are not touched.
            keep_best: Keep also the weights with the lowest validation loss, as `best-00000010/` in `checkpoint_dir`. One in the
                directory that a run goes on from, where that is another one, stays there.
            overfit_batch: Every step sees the first batch: a model that cannot learn it by heart is broken.
            log_file: A file to which a line of JSON is added for each step, validation and checkpoint.
            peak_flops: What the machine can do, in floating-point operations a second: progress then shows the share in use.

        Returns:
            Losses, learning rates, norms and speeds of the steps, and validation losses.

        Raises:
            OptionError: An option is out of range, contradicts another one, or there is nothing to learn from; `checkpoint_dir` has
                checkpoints of another run; or the state of a callback cannot be saved.
            ContextLengthError: A pair, or a row of an array, is longer than `context`.
            TokenIdError: An id outside the vocabulary.
            DTypeError, ShapeError: `x` or `y` is none of the above.
            UnsupportedError: The weights are quantised.
            CheckpointError: The run to go on with had other data, options, model or validation data; or a file is damaged.
            NumericError: A loss or gradient is not finite; the weights are those of the step before.
            OutOfMemoryError: Gradients, moments or activations do not fit into memory.
            OSError: A checkpoint or the log cannot be written.
        """
        from llama_ext.training import api

        return api.fit(
            self._model(),
            x,
            y,
            batch_size=batch_size,
            epochs=epochs,
            max_steps=max_steps,
            grad_accum=grad_accum,
            validation_data=validation_data,
            seed=seed,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            callbacks=callbacks,
            verbose=verbose,
            context=context,
            pack=pack,
            shuffle=shuffle,
            validate_every=validate_every,
            save_every=save_every,
            keep_last=keep_last,
            keep_best=keep_best,
            overfit_batch=overfit_batch,
            log_file=log_file,
            peak_flops=peak_flops,
        )

    def evaluate(self, x: object, y: object = None, *, batch_size: int = 32, context: int | None = None) -> Evaluation:
        """Scores data with the model as it is, quantised or not, without dropout.

        Args:
            x, y, context: As `fit`. A stream is cut into consecutive windows, so that each token but the first counts once.
            batch_size: Rows that run together, at most.

        Returns:
            Loss in nats a label, accuracy, perplexity and how many labels counted.

        Raises:
            NumericError: The loss is not finite.
            OptionError and others: As `fit`.
        """
        from llama_ext.training import api

        return api.evaluate(self._model(), x, y, batch_size=batch_size, context=context)

    def train_step(self, input_ids: object, labels: object = None) -> StepResult:
        """One step of the optimiser, which `compile` begins anew and `fit` does not share.

        The learning rate is that of `compile`, after `warmup` steps when that is a whole number: a schedule needs to know how many
        steps there will be, as `fit` does.

        Args:
            input_ids: (B, T) integers.
            labels: (B, T), as `y` of `fit`; None: the ids.

        Returns:
            The loss before the step, and the norm of the gradients before clipping.

        Raises:
            NumericError: One of them is not finite; nothing has changed.
            OptionError: No label counts.
            ShapeError and others: As `fit`.
        """
        from llama_ext.training import api

        return api.train_step(self._model(), input_ids, labels)

    def loss_and_gradients(self, input_ids: object, labels: object = None) -> tuple[float, dict[str, FloatArray]]:
        """The loss and its gradients, without dropout, clipping or a step.

        Args:
            input_ids, labels: As `train_step`.

        Returns:
            The mean loss in nats over the labels that count, and by Hugging Face's name of a parameter its gradient, float32, of
            the parameter's shape.

        Raises:
            OptionError and others: As `train_step`.
        """
        from llama_ext.training import api

        return api.loss_and_gradients(self._model(), input_ids, labels)

    def lr_find(
        self,
        x: object,
        y: object = None,
        *,
        batch_size: int = 32,
        start: float = 1e-6,
        end: float = 1.0,
        steps: int = 100,
        seed: int = 0,
        context: int | None = None,
    ) -> LearningRates:
        """Trains a copy with a learning rate that rises from step to step, until the loss does.

        Args:
            x, y, batch_size, seed, context: As `fit`.
            start, end: The range of learning rates, which rise by the same factor each step.
            steps: How many are tried at most, >= 2.

        Returns:
            Rates, losses, and a suggestion. This model's weights do not change.

        Raises:
            NumericError: The loss is not finite even at `start`.
            OptionError and others: As `fit`.

        Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017.
        """
        from llama_ext.training import api

        return api.lr_find(
            self._model(), x, y, batch_size=batch_size, start=start, end=end, steps=steps, seed=seed, context=context
        )

    def _model(self) -> Any:
        return cast("LlamaForCausalLM", self)
