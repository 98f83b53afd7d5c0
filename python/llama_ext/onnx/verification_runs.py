"""The work that every party does, and the comparison of what each gives with the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import IntArray
from llama_ext.models.config import LlamaConfig
from llama_ext.onnx.bisect import find_fault
from llama_ext.onnx.ort_model_session import OrtSession
from llama_ext.onnx.parity import GATES, Gates, compare_logits, nearness
from llama_ext.onnx.parity_report import Check, Fault, NotRun, Number
from llama_ext.onnx.profiles import QUANTIZED
from llama_ext.onnx.reference import F64, Reference, Weights, weights_of_core
from llama_ext.onnx.verification_graphs import GraphFile
from llama_ext.onnx.verification_parties import Greedy, NativeParty, OrtParty, Party, Pass
from llama_ext.onnx.verification_source import Source

__all__ = ["Verification", "Workload"]

FloatArray = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]

GREEDY = "greedy, KV cache"
NATIVE, NATIVE_INT8 = "native", "native (int8 activations)"
ONNXRUNTIME, ONNXRUNTIME_FLOAT32 = "onnxruntime", "onnxruntime (float32)"

NARROW = ("float16", "bfloat16")

# Tokens that a generation begins with.
_PROMPT = 16
# Chunks of a text, repeated; one of them is a single token.
_CHUNKS = (5, 1, 11)
# A context up to this is run to its end; a longer one is only entered near it.
_RUN_TO_THE_END = 1024
# Positions at the end of the context whose logits are compared, and the size of the pieces before them.
_LAST = 8
_PIECE = 64


@dataclasses.dataclass(frozen=True)
class Workload:
    """What every party does.

    Attributes:
        texts: Token ids.
        prompt: Of the greedy generation.
        steps: Of it.
        batch: Two rows of different lengths; () when the texts have none.
        end: A sequence as long as the context; None when that is long.
        near_end: A short sequence, and positions up to the last one of the context.
    """

    texts: tuple[IntArray, ...]
    prompt: IntArray
    steps: int
    batch: tuple[IntArray, ...]
    end: IntArray | None
    near_end: Pass

    @classmethod
    def of(cls, texts: Sequence[IntArray], steps: int, config: LlamaConfig) -> Workload:
        """Chooses it.

        Args:
            texts: At least one, of at least one token.
            steps: Tokens to generate, at most.
            config: The model.
        """
        context = config.max_position_embeddings
        first = texts[0]
        prompt = first[: max(min(_PROMPT, context - 1), 1)]
        other = texts[1] if len(texts) > 1 else first
        if len(other) == len(first):
            other = other[: len(other) * 2 // 3]
        together = np.concatenate(list(texts))
        short = first[: min(len(first), _PROMPT, context)]
        return cls(
            texts=tuple(texts),
            prompt=prompt,
            steps=max(min(steps, context - len(prompt)), 0),
            batch=(first, other) if len(other) else (),
            end=np.resize(together, context).astype(np.int32) if context <= _RUN_TO_THE_END else None,
            near_end=Pass((short,), positions=(np.arange(context - len(short), context),)),
        )

    @property
    def chunks(self) -> list[int]:
        """Sizes of the pieces of the first text."""
        return _cut(len(self.texts[0]), _CHUNKS)


def _cut(length: int, sizes: Sequence[int]) -> list[int]:
    """Repeats sizes until they fill a length."""
    result: list[int] = []
    while length > 0:
        size = min(sizes[len(result) % len(sizes)], length)
        result.append(size)
        length -= size
    return result


@dataclasses.dataclass
class _Measured:
    """What one party gave.

    Attributes:
        party: Which.
        gates: Its own.
        constants: What the constants of its reference are rounded to; None: not at all.
        logits: Of each text.
        greedy: The generation.
        others: By name of the comparison: the pass it is of, how many of its last rows were kept, and the logits of each row.
    """

    party: str
    gates: Gates
    constants: str | None
    logits: list[FloatArray]
    greedy: Greedy | None = None
    others: dict[str, tuple[Pass, int | None, list[FloatArray]]] = dataclasses.field(default_factory=dict)


class _Expectations:
    """Sequences whose logits the reference has to give, each once: one pass over the weights serves all."""

    def __init__(self) -> None:
        self._index: dict[bytes, int] = {}
        self._sequences: list[IntArray] = []
        self._positions: list[Positions] = []
        self._last: list[int] = []
        self._logits: list[F64] = []

    def add(self, tokens: IntArray, positions: Positions | None = None, last: int | None = None) -> int:
        """The number of a sequence; `last` of its rows, or all, will be there."""
        places = np.arange(len(tokens)) if positions is None else positions
        key = tokens.astype(np.int64).tobytes() + b"/" + places.astype(np.int64).tobytes()
        if key not in self._index:
            self._index[key] = len(self._sequences)
            self._sequences.append(tokens)
            self._positions.append(places)
            self._last.append(0)
        index = self._index[key]
        self._last[index] = max(self._last[index], len(tokens) if last is None else last)
        return index

    def compute(self, reference: Reference) -> None:
        """Fills in the logits."""
        head = reference.head()
        self._logits = reference.logits(
            self._sequences, positions=self._positions, final=lambda index, x: x[-self._last[index] :] @ head.T
        )

    def last(self, tokens: IntArray, positions: Positions | None = None, count: int | None = None) -> F64:
        """The logits of the last rows of a sequence, or of all."""
        index = self.add(tokens, positions, count)
        return self._logits[index][-(len(tokens) if count is None else count) :]


class Verification:
    """One verification.

    Args:
        graph: The file.
        source: The model it has to be.
        work: What every party does.
        profile, dtype: Of the graph.
        threads: Of onnxruntime; None: the default.

    Attributes:
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
    ) -> None:
        self._graph = graph
        self._source = source
        self._work = work
        self._profile = profile
        self._dtype = dtype
        self._threads = threads
        self.checks: list[Check] = []
        self.not_run: list[NotRun] = []
        self.fault: Fault | None = None
        self.loss: dict[str, Number] = {}
        self.loss_note = "the weights are stored exactly"
        self._measured: list[_Measured] = []

    @property
    def required(self) -> tuple[str, ...]:
        """The runtimes that have to pass."""
        return (NATIVE, ONNXRUNTIME_FLOAT32 if self._dtype == "bfloat16" else ONNXRUNTIME)

    @property
    def stages(self) -> int:
        """How many stages `run` has."""
        return 3 + 2 * (self._dtype in QUANTIZED) + (self._dtype == "float16") + (not self._source.is_exact)

    def run(self) -> Iterator[str]:
        """All comparisons; says what begins, stage by stage."""
        yield "the native model"
        core = self._source.native("exact")
        measured = self._measured
        measured.append(self._measure(NativeParty(NATIVE, GATES["float32"], core)))
        if self._dtype in QUANTIZED:
            yield "the native model with int8 activations"
            rounding = NativeParty(NATIVE_INT8, GATES["int8 activations"], self._source.native("auto"))
            measured.append(self._measure(rounding, briefly=True))
            del rounding
        parties: list[OrtParty] = []
        for name, make in self._ort_parties():
            yield name
            parties.append(make())
            measured.append(self._measure(parties[-1]))
        yield "the float64 reference"
        weights = weights_of_core(core)
        for constants in dict.fromkeys(each.constants for each in measured):
            self._compare(self._reference(weights, constants))
        if not self._source.is_exact:
            yield "what storing the weights in fewer bits changes"
            self._measure_loss(weights)
        for party, each in zip(parties, measured[-len(parties) :], strict=True):
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

    def _measure(self, party: Party, *, briefly: bool = False) -> _Measured:
        work = self._work
        logits = [party.logits(Pass((ids,)))[0] for ids in work.texts]
        # A graph of few bits that is computed in float32 still has the constants that it stores.
        narrow = self._dtype in NARROW and party.name == ONNXRUNTIME_FLOAT32
        result = _Measured(party.name, party.gates, self._dtype if narrow else None, logits)
        if work.steps:
            result.greedy = party.greedy(work.prompt, work.steps)
        else:
            self.not_run.append(NotRun(party.name, "greedy generation", "the context has no room for a token"))
        if briefly:
            return result
        first = work.texts[0]
        for name, sizes in (("in chunks", work.chunks), ("token by token", [1] * len(first))):
            past = Pass((first,), past=max(len(first) - sizes[-1], 0))
            result.others[name] = (past, len(first), [party.pieces(first, sizes, len(first))])
        self._measure_batches(party, result)
        one = Pass((first[:1],))
        result.others["one token"] = (one, None, party.logits(one))
        self._measure_end(party, result)
        return result

    def _measure_batches(self, party: Party, result: _Measured) -> None:
        native = isinstance(party, NativeParty)
        if not self._work.batch:
            self.not_run.append(NotRun(party.name, "batch of two", "the texts have a single token"))
            return
        for side in ("right",) if native else ("right", "left"):
            name = "batch of two" if native else f"batch padded on the {side}"
            batch = Pass(self._work.batch, side=side)
            result.others[name] = (batch, None, party.logits(batch))

    def _measure_end(self, party: Party, result: _Measured) -> None:
        name = "end of the context"
        if self._work.end is not None:
            tokens = self._work.end
            last = min(_LAST, len(tokens))
            sizes = [*_cut(len(tokens) - last, [_PIECE]), last]
            past = Pass((tokens,), past=len(tokens) - last)
            result.others[name] = (past, last, [party.pieces(tokens, sizes, last)])
            return
        context = self._source.config.max_position_embeddings
        if isinstance(party, NativeParty):
            reason = f"its positions begin with 0, and the context has {context}: texts of your own may be as long"
            self.not_run.append(NotRun(party.name, name, reason))
        else:
            result.others[name] = (self._work.near_end, None, party.logits(self._work.near_end))

    # -- comparing ---------------------------------------------------------------------------------------------------------

    def _reference(self, weights: Weights, constants: str | None) -> Reference:
        # Only decomposed attention has its scale as a tensor: fused operators take it as a float32 attribute.
        return Reference(self._source.config, weights, constants, rounds_scale=self._profile == "portable")

    def _compare(self, reference: Reference) -> None:
        """Compares what has the reference's constants."""
        measured = [each for each in self._measured if each.constants == reference.constants]
        wanted = _Expectations()
        for ids in self._work.texts:
            wanted.add(ids)
        for each in measured:
            if each.greedy is not None:
                wanted.add(each.greedy.sequence, last=len(each.greedy.tokens))
            for work, last, _ in each.others.values():
                for row in range(len(work.sequences)):
                    wanted.add(*work.row(row), last)
        wanted.compute(reference)
        for each in measured:
            self._check(each, wanted)

    def _check(self, measured: _Measured, expected: _Expectations) -> None:
        gates = measured.gates
        limits = {"relative_rms": gates.relative_rms, "worst_position": gates.worst_position}
        whole = compare_logits(measured.logits, [expected.last(ids) for ids in self._work.texts], self._work.texts)
        figures: dict[str, Number] = dataclasses.asdict(whole)
        figures["perplexity_difference"] = whole.perplexity_difference
        with_kl = limits if gates.kl_mean is None else {**limits, "kl_mean": gates.kl_mean}
        self.checks.append(Check(measured.party, "logits of texts", whole.passes(gates), with_kl, figures))
        if measured.greedy is not None:
            self.checks.append(self._greedy_check(measured, measured.greedy, expected, whole.max_abs, limits))
        for name, (work, _, logits) in measured.others.items():
            theirs = [expected.last(*work.row(row), len(ours)) for row, ours in enumerate(logits)]
            near = nearness(logits, theirs)
            figures = {key: value for key, value in dataclasses.asdict(near).items() if key != "where"}
            self.checks.append(Check(measured.party, name, near.passes(gates), limits, figures))

    def _greedy_check(
        self, measured: _Measured, greedy: Greedy, expected: _Expectations, error: float, limits: dict[str, float]
    ) -> Check:
        """Each token was the reference's choice, or one that lies within the noise of it; and so were the logits on the way."""
        steps = len(greedy.tokens)
        theirs = expected.last(greedy.sequence, None, steps)
        chosen = theirs[np.arange(steps), greedy.tokens]
        gaps = theirs.max(axis=1) - chosen
        other = theirs.argmax(axis=1) != greedy.tokens
        flips = np.flatnonzero(other & (gaps > 2 * error))
        near = nearness([greedy.logits], [theirs])
        figures: dict[str, Number] = {
            "relative_rms": near.relative_rms,
            "worst_position": near.worst_position,
            "max_abs": near.max_abs,
            "steps": steps,
            "top1": float(np.count_nonzero(~other)) / steps,
            "flips": len(flips),
            "ties": int(np.count_nonzero(other)) - len(flips),
            "largest_gap": float(gaps.max()),
        }
        note = ""
        if len(flips):
            step = int(flips[0])
            note = (
                f"step {step} took token {int(greedy.tokens[step])}, the reference takes {int(theirs[step].argmax())}, "
                f"{gaps[step]:.2e} above it where {2 * error:.2e} is noise"
            )
        elif figures["ties"]:
            note = (
                f"{figures['ties']} of {steps} tokens were others than the reference's, within the noise of its logits"
            )
        passed = near.passes(measured.gates) and not len(flips)
        return Check(measured.party, GREEDY, passed, {**limits, "flips": 0.0}, figures, note)

    def _measure_loss(self, weights: Weights) -> None:
        stored, original = (
            Reference(self._source.config, each).logits(self._work.texts) for each in (weights, self._source.original)
        )
        found = compare_logits(stored, original, self._work.texts)
        self.loss = dataclasses.asdict(found)
        self.loss["perplexity_difference"] = found.perplexity_difference
        self.loss_note = f"stored as {self._dtype}, against the original ones, both in float64"

    # -- where it differs --------------------------------------------------------------------------------------------------

    def _find_fault(self, party: OrtParty, measured: _Measured, reference: Reference) -> None:
        failed = [check.name for check in self.checks if check.runtime == party.name and not check.passed]
        if failed:
            work = self._pass_of(measured, failed[0])
            self.fault = find_fault(party, self._graph, reference, work, party.gates, float32=party.float32)

    def _pass_of(self, measured: _Measured, name: str) -> Pass:
        """A pass in which a failed comparison can be looked at."""
        if name in measured.others:
            return measured.others[name][0]
        if name == GREEDY and measured.greedy is not None:
            sequence = measured.greedy.sequence
            return Pass((sequence,), past=len(sequence) - 1)
        return Pass(self._work.texts)
