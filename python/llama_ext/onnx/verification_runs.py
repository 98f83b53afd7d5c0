"""The comparison: every party does the same work, and what each gives is compared with the reference's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import IntArray
from llama_ext.errors import LlamaExtError
from llama_ext.onnx.bisect import find_fault
from llama_ext.onnx.ort_model_session import OrtSession
from llama_ext.onnx.parity import GATES, Gates, Nearness, compare_logits, nearness
from llama_ext.onnx.parity_report import Check, Fault, NotRun, Number
from llama_ext.onnx.profiles import QUANTIZED
from llama_ext.onnx.reference import F64, Reference, Weights, weights_of_core
from llama_ext.onnx.verification_graphs import GraphFile
from llama_ext.onnx.verification_others import GENAI, OPENVINO, OpenVinoSession, genai_tokens, installed, version_of
from llama_ext.onnx.verification_parties import Greedy, NativeParty, OrtParty, Party, Pass
from llama_ext.onnx.verification_source import Source
from llama_ext.onnx.verification_work import Expectations, Workload

__all__ = ["Verification"]

T = TypeVar("T")
FloatArray = npt.NDArray[np.float32]
TEXTS, GREEDY = "texts", "greedy, KV cache"
NATIVE, NATIVE_INT8 = "native", "native (int8 activations)"
ONNXRUNTIME, ONNXRUNTIME_FLOAT32 = "onnxruntime", "onnxruntime (float32)"

NARROW = ("float16", "bfloat16")


@dataclasses.dataclass
class _Measured:
    """What one party gave.

    Attributes:
        party: Which.
        gates: Its own.
        constants: What the constants of its reference are rounded to; None: not at all.
        logits: Of each text; None when it failed.
        greedy: The generation.
        tokens: Of a generation whose logits the runtime does not show.
        others: By name of the comparison: the pass it is of, how many of its last rows were kept, and the logits of each row.
    """

    party: str
    gates: Gates
    constants: str | None
    logits: list[FloatArray] | None = None
    greedy: Greedy | None = None
    tokens: IntArray | None = None
    others: dict[str, tuple[Pass, int | None, list[FloatArray]]] = dataclasses.field(default_factory=dict)


class Verification:
    """One verification.

    Args:
        graph: The file.
        source: The model it has to be.
        work: What every party does.
        profile, dtype: Of the graph.
        threads: Of onnxruntime; None: the default.
        runtimes: Others, see `OTHERS`.

    Attributes:
        versions: Of those others.
        checks, not_run, fault, loss, loss_note: See `ParityReport`.
    """

    def __init__(
        self,
        graph: GraphFile,
        source: Source,
        work: Workload,
        profile: str,
        dtype: str,
        threads: int | None,
        runtimes: Sequence[str] = (),
    ) -> None:
        self._graph = graph
        self._source = source
        self._work = work
        self._profile = profile
        self._dtype = dtype
        self._threads = threads
        self._scores = source.labels is not None
        self.checks: list[Check] = []
        self.not_run: list[NotRun] = []
        self.fault: Fault | None = None
        self.loss: dict[str, Number] = {}
        self.loss_note = f"{dtype} holds them exactly"
        self.versions: dict[str, str] = {}
        self._runtimes = runtimes
        self._measured: list[_Measured] = []
        self._errors: dict[str, float] = {}

    @property
    def required(self) -> tuple[str, ...]:
        """The runtimes that have to pass."""
        exported = ONNXRUNTIME_FLOAT32 if self._dtype == "bfloat16" else ONNXRUNTIME
        # Whoever asks for one by name does not want to hear that everything has passed without it.
        return (NATIVE, exported, *self._runtimes)

    @property
    def stages(self) -> int:
        """How many stages `run` has."""
        quantized = self._dtype in QUANTIZED
        more = [quantized, quantized or self._dtype == "float16", not self._source.is_exact]
        return 3 + sum(more) + len(self._runtimes)

    def run(self) -> Iterator[str]:
        """All comparisons; says what begins, stage by stage."""
        yield "the native model"
        core = self._source.native("exact")
        measured = self._measured
        measured.append(self._measure(NativeParty(NATIVE, GATES["float32"], core, scores=self._scores)))
        if self._dtype in QUANTIZED:
            yield "the native model with int8 activations"
            rounds = self._source.native("auto")
            rounding = NativeParty(NATIVE_INT8, GATES["int8 activations"], rounds, scores=self._scores)
            measured.append(self._measure(rounding, briefly=True))
            del rounding, rounds
        parties: list[tuple[OrtParty, _Measured]] = []
        for name, make in self._ort_parties():
            yield name
            party = make()
            parties.append((party, self._measure(party)))
            measured.append(parties[-1][1])
        for name in self._runtimes:
            yield name
            self._measure_other(name)
        yield "the float64 reference"
        weights = weights_of_core(core)
        for constants in dict.fromkeys(each.constants for each in measured):
            self._compare(self._reference(weights, constants))
        if not self._source.is_exact:
            yield "what storing the weights in fewer bits changes"
            self._measure_loss(weights)
        # The one that computes most exactly tells most.
        for party, each in reversed(parties):
            if self.fault is None:
                self._find_fault(party, each, self._reference(weights, each.constants))

    # -- running -----------------------------------------------------------------------------------------------------------

    def _ort_parties(self) -> Iterator[tuple[str, Callable[[], OrtParty]]]:
        """The graph as it is, and with float32 arithmetic throughout where it has less."""
        config, path = self._source.config, self._graph.path
        quantized, narrow = self._dtype in QUANTIZED, self._dtype in NARROW
        if self._dtype == "bfloat16":
            reason = "onnxruntime has no bfloat16 kernels for CPUs; the graph was run widened to float32 instead"
            self.not_run.append(NotRun(ONNXRUNTIME, "everything", reason))
        else:
            gates = GATES["int8 activations" if quantized else self._dtype]
            yield ONNXRUNTIME, lambda: OrtParty(ONNXRUNTIME, gates, OrtSession(path, config, self._threads))
        if quantized or narrow:
            wide = GATES["float32"]
            yield (
                ONNXRUNTIME_FLOAT32,
                lambda: OrtParty(
                    ONNXRUNTIME_FLOAT32,
                    wide,
                    OrtSession(path, config, self._threads, copy=self._graph.bytes(float32=True), float32=True),
                    float32=True,
                ),
            )

    def _measure_other(self, name: str) -> None:
        """A runtime that was asked for by name; one that is not run has not passed."""
        library = installed(name)
        reason = ""
        if library is None:
            reason = f"not installed: pip install {name}"
        elif self._scores:
            reason = "classifiers are compared in onnxruntime and the native model only"
        elif name == OPENVINO and self._profile == "ort":
            # It reads some of them, and computes a single token without a past wrongly (2026.4).
            reason = "profile 'ort' has onnxruntime's own operators; 'portable' is the one for OpenVINO"
        if library is None or reason:
            self.not_run.append(NotRun(name, "everything", reason))
            return
        self.versions[name] = version_of(library)
        threads = self._threads or _core.default_threads()[0]
        path, config, gates = self._graph.path, self._source.config, GATES["float32"]
        if self._dtype in NARROW:
            gates = GATES["float16"]
        if name == GENAI:
            result = _Measured(name, gates, None)
            work = self._work
            result.tokens = self._try(
                name, GREEDY, lambda: genai_tokens(library, path, work.prompt, max(work.steps, 1), threads)
            )
            self._measured.append(result)
            return
        try:
            session = OpenVinoSession(library, path, config, threads)
        except LlamaExtError as error:
            if self._profile == "portable":
                self.checks.append(Check(name, "loading", False, note=str(error)))
            else:
                self.not_run.append(NotRun(name, "everything", f"{error}. Profile 'portable' is the one for it"))
            return
        self._measured.append(self._measure(OrtParty(name, gates, session)))

    def _measure(self, party: Party, *, briefly: bool = False) -> _Measured:
        work = self._work
        # A graph of few bits that is computed in float32 still has the constants that it stores.
        narrow = self._dtype in NARROW and party.name == ONNXRUNTIME_FLOAT32
        result = _Measured(party.name, party.gates, self._dtype if narrow else None)
        result.logits = self._try(party.name, TEXTS, lambda: [party.logits(Pass((ids,)))[0] for ids in work.texts])
        if not self._scores:
            self._measure_greedy(party, result)
        if briefly:
            return result
        first = work.texts[0]
        if not self._scores:
            for name, sizes in (("in chunks", work.chunks), ("token by token", [1] * len(first))):
                past = Pass((first,), past=len(first) - sizes[-1])
                self._add(party, result, name, past, len(first), partial(_pieces, party, first, sizes, len(first)))
        self._measure_batches(party, result)
        one = Pass((first[:1],))
        self._add(party, result, "one token", one, None, lambda: party.logits(one))
        if not self._scores:
            self._measure_end(party, result)
        return result

    def _measure_greedy(self, party: Party, result: _Measured) -> None:
        work = self._work
        if work.steps:
            result.greedy = self._try(party.name, GREEDY, lambda: party.greedy(work.prompt, work.steps))
        else:
            self.not_run.append(NotRun(party.name, GREEDY, "the context has no room for a token"))

    def _measure_batches(self, party: Party, result: _Measured) -> None:
        native = isinstance(party, NativeParty)
        if not self._work.batch:
            self.not_run.append(NotRun(party.name, "batch of two", "the texts have a single token"))
            return
        for side in ("right",) if native else ("right", "left"):
            name = "batch of two" if native else f"batch padded on the {side}"
            batch = Pass(self._work.batch, side=side, padding=self._source.config.pad_token_id or 0)
            self._add(party, result, name, batch, None, partial(party.logits, batch))
        if not native and not self._scores:
            # The last token of both rows, after the keys of tokens and of padding.
            width = max(map(len, self._work.batch))
            batch = Pass(self._work.batch, side="left", past=width - 1)
            self._add(party, result, "padding in the KV cache", batch, 1, partial(party.logits, batch))

    def _measure_end(self, party: Party, result: _Measured) -> None:
        name, work = "end of the context", self._work
        tokens = work.end
        if tokens is not None:
            past = Pass((tokens,), past=len(tokens) - work.last)
            self._add(party, result, name, past, work.last, partial(_pieces, party, tokens, work.end_pieces, work.last))
        elif isinstance(party, NativeParty):
            context = self._source.config.max_position_embeddings
            reason = f"its positions begin with 0, and the context has {context}: texts of your own may be as long"
            self.not_run.append(NotRun(party.name, name, reason))
        else:
            self._add(party, result, name, work.near_end, None, lambda: party.logits(work.near_end))

    def _add(
        self,
        party: Party,
        result: _Measured,
        name: str,
        work: Pass,
        last: int | None,
        run: Callable[[], list[FloatArray]],
    ) -> None:
        logits = self._try(party.name, name, run)
        if logits is not None:
            result.others[name] = (work, last, logits)

    def _try(self, party: str, name: str, run: Callable[[], T]) -> T | None:
        """What a runtime refuses to run has failed, and the rest goes on."""
        try:
            return run()
        except LlamaExtError as error:
            self.checks.append(Check(party, name, False, note=str(error)))
            return None

    # -- comparing ---------------------------------------------------------------------------------------------------------

    def _reference(self, weights: Weights, constants: str | None) -> Reference:
        # Only decomposed attention has its scale as a tensor: fused operators take it as a float32 attribute.
        return Reference(self._source.config, weights, constants, rounds_scale=self._profile == "portable")

    def _compare(self, reference: Reference) -> None:
        """Compares what has the reference's constants."""
        measured = [each for each in self._measured if each.constants == reference.constants]
        wanted = Expectations(scores=self._scores)
        for ids in self._work.texts:
            wanted.add(ids)
        for each in measured:
            if each.greedy is not None:
                wanted.add(each.greedy.sequence, last=len(each.greedy.tokens))
            if each.tokens is not None:
                wanted.add(self._work.sequence(each.tokens), last=len(each.tokens))
            for work, last, _ in each.others.values():
                for row in range(len(work.sequences)):
                    wanted.add(*work.row(row), last)
        wanted.compute(reference)
        for each in measured:
            self._check(each, wanted)

    def _check(self, measured: _Measured, expected: Expectations) -> None:
        gates = measured.gates
        limits = _limits(gates)
        error = 0.0
        if measured.logits is not None:
            error = self._check_texts(measured, measured.logits, expected, limits)
        self._errors[measured.party] = error
        if measured.tokens is not None:
            # It runs the same graph as onnxruntime, whose noise was measured.
            rows = expected.last(self._work.sequence(measured.tokens), None, len(measured.tokens))
            figures, note = _token_figures(measured.tokens, rows, self._errors.get(ONNXRUNTIME, 0.0))
            self.checks.append(Check(measured.party, GREEDY, not figures["flips"], {"flips": 0.0}, figures, note))
        if measured.greedy is not None:
            self.checks.append(self._greedy_check(measured, measured.greedy, expected, error, limits))
        for name, (work, _, logits) in measured.others.items():
            theirs = [expected.last(*work.row(row), len(ours)) for row, ours in enumerate(logits)]
            near = nearness(logits, theirs)
            mine = gates.for_numbers(sum(each.size for each in logits))
            self.checks.append(Check(measured.party, name, near.passes(mine), _limits(mine), _figures(near)))

    def _check_texts(
        self, measured: _Measured, logits: list[FloatArray], expected: Expectations, limits: dict[str, float]
    ) -> float:
        """Compares whole texts; gives the largest error."""
        gates, texts = measured.gates, self._work.texts
        theirs = [expected.last(ids) for ids in texts]
        if self._scores:
            near = nearness(logits, theirs)
            self.checks.append(Check(measured.party, TEXTS, near.passes(gates), limits, _figures(near)))
            return near.max_abs
        found = compare_logits(logits, theirs, texts)
        figures = {**dataclasses.asdict(found), "perplexity_difference": found.perplexity_difference}
        with_kl = limits if gates.kl_mean is None else {**limits, "kl_mean": gates.kl_mean}
        self.checks.append(Check(measured.party, TEXTS, found.passes(gates), with_kl, figures))
        return found.max_abs

    def _greedy_check(
        self, measured: _Measured, greedy: Greedy, expected: Expectations, error: float, limits: dict[str, float]
    ) -> Check:
        """Each token was the reference's choice, or one that lies within the noise of it; and so were the logits on the way."""
        theirs = expected.last(greedy.sequence, None, len(greedy.tokens))
        tokens, note = _token_figures(greedy.tokens, theirs, error)
        near = nearness([greedy.logits], [theirs])
        passed = near.passes(measured.gates) and not tokens["flips"]
        return Check(measured.party, GREEDY, passed, {**limits, "flips": 0.0}, {**_figures(near), **tokens}, note)

    def _measure_loss(self, weights: Weights) -> None:
        both = []
        for each in (weights, self._source.original):
            expected = Expectations(scores=self._scores)
            for ids in self._work.texts:
                expected.add(ids)
            expected.compute(Reference(self._source.config, each))
            both.append([expected.last(ids) for ids in self._work.texts])
        if self._scores:
            self.loss = _figures(nearness(*both))
        else:
            found = compare_logits(both[0], both[1], self._work.texts)
            self.loss = {**dataclasses.asdict(found), "perplexity_difference": found.perplexity_difference}
        self.loss_note = f"stored as {self._dtype}, against the original ones, both in float64"

    # -- where it differs --------------------------------------------------------------------------------------------------

    def _find_fault(self, party: OrtParty, measured: _Measured, reference: Reference) -> None:
        # A comparison without figures was not run to its end; another one may still be looked at.
        failed = [each for each in self.checks if each.runtime == party.name and not each.passed and each.figures]
        for check in failed:
            work = self._pass_of(measured, check.name)
            self.fault = find_fault(party, self._graph, reference, work, party.gates, float32=party.float32)
            if self.fault is not None:
                return

    def _pass_of(self, measured: _Measured, name: str) -> Pass:
        """A pass in which a failed comparison can be looked at."""
        if name in measured.others:
            return measured.others[name][0]
        if name == GREEDY and measured.greedy is not None:
            sequence = measured.greedy.sequence
            return Pass((sequence,), past=len(sequence) - 1)
        return Pass(self._work.texts)


def _pieces(party: Party, tokens: IntArray, sizes: Sequence[int], last: int) -> list[FloatArray]:
    return [party.pieces(tokens, sizes, last)]


def _token_figures(tokens: IntArray, theirs: F64, error: float) -> tuple[dict[str, Number], str]:
    """How tokens compare with the reference's choices, given its logits (steps, V) and the noise of a runtime's; and a note.

    Another token than the reference's counts only when the reference's gap is over twice the error: both logits may be off.
    """
    steps = len(tokens)
    gaps = theirs.max(axis=1) - theirs[np.arange(steps), tokens]
    other = theirs.argmax(axis=1) != tokens
    flips = np.flatnonzero(other & (gaps > 2 * error))
    ties = int(np.count_nonzero(other)) - len(flips)
    note = ""
    if len(flips):
        step = int(flips[0])
        note = (
            f"step {step} took token {int(tokens[step])}, the reference takes {int(theirs[step].argmax())}, "
            f"{gaps[step]:.2e} above it where {2 * error:.2e} is noise"
        )
    elif ties:
        note = f"{ties} of {steps} tokens were others than the reference's, within the noise of its logits"
    figures: dict[str, Number] = {
        "steps": steps,
        "top1": float(np.count_nonzero(~other)) / steps,
        "flips": len(flips),
        "ties": ties,
        "largest_gap": float(gaps.max()),
    }
    return figures, note


def _limits(gates: Gates) -> dict[str, float]:
    return {"relative_rms": gates.relative_rms, "worst_position": gates.worst_position}


def _figures(near: Nearness) -> dict[str, Number]:
    return {"relative_rms": near.relative_rms, "worst_position": near.worst_position, "max_abs": near.max_abs}
