"""`attribute`: how much each token of a text counts for what a model says next, or for a label."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llama_ext._options import shown, whole
from llama_ext.errors import OptionError
from llama_ext.interpret import methods, rendering
from llama_ext.interpret.baselines import embedding_of
from llama_ext.interpret.pages import label, page, write_page
from llama_ext.interpret.questions import Target, ask, bar, loaded
from llama_ext.interpret.token_texts import Word, characters, pieces, words
from llama_ext.runtime.adapted import AdapterChoice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["Attribution", "attribute"]

F64 = npt.NDArray[np.float64]

_METHODS = ("integrated_gradients", "gradient_x_input", "occlusion")
# What scores may be off by, as a share of what they should add up to.
_TOLERANCE = 0.01
_MOST_STEPS = 1_000_000
# Rows of a table; a longer one shows those that count most.
_SHOWN = 40


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """How much each token counts for a target.

    Attributes:
        scores: (T,) float64, in nats: positive where a token speaks for the target.
        tokens: The text of each token by itself; bytes that are no whole character as \\xE4. `words` joins them.
        token_ids: Their ids.
        target: What is explained.
        value: The target's value for the text.
        baseline_value: And with the baseline in the place of every token.
        convergence_delta: Of integrated gradients, how far the scores of each part of the path are from the difference of values at
            its ends, added up over the parts, as a share of |value - baseline_value|: 0 is exact. None for other methods, whose
            scores need not add up.
        method: "integrated_gradients", "gradient_x_input" or "occlusion".
        steps: Gradients, or windows, that were computed.
        baseline: (T, C) float64, the embeddings that stand for tokens that are not there.
        warning: What is wrong with the scores, or None: they add up to 1%, or to what float32 can tell, and half of the steps tells
            much the same.
        adapter: The adapter that was in use, or None.
    """

    scores: F64
    tokens: list[str]
    token_ids: list[int]
    target: Target
    value: float
    baseline_value: float
    convergence_delta: float | None
    method: str
    steps: int
    baseline: F64
    warning: str | None = None
    adapter: str | None = None
    _tokenizer: Tokenizer | None = None

    def words(self) -> list[Word]:
        """Tokens joined to words, with the sums of their scores.

        A word begins at white space, at punctuation, and at each Chinese character or kana; tokens that make one character
        together are never apart.
        """
        return words(self._tokenizer, self.token_ids, self.scores)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one file that needs no other: the text, each token coloured by the sign and size of its score.

        Args:
            path: The file, which is replaced.

        Raises:
            OSError: It cannot be written.
        """
        write_page(path, page(self._heading(), self._coloured("")))

    def plot(self) -> Figure:
        """A bar for each token, as a matplotlib figure.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        return rendering.figure(self._heading(), self.tokens, self.scores)

    def _repr_html_(self) -> str:
        return self._coloured(self._heading())

    def _coloured(self, heading: str) -> str:
        parts = [
            (text, float(self.scores[first:last].sum()), self.token_ids[first:last])
            for text, first, last in characters(self._tokenizer, self.token_ids)
        ]
        return rendering.fragment(heading, self._notes(), parts)

    def __repr__(self) -> str:
        return (
            f"Attribution of {label(self.tokens)!r}: {self._heading()}, {len(self.tokens)} tokens, value {self.value:.4g}"
            + (", with a warning" if self.warning is not None else "")
        )

    def _heading(self) -> str:
        return f"{self.method} for the {self.target}"

    def _notes(self) -> list[str]:
        notes = [f"value {self.value:.4f}, with the baseline alone {self.baseline_value:.4f}"]
        if self.convergence_delta is not None:
            notes.append(
                f"scores add up to {self.scores.sum():+.4f} (parts off by {self.convergence_delta:.2%}, {self.steps} steps)"
            )
        if self.warning is not None:
            notes.append(f"warning: {self.warning}")
        return notes

    def __str__(self) -> str:
        listed = sorted(np.argsort(-np.abs(self.scores), kind="stable")[:_SHOWN].tolist())
        width = max(len(f"{self.scores[index]:+.4f}") for index in listed)
        lines = [self._heading(), *self._notes()]
        lines += [
            f"{index:>5}  {self.scores[index]:>+{width}.4f}  {rendering.quoted(self.tokens[index])}" for index in listed
        ]
        left = len(self.scores) - len(listed)
        return "\n".join(lines + ([f"and {left} tokens that count less"] if left else []))


def _warning(integral: methods.Integral, value: float, baseline_value: float) -> str | None:
    """What is wrong with integrated gradients."""
    found = []
    if not integral.adds_up(value, baseline_value, _TOLERANCE):
        found.append(
            f"the scores add up to {integral.scores.sum():.4g} instead of {value - baseline_value:.4g}, and parts of the path are off "
            f"by {integral.delta:.4g} in all"
        )
    if integral.steps == 1:
        found.append("there is no second step to compare the first with")
    elif not integral.agrees(value, baseline_value):
        share = integral.spread / methods.size(integral.scores, value, baseline_value)
        found.append(f"half of the steps alone gives scores that differ by {share:.0%} of all")
    if not found:
        return None
    return (
        f"{'; '.join(found)}: the gradient changes too fast for {integral.steps} step{'s' if integral.steps > 1 else ''}. Raise steps "
        "and max_steps, or take another baseline"
    )


def attribute(
    model: Any,
    text: Any,
    target: Any = None,
    method: str = "integrated_gradients",
    *,
    output: str = "logprob",
    baseline: Any = None,
    steps: int = 50,
    max_steps: int = 2000,
    window: int = 1,
    adapter: AdapterChoice = None,
    batch_size: int | None = None,
    verbose: int = 1,
) -> Attribution:
    """How much each token of a text counts for what a model says.

    The model is read in float32, as in training: from weights of fewer bits its values may differ from those of `model(...)` in the
    digits that faster arithmetic rounds away. One that has gate and up in one matrix gets two, as for an adapter.

    Args:
        model: A `LlamaForCausalLM`, `LlamaForSequenceClassification` or `TextClassifier`.
        text: A text, or token ids (T,).
        target: Of a language model: a token id, a text that follows, or a list of ids, whose log probabilities are added up; of a
            classifier: a label or its index. A tuple of two asks why the first rather than the second. None: the most likely one.
        method: "integrated_gradients": the mean gradient on the straight path from the baseline, times what lies between; scores add
            up to value - baseline_value. "gradient_x_input": the gradient at the text, times the embedding; quick and rough.
            "occlusion": how much the value falls without the token.
        output: What is explained: "logprob" or "logit" of the target.
        baseline: What stands for a token that is not there: "mean", the mean of all embeddings; "zeros"; a token or its id; an
            array or lists of floats (C,) or (T, C). None: "mean", and of gradient_x_input "zeros". See docs/attribution.md on why
            zeros mislead the other two.
        steps: Of integrated gradients: Gauss-Legendre nodes on the whole path, >= 1.
        max_steps: Of the same: where scores are off by more than 1%, or half of the steps tells others, the path is halved where
            needed until so many gradients are computed; `steps` leaves it as it is.
        window: Of occlusion: tokens that are replaced at once, in [1, T]; a token gets the mean of its windows.
        adapter: A name, or a list with a name or None (the base); None: the active one.
        batch_size: Sequences that run together; None: what fills a pass. On a CPU it changes no bit of the result.
        verbose: 0 shows no progress bar on a terminal.

    Returns:
        The scores, and what they are worth.

    Raises:
        OptionError: An option is out of range, the text is empty, the target or the baseline is no token or label.
        DTypeError, ShapeError: `text`, `target` or `baseline` is none of the above.
        TokenIdError: An id outside the vocabulary.
        ContextLengthError: Text and target are longer than the model's context.
        NumericError: A value is not finite.
        OutOfMemoryError: Activations do not fit into memory.

    Source: Sundararajan, Taly & Yan, "Axiomatic Attribution for Deep Networks", 2017 (integrated gradients); Shrikumar et al., "Not
    Just a Black Box", 2016 (gradient x input); Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", 2014
    (occlusion).
    """
    if method not in _METHODS:
        raise OptionError(f"attribute: method must be one of {', '.join(_METHODS)}, got {shown(method)}")
    first_steps = whole("attribute: steps", steps, 1, _MOST_STEPS)
    most_steps = max(first_steps, whole("attribute: max_steps", max_steps, 1, _MOST_STEPS))
    found = loaded(model)
    with ask(found, text, target, output=output, adapter=adapter, batch_size=batch_size, what="attribute") as question:
        if baseline is None:
            baseline = "zeros" if method == "gradient_x_input" else "mean"
        replaced = embedding_of(baseline, found, question, "attribute")
        width = whole("attribute: window", window, 1, question.tokens)
        ends = (question.embeddings, replaced)
        value, baseline_value = question.values(2, lambda index: ends[index]).tolist()
        delta = warning = None
        done = 1
        if method == "integrated_gradients":
            integral = methods.integrated_gradients(
                question,
                replaced,
                value,
                baseline_value,
                steps=first_steps,
                max_steps=most_steps,
                tolerance=_TOLERANCE,
                shows=bool(verbose),
            )
            scores, done = integral.scores, integral.steps
            span = abs(value - baseline_value)
            delta = integral.delta / span if span else (0.0 if integral.delta == 0 else float("inf"))
            warning = _warning(integral, value, baseline_value)
        elif method == "gradient_x_input":
            scores = methods.gradient_x_input(question, replaced, lambda amount: None)
        else:
            done = question.tokens - width + 1
            with bar("Occluding", done, "windows", shown=bool(verbose)) as advance:
                scores = methods.occlusion(question, replaced, value, width, advance)
        return Attribution(
            scores=scores,
            tokens=pieces(found.tokenizer, question.ids.tolist()),
            token_ids=question.ids.tolist(),
            target=question.target,
            value=value,
            baseline_value=baseline_value,
            convergence_delta=delta,
            method=method,
            steps=done,
            baseline=replaced,
            warning=warning,
            adapter=found.active_adapter if adapter is None else adapter if isinstance(adapter, str) else adapter[0],
            _tokenizer=found.tokenizer,
        )
