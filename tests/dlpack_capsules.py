"""DLPack by hand: capsules over any memory, and their consumer, in ctypes and after the specification alone."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

FLOAT32 = (2, 32, 1)
CPU = (1, 0)


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("rank", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", DELETER)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_api.PyCapsule_GetName.restype = ctypes.c_char_p
_api.PyCapsule_GetName.argtypes = [ctypes.py_object]
_api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]

_NAMES = {b"dltensor": Managed, b"dltensor_versioned": Versioned}
_USED = {b"dltensor": b"used_dltensor", b"dltensor_versioned": b"used_dltensor_versioned"}


def name_of(capsule: object) -> str:
    return _api.PyCapsule_GetName(capsule).decode()


def tensor_in(capsule: object) -> Any:
    """The Managed or Versioned structure of a capsule that was not consumed; it keeps the capsule."""
    name = _api.PyCapsule_GetName(capsule)
    managed = _NAMES[name].from_address(_api.PyCapsule_GetPointer(capsule, name))
    managed.capsule = capsule  # type: ignore[attr-defined]
    return managed


def consume(capsule: object) -> Any:
    """The structure, and the duty to call its deleter."""
    managed = tensor_in(capsule)
    name = _api.PyCapsule_GetName(capsule)
    assert _api.PyCapsule_SetName(capsule, _USED[name]) == 0
    return managed


def delete(managed: Any) -> None:
    managed.deleter(ctypes.addressof(managed))


def address_of(array: Any) -> int:
    """Where the elements of any array with DLPack lie; it is not consumed."""
    stream = {} if array.__dlpack_device__()[0] == 1 else {"stream": -1}
    tensor = tensor_in(array.__dlpack__(**stream)).tensor
    return (tensor.data or 0) + tensor.byte_offset


@dataclass
class Producer:
    """An array of a library of its own, over memory at `address`.

    Attributes:
        deleted: How often its deleter was called.
        asked: The keyword arguments of each call of __dlpack__.
    """

    address: int
    shape: tuple[int, ...]
    dtype: tuple[int, int, int] = FLOAT32
    device: tuple[int, int] = CPU
    strides: tuple[int, ...] | None = None
    byte_offset: int = 0
    version: tuple[int, int] | None = (1, 0)  # None: as before there were versions
    flags: int = 0
    keep: object = None
    deleted: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    _alive: list[object] = field(default_factory=list)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> object:
        if self.version is None and "max_version" in options:
            raise TypeError("unexpected keyword argument max_version")
        self.asked.append(options)
        managed: Any = Managed() if self.version is None else Versioned()
        if self.version is not None:
            managed.major, managed.minor = self.version
            managed.flags = self.flags
        extents = (ctypes.c_int64 * len(self.shape))(*self.shape)
        strides = None if self.strides is None else (ctypes.c_int64 * len(self.strides))(*self.strides)
        tensor = managed.tensor
        tensor.data = self.address
        tensor.device.type, tensor.device.index = self.device
        tensor.rank = len(self.shape)
        tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes = self.dtype
        tensor.shape = ctypes.cast(extents, ctypes.POINTER(ctypes.c_int64))
        if strides is not None:
            tensor.strides = ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64))
        tensor.byte_offset = self.byte_offset

        def deleter(_: int) -> None:
            self.deleted += 1

        managed.deleter = DELETER(deleter)
        name = b"dltensor" if self.version is None else b"dltensor_versioned"
        self._alive += [managed, extents, strides, name]
        return _api.PyCapsule_New(ctypes.addressof(managed), name, ctypes.cast(_destructor, ctypes.c_void_p))


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _destructor(capsule: int) -> None:
    # The capsule has no references any more, so no Python object may be made of it.
    valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    for name, kind in _NAMES.items():
        if valid(capsule, name):
            delete(kind.from_address(pointer(capsule, name)))
