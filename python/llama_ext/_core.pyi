"""The compiled core: conversion of arguments only; the meaning of every operation is in csrc/ops/*.h."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]

__version__: str

def build_info() -> dict[str, str]: ...
def available_isas() -> list[str]: ...
def compiled_isas() -> list[str]: ...
def cpu_features() -> list[str]: ...
def cpu_name() -> str: ...
def available_memory() -> int: ...
def default_threads() -> tuple[int, str]: ...
def gpus() -> tuple[list[str], str]: ...
def gpu_read_bandwidth(device: str, nbytes: int, rounds: int) -> float: ...
def has_nvtx_ranges() -> bool: ...
def nvtx_ranges_are_on() -> bool: ...
def show_nvtx_ranges(on: bool) -> None: ...
def from_dlpack(capsule: object, backend: Backend | None, what: str) -> tuple[Array | DeviceArray, str]: ...
def set_default_threads(threads: int) -> None: ...
def random_uniform(seed: int, stream: int, counter: int) -> float: ...

class Backend:
    def __init__(self, device: str = "cpu", threads: int = 0, isa: str = "") -> None: ...
    @property
    def device(self) -> str: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def matrix_layout(self) -> str: ...
    @property
    def stream(self) -> int: ...
    def device_array(self, array: Array, dtype: str) -> DeviceArray: ...
    def zero_matrix(self, rows: int, cols: int) -> Matrix: ...
    def matrix(
        self, source: Array, dtype: str = "float32", group: int = 0, importance: FloatArray | None = None
    ) -> Matrix: ...
    def block_matrix(self, blocks: npt.NDArray[np.uint8], ggml_type: str, cols: int) -> Matrix: ...
    def gate_up_matrix(
        self, gate: Array, up: Array, dtype: str = "float32", group: int = 0, importance: FloatArray | None = None
    ) -> Matrix: ...
    def embedding(self, ids: IntArray, table: Matrix, out: FloatArray) -> None: ...
    def matmul(
        self,
        x: FloatArray,
        weight: Matrix,
        bias: FloatArray | None,
        out: FloatArray,
        accumulate: bool = False,
        compute: str = "auto",
        norm_weight: FloatArray | None = None,
        norm_eps: float = 1e-6,
    ) -> None: ...
    def rms_norm(
        self, x: FloatArray, weight: FloatArray, eps: float, out: FloatArray, inv_rms: FloatArray | None = None
    ) -> None: ...
    def rope(self, x: FloatArray, cos: FloatArray, sin: FloatArray, inverse: bool = False) -> None: ...
    def attention(
        self,
        q: FloatArray,
        k: FloatArray,
        v: FloatArray,
        starts: IntArray,
        lengths: IntArray,
        scale: float,
        cache_dtype: str,
        out: FloatArray,
        compute: str = "auto",
    ) -> None: ...
    def feed_forward(
        self,
        x: FloatArray,
        gate_up: Matrix | tuple[Matrix, Matrix],
        gate_bias: FloatArray | None,
        up_bias: FloatArray | None,
        down: Matrix,
        down_bias: FloatArray | None,
        out: FloatArray,
        accumulate: bool = False,
        compute: str = "auto",
        norm_weight: FloatArray | None = None,
        norm_eps: float = 1e-6,
    ) -> None: ...
    def softmax(self, x: FloatArray, out: FloatArray) -> None: ...
    def cross_entropy(
        self, logits: FloatArray, labels: IntArray, out: FloatArray, hits: FloatArray | None = None
    ) -> None: ...
    def sample(
        self,
        logits: FloatArray,
        options: dict[str, Any],
        prompt: Sequence[int],
        output: Sequence[int],
        seed: int,
        stream: int,
        counter: int,
    ) -> tuple[int, float]: ...
    def sample_next(
        self,
        logits: FloatArray,
        options: dict[str, Any],
        prompts: Sequence[Sequence[int]],
        outputs: Sequence[Sequence[int]],
        seed: int,
        streams: Sequence[int],
        counters: Sequence[int],
    ) -> list[tuple[int, float] | None]: ...
    def matmul_backward(
        self,
        d_y: FloatArray,
        weight: Matrix | None,
        x: FloatArray | None,
        d_x: FloatArray | None,
        d_weight: Matrix | None,
        d_bias: FloatArray | None,
        accumulate: bool = False,
        compute: str = "exact",
    ) -> None: ...
    def rms_norm_backward(
        self,
        x: FloatArray,
        weight: FloatArray,
        eps: float,
        d_y: FloatArray,
        d_x: FloatArray,
        accumulate: bool = False,
        d_weight: FloatArray | None = None,
    ) -> None: ...
    def swiglu(self, gate: FloatArray, up: FloatArray, out: FloatArray) -> None: ...
    def swiglu_backward(
        self,
        gate: FloatArray,
        up: FloatArray,
        d_y: FloatArray,
        d_gate: FloatArray,
        d_up: FloatArray,
        y: FloatArray | None = None,
    ) -> None: ...
    def causal_attention(
        self,
        sequences: Sequence[tuple[int, int]],
        q: FloatArray,
        k: FloatArray,
        v: FloatArray,
        scale: float,
        out: FloatArray,
        log_sums: FloatArray,
        dropout: float = 0.0,
        seed: int = 0,
        compute: str = "exact",
    ) -> None: ...
    def causal_attention_backward(
        self,
        sequences: Sequence[tuple[int, int]],
        q: FloatArray,
        k: FloatArray,
        v: FloatArray,
        scale: float,
        y: FloatArray,
        log_sums: FloatArray,
        d_y: FloatArray,
        d_q: FloatArray,
        d_k: FloatArray,
        d_v: FloatArray,
        dropout: float = 0.0,
        seed: int = 0,
        compute: str = "exact",
    ) -> None: ...
    def cross_entropy_backward(
        self, logits: FloatArray, labels: IntArray, scale: float, losses: FloatArray
    ) -> None: ...
    def embedding_backward(self, ids: IntArray, d_y: FloatArray, d_table: Matrix) -> None: ...
    def dropout(
        self, x: FloatArray, p: float, seed: int, out: FloatArray, accumulate: bool = False, scale: float = 1.0
    ) -> None: ...
    def adam(
        self,
        parameter: FloatArray,
        gradient: FloatArray,
        first: FloatArray,
        second: FloatArray,
        step: int,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        decay: float = 0.0,
        decoupled: bool = True,
        gradient_scale: float = 1.0,
    ) -> None: ...
    def sgd(
        self,
        parameter: FloatArray,
        gradient: FloatArray,
        velocity: FloatArray | None,
        lr: float,
        momentum: float = 0.0,
        decay: float = 0.0,
        nesterov: bool = False,
        gradient_scale: float = 1.0,
    ) -> None: ...
    def sum_of_squares(self, x: FloatArray) -> float: ...
    def transpose(self, target: Matrix, source: Matrix) -> None: ...
    def load_rows(
        self, matrix: Matrix, out: FloatArray, transposes: bool = False, begin: int = 0, group: int = 0, stride: int = 0
    ) -> None: ...
    def store_rows(
        self, matrix: Matrix, x: FloatArray, transposes: bool = False, begin: int = 0, group: int = 0, stride: int = 0
    ) -> None: ...

class DeviceArray:
    """An array in the memory of an NVIDIA GPU.

    What operations of `llama_ext.ops` give whose arrays lie there. Its elements are float32, float16, bfloat16, float64, int32, int64, int8 or
    uint8; everything that was to write them is done. `__dlpack__` shares its memory, which is kept while anybody has it.

    Attributes:
        shape: Of its axes.
        strides: Elements between neighbours along each axis.
        dtype: "float32" and so on.
        device: "cuda:0" and so on.
        writable: Whether `out=` and steps of optimisers may write to it.
        is_contiguous: Whether it is C-contiguous.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def writable(self) -> bool: ...
    @property
    def is_contiguous(self) -> bool: ...
    def has_rows(self, inner: int) -> bool: ...
    def overlaps(self, other: DeviceArray) -> bool: ...
    def numpy(self) -> Array: ...
    def contiguous(self) -> DeviceArray: ...
    def copy(self) -> DeviceArray: ...
    def repeated(self, times: int) -> DeviceArray: ...
    def reshape(self, shape: Sequence[int]) -> DeviceArray: ...
    def assign(self, source: DeviceArray) -> None: ...
    def zeros(self, shape: Sequence[int], dtype: str = "float32") -> DeviceArray: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __len__(self) -> int: ...

class Matrix:
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def group(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def to_array(self) -> FloatArray: ...
    def values(self) -> DeviceArray: ...

def quantize(
    source: FloatArray, dtype: str, group: int, importance: FloatArray | None = None
) -> tuple[Array, npt.NDArray[np.float16], npt.NDArray[np.float16] | None]: ...
def decode_blocks(
    blocks: npt.NDArray[np.uint8], ggml_type: str, cols: int
) -> tuple[npt.NDArray[np.uint8], FloatArray, FloatArray | None]: ...
def type_of_blocks(ggml_type: str) -> tuple[str, int]: ...
def weight_type(encoding: str, group: int) -> tuple[str, int]: ...
def rope_angles(rope: dict[str, Any], positions: npt.NDArray[np.int64]) -> tuple[FloatArray, FloatArray]: ...

class Model:
    """config: the fields of csrc/model/config.h by name; config["rope"]: those of RopeConfig, kind as a word.

    types: by slot, the encoding (csrc/quant/weight_type.h) and how many k share a scale, 0 for floating point; "" stands for
    the slots that are not named. packed: all matrices by name, as `packed` gave them, uint8, which are used where they lie.
    A bfloat16 tensor is a uint16 array of its bits. `read` gives matrices in their dtype, or quantised ones in float32, norms
    and biases in float32. `read_codes` gives unsigned codes (N, K), scales (N, groups) and, where the encoding has them, minima:
    w = scale (code - zero) + min.
    """

    def __init__(
        self,
        backend: Backend,
        config: dict[str, Any],
        types: Mapping[str, tuple[str, int]],
        packed: Mapping[str, npt.NDArray[np.uint8]] = {},
        compute: str = "auto",
    ) -> None: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def separate_gate_up(self) -> bool: ...
    def converted(self, types: Mapping[str, tuple[str, int]], separate_gate_up: bool) -> Model: ...
    def slots(self) -> list[tuple[str, tuple[int, ...], bool]]: ...
    def types(self) -> dict[str, tuple[str, int]]: ...
    def matrices(self) -> list[str]: ...
    def packed(self, name: str) -> npt.NDArray[np.uint8]: ...
    def missing(self) -> list[str]: ...
    def copy_from(self, source: Model, slot: str) -> None: ...
    def load(self, slot: str, source: Array, dtype: str, importance: FloatArray | None = None) -> None: ...
    def load_blocks(self, slot: str, blocks: npt.NDArray[np.uint8], ggml_type: str) -> None: ...
    def load_codes(
        self,
        slot: str,
        codes: Array,
        scales: npt.NDArray[np.float16],
        mins: npt.NDArray[np.float16] | None = None,
    ) -> None: ...
    def read(self, slot: str) -> Array: ...
    def read_codes(self, slot: str) -> tuple[npt.NDArray[np.uint8], FloatArray, FloatArray | None]: ...
    def logits(
        self, sequences: Sequence[IntArray], adapters: Sequence[Adapter | None] = [], rows: str = "all"
    ) -> list[FloatArray]: ...
    def read_out(self, x: FloatArray) -> FloatArray: ...
    def score(
        self,
        tokens: IntArray,
        first: int,
        advance: Callable[[int], object] | None = None,
        adapter: Adapter | None = None,
        kv_dtype: str = "float32",
    ) -> tuple[FloatArray, npt.NDArray[np.bool_]]: ...
    def beam_search(
        self,
        prompt: IntArray,
        *,
        beams: int,
        returned: int,
        max_new_tokens: int,
        length_penalty: float,
        early_stopping: bool,
        eos: Sequence[int],
        kv_dtype: str,
        adapter: Adapter | None = None,
    ) -> list[tuple[list[int], float, bool]]: ...

class Adapter:
    """LoRA matrices: targets: by slot ("layers.0.q") rank and scale. A (rank, in) and B (out, rank) start as zeros."""

    def __init__(self, model: Model, targets: Mapping[str, tuple[int, float]]) -> None: ...
    def slots(self) -> list[tuple[str, int, float]]: ...
    def read(self, slot: str, matrix: str) -> FloatArray: ...
    def write(self, slot: str, matrix: str, array: FloatArray) -> None: ...
    @property
    def nbytes(self) -> int: ...

class Trainer:
    """Gradients of ragged batches and steps of an optimiser; see csrc/train/trainer.h.

    tokens, labels: int32 (T,), labels[t] is what position t predicts, or -100; lengths: int64, their sum T. `accumulate` gives
    (sum of losses, counted labels), `evaluate` also how many counted labels are the most likely token. trainable: slots of
    the model's own weights; None: all of them, or with an adapter none. `moments`: what the optimiser keeps of each parameter.
    One thread at a time.
    """

    def __init__(
        self,
        model: Model,
        *,
        optimizer: dict[str, Any],
        compute: str = "float32",
        checkpoint_activations: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        adapter_dropout: float = 0.0,
        adapter: Adapter | None = None,
        trainable: Sequence[str] | None = None,
    ) -> None: ...
    def accumulate(
        self, tokens: IntArray, labels: IntArray, lengths: npt.NDArray[np.int64], *, scale: float, seed: int = 0
    ) -> tuple[float, int]: ...
    def evaluate(
        self, tokens: IntArray, labels: IntArray, lengths: npt.NDArray[np.int64]
    ) -> tuple[float, int, int]: ...
    def gradient_norm(self) -> float: ...
    def step(self, *, lr: float, gradient_scale: float = 1.0) -> None: ...
    def zero_gradients(self) -> None: ...
    @property
    def steps(self) -> int: ...
    @steps.setter
    def steps(self, value: int) -> None: ...
    def parameters(self) -> list[tuple[str, tuple[int, ...]]]: ...
    def gradient(self, slot: str) -> FloatArray: ...
    def moments(self, slot: str) -> list[str]: ...
    def read_moment(self, moment: str, slot: str) -> FloatArray: ...
    def write_moment(self, moment: str, slot: str, array: FloatArray) -> None: ...
    @property
    def nbytes(self) -> int: ...

def input_gradients(
    model: Model,
    embeddings: FloatArray,
    lengths: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    outputs: IntArray,
    weights: npt.NDArray[np.float64],
    *,
    logprobs: bool = False,
    adapter: Adapter | None = None,
    differentiate: bool = True,
) -> tuple[npt.NDArray[np.float64], FloatArray | None]:
    """Outputs of sequences given as embeddings, and how they change with these; see csrc/train/input_gradients.h.

    embeddings: float32 (M, C); lengths: int64, their sum M. Term i is the logit, or log probability, of outputs[i] at row rows[i],
    which ascend; values: float64, as many. d_embeddings: (M, C), of sum(weights * values); None unless `differentiate`.
    """

def embed_tokens(model: Model, ids: IntArray) -> FloatArray:
    """The embeddings (M, C) of token ids (M)."""

class ObservedSequence:
    """A sequence that is run whole, and then again from inside (csrc/model/observed_sequence.h).

    `see` is shown the values at `places`, (site, layer) of csrc/model/observer.h: a fresh array (rows, width) each. What it returns, unless
    None, takes their place: float32, contiguous, of the same shape. It may be None where there are no places. Logits are those of all rows, or
    of the last one of each copy.
    """

    def __init__(
        self, model: Model, tokens: IntArray, layers: Sequence[int] = [], adapter: Adapter | None = None
    ) -> None: ...
    @property
    def copy_nbytes(self) -> int: ...
    def run(
        self,
        places: Sequence[tuple[str, int]],
        see: Callable[[str, int, FloatArray], FloatArray | None] | None,
        rows: str = "all",
    ) -> FloatArray: ...
    def run_from(
        self,
        layer: int,
        begins: Sequence[int],
        places: Sequence[tuple[str, int]],
        see: Callable[[str, int, FloatArray], FloatArray | None] | None,
        rows: str = "all",
    ) -> FloatArray: ...

class Session:
    """`append` gives logits of shape (V,) for rows="last", (T, V) for "all", (0, V) for "none".

    One thread at a time: a second one gets a LlamaExtError.
    """

    def __init__(self, model: Model, capacity: int, kv_dtype: str, adapter: Adapter | None = None) -> None: ...
    @property
    def length(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def kv_dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def tokens(self) -> list[int]: ...
    def append(self, tokens: IntArray, rows: str = "last") -> FloatArray: ...
    def rewind(self, length: int) -> None: ...
    def fork(self, capacity: int) -> Session: ...
    def read_layer(self, layer: int) -> tuple[FloatArray, FloatArray]: ...
    def restore(self, tokens: IntArray, layers: Callable[[int], tuple[FloatArray, FloatArray]]) -> None: ...

class Generation:
    """finish: "" | "eos" | "length" | "stop"; an event is (row, token, logprob, finish), token -1: none.

    A continued session holds what has run: the prompt and every generated token but the newest. draft_tokens > 0: guesses so
    many tokens a step, with `draft_model` or from the row's own text. `counts`: passes, tokens_run, draft_tokens_run;
    `row_counts`: prompt_run, prompt_shared, drafted, accepted.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[IntArray],
        *,
        sampling: dict[str, Any],
        max_new_tokens: Sequence[int],
        eos: Sequence[int],
        seed: int,
        kv_dtype: str,
        copies: int = 1,
        session: Session | None = None,
        max_batch_size: int = 16,
        draft_tokens: int = 0,
        draft_model: Model | None = None,
        draft_kv_dtype: str = "float32",
        adapters: Sequence[Adapter | None] = [],
    ) -> None: ...
    @property
    def done(self) -> bool: ...
    @property
    def rows(self) -> int: ...
    @property
    def counts(self) -> dict[str, int]: ...
    def row_counts(self, row: int) -> dict[str, int]: ...
    def step(self) -> list[tuple[int, int, float, str]]: ...
    def run(self, steps: int) -> list[tuple[int, int, float, str]]: ...
    def stop(self, row: int) -> None: ...
