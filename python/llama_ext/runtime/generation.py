"""Generation: prompts in, continuations out, all at once or piece by piece.

The token loop runs in the core; Python only looks at tokens when somebody waits for each of them: a stream, or a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import Array
from llama_ext.errors import OptionError, UnsupportedError
from llama_ext.runtime.options import GenerationPlan, plan_generation
from llama_ext.runtime.prompts import Prompts, read_prompts
from llama_ext.runtime.speculation import check_draft_tokenizer
from llama_ext.runtime.text_stream import StopStrings, TextStream
from llama_ext.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["FinishReason", "Generated", "GenerationOutput", "Piece", "chat", "generate", "stream", "stream_with_counts"]

FinishReason = Literal["stop", "length"]

# What `generate` gives, in the kind of the prompts.
Generated = str | list[str] | list[int] | list[list[int]] | npt.NDArray[np.int64]

# What ends a row, in the core's words and in ours.
_FINISH: dict[str, FinishReason] = {"eos": "stop", "stop": "stop", "length": "length"}

# Steps that the core runs before their tokens are fetched: few enough that those of a step do not add up in memory.
_STEPS_PER_CALL = 256

# Sequences of one call: beyond any memory for their KV caches, and short of what only the bookkeeping would take.
_MOST_ROWS = 65_536


@dataclass(frozen=True)
class Piece:
    """One step of one row of a stream.

    Attributes:
        text: What this token adds to the text; may be empty, never half a character. The texts of a row, concatenated, are
            the continuation that `generate` returns.
        token_id: The token, or None when a row ends without one (max_new_tokens=0).
        logprob: Its log probability under the model, before temperature and penalties, in nats; None without a token.
        finish_reason: None until the row's last piece: "stop" (an end token or a stop string) or "length".
        row: Which sequence: prompt * num_return_sequences + copy.
    """

    text: str
    token_id: int | None
    logprob: float | None
    finish_reason: FinishReason | None
    row: int = 0


@dataclass(frozen=True)
class GenerationOutput:
    """One generated sequence, from `generate(..., return_details=True)`.

    Attributes:
        text: The continuation, without the prompt and without the stop string; None when the model has no tokenizer.
        token_ids: The tokens generated, the end token or those of the stop string included.
        logprobs: For each, its log probability under the model before temperature and penalties, in nats.
        finish_reason: "stop" (an end token or a stop string) or "length".
        prompt: The prompt as it was given, when it was a text.
        prompt_ids: The tokens of the prompt.
        score: Of beam search: sum of log probabilities / tokens ** length_penalty. Else None.
        shared_prompt_tokens: Tokens of the prompt that were not computed for this sequence but copied from another one.
        drafted_tokens: Of speculation: tokens that were guessed and checked.
        accepted_tokens: Of speculation: guesses that were right, each of which saved a step.
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    prompt: str | None
    prompt_ids: list[int]
    score: float | None = None
    shared_prompt_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class _RowText:
    """The text of one row as it grows: whole characters only, and nothing that may turn out to be a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, [token for token in prompt if self._has_text(token)])
        self._stop = StopStrings(stop) if stop else None
        self.stopped = False

    def push(self, token: int) -> str:
        return self._filter(self._stream.push(token)) if self._has_text(token) else ""

    def _has_text(self, token: int) -> bool:
        # A model's vocabulary may be padded beyond its tokenizer's.
        return self._tokenizer.has_id(token)

    def finish(self) -> str:
        text = self._filter(self._stream.flush())
        if self._stop is not None and not self.stopped:
            text += self._stop.flush()
        return text

    def _filter(self, text: str) -> str:
        if self._stop is None:
            return text
        if self.stopped:
            return ""
        text, self.stopped = self._stop.push(text)
        return text


class _Row:
    """What one sequence has got so far."""

    def __init__(self, text: _RowText | None) -> None:
        self.text = text
        self.parts: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: FinishReason | None = None


class _Run:
    """One generation in progress, over all its rows."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        prompts: Prompts,
        plan: GenerationPlan,
        *,
        with_text: bool,
        session: _core.Session | None = None,
        weights: _core.Model | None = None,
    ) -> None:
        tokenizer = model.tokenizer
        if plan.stop and tokenizer is None:
            raise OptionError("stop strings need a tokenizer, and this model has none: use eos_token_id")
        self._prompts = prompts
        self._plan = plan
        before = session.tokens if session is not None else []
        context = session.capacity if session is not None else model.config.max_position_embeddings
        lengths = new_token_counts(prompts, plan, context, len(before))
        copies = plan.num_return_sequences
        _refuse_many(prompts, copies)
        if session is None:
            adapters = model._core_adapters(plan.adapter, len(prompts.rows))
        elif plan.adapter is not None:
            raise OptionError("a session has the adapter that it was opened with: session(adapter=...)")
        else:
            adapters = []
        draft = plan.speculation.model
        if draft is not None:
            check_draft_tokenizer(model, draft)
        self._core = model._new_generation(
            prompts.rows,
            sampling=plan.sampling,
            max_new_tokens=[length for length in lengths for _ in range(copies)],
            eos=plan.eos,
            seed=plan.seed,
            copies=copies,
            session=session,
            weights=weights,
            max_batch_size=plan.max_batch_size,
            draft_tokens=plan.speculation.tokens,
            draft=draft,
            adapters=adapters,
        )
        # After the core has found room for the KV caches: else nothing of this is needed.
        self._rows = []
        for row in prompts.rows:
            for _ in range(copies):
                text = None
                if tokenizer is not None and (with_text or plan.stop):
                    text = _RowText(tokenizer, [*before, *row.tolist()], plan.stop)
                self._rows.append(_Row(text))

    def complete(self) -> list[GenerationOutput]:
        """Runs to the end: in one call of the core unless a stop string may end a row before."""
        if self._plan.stop:
            for _ in self.pieces():
                pass
        else:
            while not self._core.done:
                for event in self._core.run(_STEPS_PER_CALL):
                    self._take(event)
        return [self._output(index) for index in range(len(self._rows))]

    def pieces(self) -> Iterator[Piece]:
        """Runs step by step."""
        while not self._core.done:
            for event in self._core.step():
                piece = self._take(event)
                if piece is not None:
                    yield piece

    def _take(self, event: tuple[int, int, float, str]) -> Piece | None:
        index, token, logprob, finish = event
        row = self._rows[index]
        if row.finish is not None:
            return None
        row.finish = _FINISH.get(finish)
        text = ""
        if token >= 0:
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if row.text is not None:
                text = row.text.push(token)
        if row.text is not None:
            if row.finish is not None:
                text += row.text.finish()
            if row.text.stopped:
                if row.finish is None:
                    self._core.stop(index)
                row.finish = "stop"
        row.parts.append(text)
        if token < 0:
            return Piece(text, None, None, row.finish, index)
        return Piece(text, token, logprob, row.finish, index)

    def _output(self, index: int) -> GenerationOutput:
        row = self._rows[index]
        prompt = index // self._plan.num_return_sequences
        counts = self.counts(index)
        return GenerationOutput(
            text=None if row.text is None else "".join(row.parts),
            token_ids=row.tokens,
            logprobs=row.logprobs,
            finish_reason=row.finish or "length",
            prompt=None if self._prompts.texts is None else self._prompts.texts[prompt],
            prompt_ids=self._prompts.rows[prompt].tolist(),
            shared_prompt_tokens=counts["prompt_shared"],
            drafted_tokens=counts["drafted"],
            accepted_tokens=counts["accepted"],
        )

    def counts(self, index: int) -> dict[str, int]:
        """What one row has cost: see RowCounts of the core."""
        return self._core.row_counts(index)


def _refuse_many(prompts: Prompts, copies: int) -> None:
    rows = len(prompts.rows) * copies
    if rows > _MOST_ROWS:
        given = f"{len(prompts.rows)} prompt{'' if len(prompts.rows) == 1 else 's'}"
        raise OptionError(
            f"{given} with num_return_sequences={copies} are {rows} sequences; one call generates at most {_MOST_ROWS}: split it"
        )


def new_token_counts(prompts: Prompts, plan: GenerationPlan, context: int, before: int = 0) -> list[int]:
    """How many tokens to generate for each prompt, with `before` tokens of a session in front of it.

    Raises:
        ContextLengthError, OptionError: As `GenerationPlan.new_tokens`.
    """
    counts = []
    for index, row in enumerate(prompts.rows):
        what = "the prompt" if prompts.single else f"prompts[{index}]"
        if before:
            what = f"the session with {what}"
        counts.append(plan.new_tokens(before + row.size, context, what))
    return counts


def plan_for(model: LlamaForCausalLM, options: Mapping[str, Any], extra_eos: Sequence[int] = ()) -> GenerationPlan:
    """The options of a call, completed with the model's defaults."""
    plan = plan_generation(
        options,
        model.generation_defaults,
        eos=[*model.eos_token_ids, *extra_eos],
        vocabulary=model.config.vocab_size,
    )
    return plan if model.tokenizer is None else _ended_by_special_tokens(plan, model.tokenizer, model.config.vocab_size)


def _ended_by_special_tokens(plan: GenerationPlan, tokenizer: Tokenizer, vocabulary: int) -> GenerationPlan:
    """Stop strings that are special tokens end a row as tokens, too: a text leaves these out, so nobody would see them there."""
    found = [tokenizer.token_to_id(text) for text in plan.stop]
    ends = [index for index in found if index is not None and index in tokenizer.special_ids and index < vocabulary]
    return replace(plan, eos=tuple(dict.fromkeys([*plan.eos, *ends])))


def generate(
    model: LlamaForCausalLM,
    prompts: object,
    attention_mask: object,
    options: Mapping[str, Any],
    *,
    return_details: bool,
) -> Generated | GenerationOutput | list[GenerationOutput]:
    """The body of `LlamaForCausalLM.generate`."""
    plan = plan_for(model, options)
    batch = read_for(model, prompts, attention_mask)
    outputs = []
    if batch.rows:
        with_text = return_details or batch.texts is not None
        outputs = complete(model, batch, plan, with_text=with_text, with_logprobs=return_details)
    one = batch.single and plan.num_return_sequences == 1
    if return_details:
        return outputs[0] if one else outputs
    return _like_the_prompts(model, batch, plan, outputs, one=one)


def stream(
    model: LlamaForCausalLM, prompts: object, attention_mask: object, options: Mapping[str, Any]
) -> Iterator[Piece]:
    """The body of `LlamaForCausalLM.stream_generate`: everything is checked before the first piece is asked for."""
    plan = plan_for(model, options)
    _refuse_beams(plan)
    batch = read_for(model, prompts, attention_mask)
    return _Run(model, batch, plan, with_text=True).pieces() if batch.rows else iter(())


def stream_with_counts(
    model: LlamaForCausalLM, prompt: object, options: Mapping[str, Any]
) -> tuple[Iterator[Piece], Callable[[], dict[str, int]]]:
    """`stream` of one prompt, and what tells its counts at any time."""
    plan = plan_for(model, options)
    _refuse_beams(plan)
    run = _Run(model, read_for(model, prompt, None), plan, with_text=True)
    return run.pieces(), lambda: run.counts(0)


def chat(
    model: LlamaForCausalLM,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    streamed: bool,
    chat_template: str | None,
) -> str | Iterator[Piece]:
    """The body of `LlamaForCausalLM.chat`."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise OptionError("chat needs a tokenizer with a chat template, and this model has no tokenizer")
    extra_eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    plan = plan_for(model, options, extra_eos)
    if plan.num_return_sequences > 1:
        raise OptionError("chat gives one answer: num_return_sequences must be 1")
    ids = tokenizer.apply_chat_template(messages, chat_template=chat_template, add_generation_prompt=True)
    batch = read_for(model, ids, None)
    if streamed:
        _refuse_beams(plan)
        return _Run(model, batch, plan, with_text=True).pieces()
    return complete(model, batch, plan, with_text=True, with_logprobs=False)[0].text or ""


def generate_in_session(
    model: LlamaForCausalLM,
    session: _core.Session,
    weights: _core.Model,
    prompt: object,
    options: Mapping[str, Any],
) -> Iterator[Piece]:
    """The body of `Session.stream_generate`: the session's tokens come before the prompt, and it keeps what is generated."""
    plan = plan_for(model, options)
    if plan.num_beams > 1:
        raise UnsupportedError(
            "beam search follows several sequences and a session is one: use generate of the model, or pass num_beams=1"
        )
    batch = read_for(model, prompt, None, add_special_tokens=session.length == 0)
    if not batch.single or plan.num_return_sequences > 1:
        raise OptionError("a session is one sequence: give one prompt and num_return_sequences=1")
    run = _Run(model, batch, plan, with_text=True, session=session, weights=weights)
    return _with_the_prompt(run.pieces(), session, session.length, batch.rows[0])


def _with_the_prompt(pieces: Iterator[Piece], session: _core.Session, length: int, prompt: Array) -> Iterator[Piece]:
    """A prompt with nothing to generate after it does not run by itself, and the session, of `length` tokens, is to hold it."""
    for piece in pieces:
        if piece.token_id is None:
            if session.length != length:
                raise OptionError("generate: the session was changed before the prompt came into it")
            session.append(prompt, "none")
        yield piece


def read_for(
    model: LlamaForCausalLM, prompts: object, attention_mask: object, *, add_special_tokens: bool = True
) -> Prompts:
    """`read_prompts` with what the model knows."""
    return read_prompts(
        prompts,
        attention_mask,
        tokenizer=model.tokenizer,
        bos=model.bos_token_id,
        vocabulary=model.config.vocab_size,
        add_special_tokens=add_special_tokens,
    )


def complete(
    model: LlamaForCausalLM, prompts: Prompts, plan: GenerationPlan, *, with_text: bool, with_logprobs: bool
) -> list[GenerationOutput]:
    """Every sequence to its end, by beam search or token by token.

    Beam search has only scores at hand: it costs a pass more to know the log probabilities that they are made of.
    """
    if plan.num_beams == 1:
        return _Run(model, prompts, plan, with_text=with_text).complete()
    _refuse_many(prompts, plan.num_return_sequences)
    lengths = new_token_counts(prompts, plan, model.config.max_position_embeddings)
    outputs = []
    adapters = model._core_adapters(plan.adapter, len(prompts.rows)) or [None] * len(prompts.rows)
    for index, (row, length) in enumerate(zip(prompts.rows, lengths, strict=True)):
        found = model._core.beam_search(
            row,
            beams=plan.num_beams,
            returned=plan.num_return_sequences,
            max_new_tokens=length,
            length_penalty=plan.length_penalty,
            early_stopping=plan.early_stopping,
            eos=plan.eos,
            kv_dtype=model.kv_dtype,
            adapter=adapters[index],
        )
        for tokens, score, finished in found:
            text = None
            if with_text and model.tokenizer is not None:
                rows = _RowText(model.tokenizer, row.tolist(), ())
                text = "".join([*map(rows.push, tokens), rows.finish()])
            outputs.append(
                GenerationOutput(
                    text=text,
                    token_ids=tokens,
                    logprobs=_logprobs(model, row.tolist(), tokens, adapters[index]) if with_logprobs else [],
                    finish_reason="stop" if finished else "length",
                    prompt=None if prompts.texts is None else prompts.texts[index],
                    prompt_ids=row.tolist(),
                    score=score,
                )
            )
    return outputs


def _logprobs(
    model: LlamaForCausalLM, prompt: list[int], tokens: list[int], adapter: _core.Adapter | None
) -> list[float]:
    if not tokens:
        return []
    both = np.array(prompt + tokens, dtype=np.int32)
    scores, _ = model._core.score(both, len(prompt), adapter=adapter, kv_dtype=model.kv_dtype)
    return [float(score) for score in scores]


def _refuse_beams(plan: GenerationPlan) -> None:
    if plan.num_beams > 1:
        raise UnsupportedError(
            "beam search only knows its result at the end, so it cannot be streamed: use generate, or pass num_beams=1"
        )


def _like_the_prompts(
    model: LlamaForCausalLM, batch: Prompts, plan: GenerationPlan, outputs: list[GenerationOutput], *, one: bool
) -> Generated:
    """Results in the kind of the prompts: texts, lists of ids, or arrays, the prompt included."""
    if batch.kind == "text":
        texts = [(output.prompt or "") + (output.text or "") for output in outputs]
        return texts[0] if one else texts
    rows = [output.prompt_ids + output.token_ids for output in outputs]
    if batch.kind == "list":
        return rows[0] if one else rows
    if one:
        return np.array(rows[0], dtype=np.int64)
    if batch.block is None:
        return _pad(np.zeros((len(rows), 0), dtype=np.int64), rows, _padding(model, plan))
    copies = len(rows) // max(len(batch.block), 1)
    # As transformers: the block as it was given, then the new tokens, then padding on the right.
    block = np.repeat(batch.block.astype(np.int64), copies, axis=0) if copies else batch.block.astype(np.int64)
    return _pad(block, [output.token_ids for output in outputs], _padding(model, plan))


def _padding(model: LlamaForCausalLM, plan: GenerationPlan) -> int:
    """The token that fills up a batch: the first that anybody names, else one that ends a row, else 0."""
    of_tokenizer = None if model.tokenizer is None else model.tokenizer.pad_token_id
    named = (plan.pad, model.config.pad_token_id, of_tokenizer, *plan.eos)
    return next((token for token in named if token is not None), 0)


def _pad(block: Array, rows: list[list[int]], padding: int) -> npt.NDArray[np.int64]:
    width = block.shape[1]
    padded = np.full((len(rows), width + max(map(len, rows), default=0)), padding, dtype=np.int64)
    padded[:, :width] = block
    for line, row in zip(padded, rows, strict=True):
        line[width : width + len(row)] = row
    return padded
