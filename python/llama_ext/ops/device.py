"""Arrays of other libraries, by DLPack: on the CPU as NumPy arrays over the same memory, on a GPU as DeviceArrays."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import numpy as np

from llama_ext import _core
from llama_ext._arrays import Array, Bfloat16Bits, is_bfloat16
from llama_ext._core import DeviceArray
from llama_ext.errors import DeviceError, DTypeError, UnsupportedError
from llama_ext.ops.backends import backend_for
from llama_ext.ops.matrix import Matrix

__all__ = ["DeviceArray", "from_dlpack", "takes_dlpack", "to_device"]

P = ParamSpec("P")
R = TypeVar("R")

# DLPack's device types; the third is page-locked memory of the CPU.
_CPU, _CUDA, _CUDA_HOST = 1, 2, 3
# What the CPU reads and checks before an operation starts, so that it may lie there beside arrays on a GPU.
_READ_BY_THE_CPU = frozenset({"ids", "labels", "starts", "lengths", "importance", "blocks"})
# How a library says no: DLPack's own word, and what torch raises for tensors that need a gradient, are sparse, or have no memory ("meta").
_REFUSALS = (BufferError, RuntimeError, TypeError, ValueError)


def to_device(array: object, device: str = "cuda") -> DeviceArray | Array:
    """Copies an array to a device, unless it is there.

    Args:
        array: A NumPy array, or any with `__dlpack__`, of float32, float16, bfloat16, float64, int32, int64, int8 or uint8.
        device: "cuda", the first NVIDIA GPU; "cuda:1" and so on; or "cpu".

    Returns:
        A `DeviceArray`; for "cpu" a NumPy array, bfloat16 as the uint16 of its bits. Of an array that is there already: the same memory.

    Raises:
        DTypeError: Not an array, or another element type.
        DeviceError: There is no such device here, or the array is on another GPU.
        UnsupportedError: Its library does not hand it out.
        OutOfMemoryError: The GPU has not that much memory.
    """
    op = "to_device"
    found = _imported(op, "array", array, None, None)
    if device == "cpu":
        return found.numpy() if isinstance(found, DeviceArray) else found
    backend = backend_for(device, None, None)
    if isinstance(found, DeviceArray):
        if found.device != backend.device:
            raise DeviceError(
                f"{op}: array is on {found.device}, expected the CPU or {backend.device}. Copy it to the CPU first"
            )
        return found
    bits = isinstance(found, Bfloat16Bits) or is_bfloat16(found.dtype)
    source = np.ascontiguousarray(found).reshape(found.shape)
    name = "bfloat16" if bits else source.dtype.name
    return backend.device_array(source.view(np.ndarray).view(np.uint16) if bits else source, name)


def from_dlpack(array: object) -> DeviceArray | Array:
    """The array of another library as one of ours, over the same memory.

    Args:
        array: Any with `__dlpack__` and `__dlpack_device__`, on the CPU or on an NVIDIA GPU. Its library is told the stream to wait for.

    Returns:
        A `DeviceArray`; of one on the CPU a NumPy array, bfloat16 as the uint16 of its bits. What was read-only stays so. The memory is kept
        while the result lives.

    Raises:
        DTypeError: Not such an array, or an element type other than float32, float16, bfloat16, float64, int32, int64, int8 and uint8.
        DeviceError: It lies elsewhere, or there is no such GPU here.
        UnsupportedError: Its library does not hand it out, or as another version of DLPack than 0 and 1.
    """
    return _imported("from_dlpack", "array", array, None, None)


def takes_dlpack(function: Callable[P, R]) -> Callable[P, R]:
    """Makes an operation on NumPy arrays one on any arrays with `__dlpack__`, too.

    Those on the CPU become NumPy arrays, those on a GPU DeviceArrays, over the same memory; where there is one on a GPU, the
    operation runs there, and its other arrays must be there.
    """
    op = function.__name__
    signature = inspect.signature(function)

    @functools.wraps(function)
    def operation(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(map(_is_foreign, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        options = call.arguments
        device = _common_device(op, options)
        if device is not None and "device" in signature.parameters:
            given = options.get("device", "cpu")
            # "cpu" is also what a caller gets who says nothing, so it contradicts nothing.
            if given not in ("cpu", device) and not (given == "cuda" and device == "cuda:0"):
                raise DeviceError(
                    f"{op}: the arrays are on {device}, expected device={given!r}. Move them with ops.to_device"
                )
            options["device"] = device
        out = options.get("out")
        # One object that is given twice, as x and as out, stays one.
        converted: dict[int, object] = {}
        for name, value in options.items():
            options[name] = _converted(op, name, value, options, converted)
        result = function(*call.args, **call.kwargs)
        return _with_the_given(result, options.get("out"), out)

    return operation


def _with_the_given(result: R, used: object, given: object) -> R:
    """The caller's own `out` in place of the array that stands for its memory."""
    if used is None:
        return result
    if isinstance(result, tuple):
        return tuple(given if each is used else each for each in result)  # type: ignore[return-value]
    return given if result is used else result  # type: ignore[return-value]


def _is_foreign(value: object) -> bool:
    """Whether it is an array other than NumPy's, or a pair with one."""
    if isinstance(value, tuple):
        return any(_is_foreign(each) for each in value)
    return not isinstance(value, (np.ndarray, np.generic)) and hasattr(type(value), "__dlpack__")


def _parts(name: str, value: object) -> Iterator[tuple[str, object]]:
    """What an argument consists of; `gate_up` may be two."""
    if isinstance(value, tuple) and name == "gate_up":
        yield from zip(("gate", "up") if len(value) == 2 else (name,) * len(value), value, strict=True)
    else:
        yield name, value


def _common_device(op: str, options: dict[str, Any]) -> str | None:
    """The GPU that the arrays are on, or None: all are on the CPU.

    Raises:
        DeviceError: Some are there and some are elsewhere.
    """
    found: list[tuple[str, str]] = []
    packed: list[tuple[str, str]] = []
    for option, whole in options.items():
        for name, value in _parts(option, whole):
            if isinstance(value, Matrix):
                packed.append((name, value.device))
            elif isinstance(value, np.ndarray) or _is_foreign(value):
                found.append((name, _device_of(op, name, value)))
    device = next((place for _, place in found if place != "cpu"), None)
    if device is None:
        return None
    first = next(name for name, place in found if place == device)
    for name, place in found:
        if place != device and not (place == "cpu" and name in _READ_BY_THE_CPU):
            raise DeviceError(
                f"{op}: {name} is on {place}, expected {device}, where {first} is. Move it: "
                f"llama_ext.ops.to_device({name}, {device!r})"
            )
    for name, place in packed:
        if place != device:
            raise DeviceError(
                f"{op}: {name} is packed for {place}, expected {device}, where {first} is. Pack it with device={device!r}"
            )
    return device


def _device_of(op: str, what: str, value: object) -> str:
    """ "cpu" or "cuda:N".

    Raises:
        DTypeError: The object says it has `__dlpack__`, and not where it is.
        UnsupportedError: Its library has no word for where it is.
        DeviceError: It is neither on the CPU nor on an NVIDIA GPU.
    """
    if isinstance(value, np.ndarray):
        return "cpu"
    if isinstance(value, DeviceArray):
        return value.device
    if not hasattr(value, "__dlpack_device__"):
        raise DTypeError(f"{op}: {what} has __dlpack__ but no __dlpack_device__, got {type(value).__name__}")
    try:
        kind, index = map(int, value.__dlpack_device__())
    except _REFUSALS as error:
        raise _not_handed_out(op, what, value, error) from error
    if kind in (_CPU, _CUDA_HOST):
        return "cpu"
    if kind == _CUDA:
        return f"cuda:{index}"
    raise DeviceError(
        f"{op}: {what} must be in the memory of the CPU or of an NVIDIA GPU (DLPack's device types 1, 2 and 3), got type {kind}"
    )


def _converted(op: str, name: str, value: object, options: dict[str, Any], known: dict[int, object]) -> object:
    if isinstance(value, tuple) and name == "gate_up":
        return tuple(_converted(op, part, each, options, known) for part, each in _parts(name, value))
    if not _is_foreign(value):
        return value
    if id(value) not in known:
        known[id(value)] = _imported(op, name, value, options.get("threads"), options.get("isa"))
    return known[id(value)]


def _imported(op: str, what: str, value: object, threads: int | None, isa: str | None) -> DeviceArray | Array:
    """`value` as a NumPy array or a DeviceArray over the same memory.

    Raises:
        DTypeError, DeviceError, UnsupportedError: As `from_dlpack`.
    """
    if isinstance(value, (np.ndarray, DeviceArray)):
        return value
    if not _is_foreign(value):
        raise DTypeError(f"{op}: {what} must be a NumPy array or one with __dlpack__, got {type(value).__name__}")
    device = _device_of(op, what, value)
    backend = None if device == "cpu" else backend_for(device, threads, isa)
    try:
        capsule = _capsule(value, {} if backend is None else {"stream": backend.stream})
    except _REFUSALS as error:
        raise _not_handed_out(op, what, value, error) from error
    array, dtype = _core.from_dlpack(capsule, backend, f"{op}: {what}")
    return array.view(Bfloat16Bits) if dtype == "bfloat16" and isinstance(array, np.ndarray) else array


def _not_handed_out(op: str, what: str, value: object, error: Exception) -> UnsupportedError:
    return UnsupportedError(f"{op}: {what}, a {type(value).__name__}, is not handed out by its library: {error}")


def _capsule(value: Any, stream: dict[str, int]) -> object:
    try:
        return value.__dlpack__(**stream, max_version=(1, 0))
    except TypeError:
        # A library from before DLPack had versions.
        return value.__dlpack__(**stream)
