"""Arrays of other libraries, by DLPack: the same results over the same memory, on the CPU and on a GPU, and each deleter called once."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from device_arrays import GPU, ON_GPU, host, normal, of_cpu, of_gpu
from devices import IS_EMULATED, requires_cuda
from dlpack_capsules import Producer, address_of, consume, delete, name_of, tensor_in
from llama_ext import DeviceError, DTypeError, OptionError, ShapeError, UnsupportedError, _core, ops
from subprocesses import run_script

# On the CPU.


@pytest.mark.parametrize("version", [None, (1, 0), (1, 2)], ids=str)
def test_an_array_of_the_cpu_is_taken_over_its_own_memory_and_deleted_once(version: tuple[int, int] | None) -> None:
    x = normal(3, 8)
    theirs = of_cpu(x, version=version)
    taken = ops.from_dlpack(theirs)
    assert isinstance(taken, np.ndarray)
    assert taken.ctypes.data == x.ctypes.data
    np.testing.assert_array_equal(taken, x)
    row = taken[1]
    del taken
    gc.collect()
    assert theirs.deleted == 0, "a view of it still lives"
    del row
    gc.collect()
    assert theirs.deleted == 1
    assert "stream" not in theirs.asked[0], "the CPU has no streams"


def test_page_locked_memory_is_memory_of_the_cpu() -> None:
    x = normal(3, 8)
    np.testing.assert_array_equal(ops.softmax(of_cpu(x, device=(3, 0))), ops.softmax(x))


def test_operations_on_arrays_of_the_cpu_give_the_bits_that_numpy_arrays_give() -> None:
    x, weight, ids = normal(5, 64), normal(48, 64, seed=1), np.array([3, 0, 47])
    producers = [of_cpu(x), of_cpu(weight), of_cpu(ids)]
    their_x, their_weight, their_ids = producers
    y = ops.matmul(their_x, their_weight)
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, ops.matmul(x, weight))
    np.testing.assert_array_equal(ops.embedding(their_ids, weight), weight[ids])
    np.testing.assert_array_equal(ops.softmax(of_cpu(x[:, ::2])), ops.softmax(x[:, ::2]))
    gc.collect()
    assert [each.deleted for each in producers] == [1, 1, 1]


def test_what_is_written_to_is_the_callers_memory() -> None:
    x, y = normal(4, 16), np.full((4, 16), np.nan, np.float32)
    out = of_cpu(y)
    assert ops.softmax(of_cpu(x), out=out) is out
    np.testing.assert_array_equal(y, ops.softmax(x))
    in_place = of_cpu(x.copy())
    assert ops.softmax(in_place, out=in_place) is in_place
    np.testing.assert_array_equal(in_place.keep, y)


def test_a_read_only_array_stays_read_only() -> None:
    taken = ops.from_dlpack(of_cpu(normal(2, 4), flags=1))
    assert isinstance(taken, np.ndarray)
    assert not taken.flags.writeable
    with pytest.raises(DTypeError, match="out must be a writable float32"):
        ops.softmax(normal(2, 4), out=of_cpu(normal(2, 4), flags=1))


def test_bfloat16_of_the_cpu_is_known_as_such() -> None:
    numbers = normal(8, 32)
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    theirs = of_cpu(bits, dtype=(4, 16, 1))
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(ops.pack(theirs, "bfloat16").to_array(), expected)
    np.testing.assert_array_equal(ops.pack(theirs).to_array(), expected)
    with pytest.raises(DTypeError, match="x must be float32, got bfloat16"):
        ops.softmax(theirs)


@pytest.mark.parametrize("offset", [4, 40])
def test_a_byte_offset_and_strides_are_followed(offset: int) -> None:
    x = normal(6, 10)
    theirs = of_cpu(x, shape=(2, 3), strides=(10, 2), byte_offset=offset)
    np.testing.assert_array_equal(
        ops.from_dlpack(theirs), x.reshape(-1)[offset // 4 :][: 2 * 10].reshape(2, 10)[:, :6:2]
    )


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0)])
def test_no_elements_need_no_memory(shape: tuple[int, ...]) -> None:
    theirs = Producer(0, shape)
    assert ops.softmax(theirs).shape == shape
    gc.collect()
    assert theirs.deleted == 1


class Capsule:
    """Gives out one capsule again and again."""

    def __init__(self, capsule: object, device: tuple[int, int] = (1, 0)) -> None:
        self.capsule, self.device = capsule, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: object) -> object:
        return self.capsule


def test_a_capsule_is_consumed_once() -> None:
    theirs = of_cpu(normal(2, 2))
    twice = Capsule(theirs.__dlpack__())
    first = ops.from_dlpack(twice)
    assert name_of(twice.capsule) == "used_dltensor_versioned"
    with pytest.raises(OptionError, match="has been consumed"):
        ops.from_dlpack(twice)
    del first, twice
    gc.collect()
    assert theirs.deleted == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": (2, 32, 4)}, DTypeError, "type code 2 with 32 bits and 4 lanes"),
        ({"dtype": (5, 64, 1)}, DTypeError, "type code 5"),
        ({"dtype": (0, 16, 1)}, DTypeError, "type code 0 with 16 bits"),
        ({"version": (2, 0)}, UnsupportedError, "DLPack 2.0, of which version 1 is known"),
        ({"byte_offset": 2}, ShapeError, "must be aligned to its elements of 4 bytes"),
        ({"shape": (-1, 2)}, ShapeError, "negative extent"),
        ({"address": 0}, ShapeError, "has elements, but no memory"),
        ({"device": (7, 0)}, DeviceError, "got type 7"),
    ],
)
def test_what_cannot_be_taken_is_a_typed_error_and_still_freed_once(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    theirs = of_cpu(normal(2, 2), **options)
    with pytest.raises(error, match="from_dlpack: array.*" + re.escape(message)):
        ops.from_dlpack(theirs)
    gc.collect()
    assert theirs.deleted == len(theirs.asked)


def refused(call: Callable[[], object]) -> str:
    """The message of a DTypeError. The error itself is gone: its frames would hold arrays longer than who made their memory."""
    try:
        call()
    except DTypeError as error:
        return str(error)
    raise AssertionError("it was taken")


def test_the_advice_about_a_dtype_is_of_the_library_that_it_is_from() -> None:
    weight, bits = normal(4), np.zeros((2, 4), np.uint16)
    half = Producer(bits.ctypes.data, (2, 4), dtype=(4, 16, 1), keep=bits)
    said = refused(lambda: ops.rms_norm(half, weight, 1e-5))
    assert said.startswith("rms_norm: x must be float32, got bfloat16. ")
    assert "x.float() in torch" in said
    assert "numpy" not in said, "which has no bfloat16"
    wide = np.zeros((2, 4))
    double = Producer(wide.ctypes.data, (2, 4), dtype=(2, 64, 1), keep=wide)
    said = refused(lambda: ops.rms_norm(double, weight, 1e-5))
    assert said.startswith("rms_norm: x must be float32, got float64. ")
    assert "x.float() in torch" in said
    said = refused(lambda: ops.matmul(normal(2, 4), double))
    assert said.startswith("matmul: weight must be float32, float16 or bfloat16, got float64. ")
    assert "weight.float() in torch" in said
    assert half.deleted == 1
    assert double.deleted == 2


def test_what_is_no_array_is_told_which_arrays_are_taken() -> None:
    taken = r"must be a NumPy array of {}, or one with __dlpack__ \(torch, JAX, CuPy\)"
    with pytest.raises(DTypeError, match=f"rms_norm: x {taken.format('float32')}, got list"):
        ops.rms_norm([[1.0, 2.0]], normal(2), 1e-5)
    with pytest.raises(DTypeError, match=f"embedding: ids {taken.format('integers')}, got list"):
        ops.embedding([1], normal(2, 4))
    with pytest.raises(DTypeError, match=f"matmul: weight {taken.format('float32, float16 or bfloat16')}, or a packed"):
        ops.matmul(normal(2, 4), [[1.0] * 4])
    with pytest.raises(DTypeError, match=f"pack_blocks: blocks {taken.format('uint8')}, got bytes"):
        ops.pack_blocks(b"", "Q8_0", 32)


def test_what_has_no_dlpack_or_refuses_is_a_typed_error() -> None:
    class Refuses(Capsule):
        def __dlpack__(self, **options: object) -> object:
            raise BufferError("it requires a gradient")

    class Nowhere:
        def __dlpack__(self, **options: object) -> object:
            raise AssertionError

    class Elsewhere(Capsule):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise ValueError("Unknown device type meta")

    with pytest.raises(UnsupportedError, match=r"softmax: x, a Refuses, .* it requires a gradient"):
        ops.softmax(Refuses(None))
    for call in (ops.softmax, ops.from_dlpack, lambda x: ops.to_device(x, "cpu")):
        with pytest.raises(UnsupportedError, match=r"an? .*Elsewhere, is not handed out .* Unknown device type meta"):
            call(Elsewhere(None))
    with pytest.raises(DTypeError, match="no __dlpack_device__"):
        ops.softmax(Nowhere())
    with pytest.raises(DTypeError, match="must be a NumPy array or one with __dlpack__, got list"):
        ops.to_device([1.0], "cpu")
    with pytest.raises(DTypeError, match="must return a capsule"):
        ops.from_dlpack(Capsule("no capsule"))


def test_torch_arrays_of_the_cpu_go_in_without_a_copy() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed, nor needed otherwise")
    x = torch.randn(4, 32)
    weight = torch.randn(16, 32, dtype=torch.bfloat16)
    expected = x.double() @ weight.double().T
    np.testing.assert_allclose(ops.matmul(x, weight, compute="exact"), expected.numpy(), atol=1e-4)
    out = torch.empty(4, 32)
    assert ops.softmax(x, out=out) is out
    torch.testing.assert_close(out, torch.softmax(x, -1))
    assert host(ops.from_dlpack(x)).ctypes.data == x.data_ptr()
    with pytest.raises(UnsupportedError, match="softmax: x, a Tensor"):
        ops.softmax(torch.randn(2, 2, requires_grad=True))
    for without_memory in (torch.empty(2, 2, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(UnsupportedError, match="softmax: x, a Tensor"):
            ops.softmax(without_memory)


def test_without_a_gpu_an_array_on_one_is_a_device_error() -> None:
    if _core.gpus()[0]:
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError):
        ops.softmax(Producer(4096, (2, 2), device=ON_GPU))
    with pytest.raises(DeviceError):
        ops.to_device(normal(2))


# On a GPU.


@pytest.mark.gpu
@requires_cuda
class TestGpu:
    """Only the operations of one with kernels of its own need a GPU; the protocol is the same for all."""

    @pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int32", "int64", "int8", "uint8"])
    @pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 7), (2, 3, 4, 5, 6)])
    def test_an_array_goes_there_and_back(self, dtype: str, shape: tuple[int, ...]) -> None:
        array = (100 * normal(*shape)).astype(dtype) if shape else np.array(7, dtype)
        there = ops.to_device(array)
        assert isinstance(there, ops.DeviceArray)
        assert (there.shape, there.dtype, there.device, there.ndim) == (array.shape, dtype, GPU, array.ndim)
        assert (there.size, there.nbytes, there.writable) == (array.size, array.nbytes, True)
        np.testing.assert_array_equal(there.numpy(), array)
        np.testing.assert_array_equal(ops.to_device(there, "cpu"), array)
        assert ops.to_device(there) is there
        np.testing.assert_array_equal(np.from_dlpack(Capsule(there.__dlpack__(dl_device=(1, 0)))), array)

    def test_a_strided_array_goes_there_as_what_it_shows(self) -> None:
        array = normal(6, 10)[::2, 1::3]
        np.testing.assert_array_equal(host(ops.to_device(array)), array)

    def test_it_never_becomes_a_numpy_array_by_itself(self) -> None:
        with pytest.raises(DeviceError, match=r"Call numpy\(\)"):
            np.asarray(ops.to_device(normal(2)))

    @pytest.mark.parametrize("version", [None, (1, 0)], ids=str)
    def test_a_producer_is_told_our_stream_and_its_memory_is_used_and_freed_once(self, version: Any) -> None:
        x = normal(4, 16)
        theirs = of_gpu(x, version=version)
        taken = ops.from_dlpack(theirs)
        assert isinstance(taken, ops.DeviceArray)
        assert address_of(taken) == theirs.address
        stream = theirs.asked[-1]["stream"]
        assert isinstance(stream, int)
        assert stream > 2
        again = taken.reshape((2, 32))
        del taken
        gc.collect()
        assert theirs.deleted == 0, "another array has the memory"
        np.testing.assert_array_equal(again.numpy(), x.reshape(2, 32))
        capsule = again.__dlpack__()
        del again
        gc.collect()
        assert theirs.deleted == 0, "a capsule has the memory"
        del capsule
        gc.collect()
        assert theirs.deleted == 1

    @pytest.mark.parametrize("max_version", [None, (0, 8), (1, 0), (1, 5), (2, 0)], ids=str)
    def test_a_consumer_gets_what_it_can_read_and_keeps_the_memory(self, max_version: Any) -> None:
        x = normal(3, 5)
        there = ops.to_device(x)
        capsule = there.__dlpack__(stream=1, max_version=max_version)
        versioned = max_version is not None and max_version[0] >= 1
        assert name_of(capsule) == ("dltensor_versioned" if versioned else "dltensor")
        managed = consume(capsule)
        del there, capsule
        gc.collect()
        tensor = managed.tensor
        assert (tensor.rank, tensor.shape[0], tensor.shape[1], tensor.strides[0], tensor.strides[1]) == (2, 3, 5, 5, 1)
        assert (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) == (2, 32, 1)
        assert (tensor.device.type, tensor.device.index) == ON_GPU
        if versioned:
            assert (managed.major, managed.flags) == (1, 0)
        shown = Producer(tensor.data, (3, 5), device=ON_GPU)
        np.testing.assert_array_equal(host(ops.from_dlpack(shown)), x)
        delete(managed)

    @pytest.mark.skipif(not IS_EMULATED, reason="the emulator alone says what is allocated")
    def test_memory_is_given_back_when_the_last_owner_goes_whoever_it_is(self) -> None:
        there = ops.to_device(normal(1000))
        address = address_of(there)
        managed = consume(there.__dlpack__(max_version=(1, 0)))
        del there
        gc.collect()
        # From a thread that has nothing to do with Python's.
        thread = threading.Thread(target=delete, args=(managed,))
        thread.start()
        thread.join()
        with pytest.raises(Exception, match="memory"):
            host(ops.from_dlpack(Producer(address, (1000,), device=ON_GPU)))

    @pytest.mark.parametrize("stream", [None, -1, 1, 2, 4096])
    def test_any_stream_of_cuda_may_wait_for_it(self, stream: int | None) -> None:
        assert ops.to_device(normal(2)).__dlpack__(stream=stream) is not None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"stream": 0}, "stream 0 is none"),
            ({"stream": -2}, "stream -2 is none"),
            ({"stream": "x"}, "stream must be a whole number"),
            ({"max_version": 1}, "max_version must be a pair"),
            ({"dl_device": (2, 1)}, r"dl_device is \(2, 1\)"),
            ({"dl_device": (1, 0), "copy": False}, "copy=False"),
        ],
    )
    def test_what_it_cannot_do_is_the_protocols_own_error(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(BufferError, match=message):
            ops.to_device(normal(2)).__dlpack__(**options)

    def test_a_copy_is_other_memory_and_says_so(self) -> None:
        there = ops.to_device(normal(4))
        copied = tensor_in(there.__dlpack__(copy=True, max_version=(1, 0)))
        assert copied.flags == 2
        assert copied.tensor.data != address_of(there)
        assert tensor_in(there.__dlpack__(copy=False)).tensor.data == address_of(there)

    def test_read_only_memory_is_not_written_to_nor_given_to_who_could_not_know(self) -> None:
        theirs = of_gpu(normal(2, 8), flags=1)
        taken = ops.from_dlpack(theirs)
        assert not taken.writable  # type: ignore[union-attr]
        with pytest.raises(BufferError, match="read-only"):
            taken.__dlpack__()
        assert tensor_in(taken.__dlpack__(max_version=(1, 0))).flags == 1
        with pytest.raises(DTypeError, match="out must be a writable float32 array, got read-only float32"):
            ops.softmax(ops.to_device(normal(2, 8)), out=theirs)
        with pytest.raises(DTypeError, match="parameter must be a writable float32 array, got read-only"):
            ops.sgd(theirs, ops.to_device(normal(2, 8)), lr=0.1)

    def test_rows_with_a_stride_and_an_offset_are_taken_where_they_are(self) -> None:
        wide = normal(7, 20)
        theirs = of_gpu(wide, shape=(7, 9), strides=(20, 1), byte_offset=12)
        shown = wide[:, 3:12]
        y = ops.softmax(theirs)
        assert isinstance(y, ops.DeviceArray)
        expected = np.exp(shown.astype(np.float64))
        np.testing.assert_allclose(y.numpy(), expected / expected.sum(1, keepdims=True), rtol=1e-5)
        weight = normal(5, 9, seed=2)
        product = ops.matmul(theirs, ops.pack(weight, device="cuda"))
        np.testing.assert_allclose(host(product), shown.astype(np.float64) @ weight.T.astype(np.float64), atol=1e-5)
        np.testing.assert_array_equal(host(ops.from_dlpack(theirs).contiguous()), shown)  # type: ignore[union-attr]

    def test_other_strides_are_an_error_that_names_the_array_and_the_way_out(self) -> None:
        wide = normal(6, 8)
        for shape, strides in [((3, 4), (1, 8)), ((3, 4), (8, 2)), ((6, 8), (0, 1)), ((2, 3, 4), (8, 4, 1))]:
            with pytest.raises(ShapeError, match=r"softmax: x must be .*Call contiguous\(\) on it: x.contiguous\(\)"):
                ops.softmax(of_gpu(wide, shape=shape, strides=strides))
        backwards = of_gpu(wide, shape=(2, 8), strides=(-8, 1), byte_offset=32)
        with pytest.raises(ShapeError, match="negative stride"):
            ops.softmax(backwards)
        capsule = backwards.__dlpack__(max_version=(1, 0))
        with pytest.raises(ShapeError, match="negative stride"):
            _core.from_dlpack(capsule, ops.backends.backend_for("cuda", None, None), "x")
        assert name_of(capsule) == "dltensor_versioned", "it is its owner's still"
        with pytest.raises(ShapeError, match=r"rms_norm: weight must be C-contiguous.*weight.contiguous\(\)"):
            ops.rms_norm(ops.to_device(normal(2, 4)), of_gpu(wide, shape=(4,), strides=(8,)))
        # One that no operation takes is still readable.
        turned = of_gpu(wide, shape=(8, 6), strides=(1, 8))
        np.testing.assert_array_equal(host(ops.from_dlpack(turned)), wide.T)

    def test_an_array_without_elements_may_have_any_other_extents(self) -> None:
        backend = ops.backends.backend_for("cuda", None, None)
        empty = backend.device_array(np.zeros((0, 4), np.float32), "float32")
        assert np.asarray(empty.numpy()).shape == (0, 4)
        huge = of_gpu(np.zeros((0, 4), np.float32), shape=(0, 2**40, 2**40))
        assert ops.from_dlpack(huge).shape == (0, 2**40, 2**40)

    def test_arrays_on_different_devices_are_an_error_that_says_where_they_are(self) -> None:
        x, weight = normal(2, 8), normal(4, 8)
        there = ops.to_device(x)
        with pytest.raises(DeviceError, match=r"matmul: weight is on cpu, expected cuda:0, where x is\. Move it"):
            ops.matmul(there, weight)
        with pytest.raises(DeviceError, match=r"matmul: x is on cpu, expected cuda:0, where bias is"):
            ops.matmul(x, ops.pack(weight, device="cuda"), ops.to_device(normal(4)))
        with pytest.raises(DeviceError, match=r"matmul: weight is packed for cpu, expected cuda:0, where x is"):
            ops.matmul(there, ops.pack(weight))
        with pytest.raises(DeviceError, match="softmax: out is on cpu, expected cuda:0"):
            ops.softmax(there, out=np.empty_like(x))
        with pytest.raises(DeviceError, match="softmax: out is on cuda:0, expected cuda:1, where x is"):
            ops.softmax(Producer(4096, (2, 8), device=(2, 1)), out=there)
        with pytest.raises(DeviceError, match="the arrays are on cuda:0, expected device='reference'"):
            ops.softmax(there, device="reference")
        assert host(ops.softmax(there, device="cuda")).shape == (2, 8)

    def test_the_core_itself_refuses_memory_of_another_device(self) -> None:
        there = ops.to_device(normal(2, 8))
        with pytest.raises(DeviceError, match="an array is on cuda:0, expected cpu"):
            _core.Backend("cpu").softmax(there, there)  # type: ignore[arg-type]
        backend = _core.Backend("cuda")
        ids, table = ops.to_device(np.zeros(2, np.int32)), backend.zero_matrix(2, 8)
        with pytest.raises(DTypeError, match="ids must be a NumPy array"):
            backend.embedding(ids, table, there)  # type: ignore[arg-type]

    def test_another_element_type_is_an_error(self) -> None:
        with pytest.raises(DTypeError, match="softmax: x must be float32, got float64"):
            ops.softmax(ops.to_device(np.zeros((2, 2))))
        with pytest.raises(DTypeError, match="cannot be uint32"):
            ops.to_device(np.zeros(3, np.uint32))
        with pytest.raises(DTypeError, match=r"embedding: ids must be a NumPy array of integers, .* got float32"):
            ops.embedding(ops.to_device(normal(3)), ops.pack(normal(4, 8), device="cuda"))

    @pytest.mark.parametrize("columns", [32, 33])
    def test_gradients_of_weights_are_what_an_optimiser_takes(self, columns: int) -> None:
        d_y, x, weight = normal(4, 7), normal(4, columns), normal(7, columns)
        on_gpu = [ops.to_device(each) for each in (d_y, x, weight.copy())]
        _, d_weight, _ = ops.matmul_backward(on_gpu[0], x=on_gpu[1])
        ops.sgd(on_gpu[2], d_weight, lr=0.5)
        np.testing.assert_allclose(host(on_gpu[2]), weight - 0.5 * d_y.T @ x, rtol=1e-5, atol=1e-5)

    def test_weights_of_a_gpu_are_packed_for_it(self) -> None:
        weight = normal(6, 64)
        bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
        rounded = (bits.astype(np.uint32) << 16).view(np.float32)
        packed = ops.pack(ops.to_device(weight), "float32")
        assert packed.device == GPU
        np.testing.assert_array_equal(packed.to_array(), weight)
        theirs = of_gpu(bits.view(np.float16), dtype=(4, 16, 1))
        for dtype in ("bfloat16", "float32"):
            np.testing.assert_array_equal(ops.pack(theirs, dtype).to_array(), rounded)
        half = ops.pack(ops.to_device(weight.astype(np.float16)), "float16")
        np.testing.assert_array_equal(half.to_array(), weight.astype(np.float16).astype(np.float32))

    def test_out_is_the_callers_memory(self) -> None:
        x = normal(3, 16)
        out = of_gpu(np.full((3, 16), np.nan, np.float32))
        assert ops.softmax(ops.to_device(x), out=out) is out
        np.testing.assert_array_equal(host(ops.from_dlpack(out)), ops.softmax(x, device="cuda"))
        there = of_gpu(x)
        assert ops.softmax(there, out=there) is there
        np.testing.assert_array_equal(host(ops.from_dlpack(there)), ops.softmax(x, device="cuda"))
        strided = of_gpu(np.zeros((3, 20), np.float32), shape=(3, 16), strides=(20, 1))
        ops.softmax(ops.to_device(x), out=strided)
        np.testing.assert_array_equal(host(ops.from_dlpack(strided)), ops.softmax(x, device="cuda"))

    def test_torch_takes_the_memory(self) -> None:
        torch = pytest.importorskip("torch", reason="torch is not installed, nor needed otherwise")
        if IS_EMULATED:
            copied = torch.utils.dlpack.from_dlpack(ops.to_device(normal(3)).__dlpack__(dl_device=(1, 0)))
            np.testing.assert_array_equal(copied.numpy(), normal(3))
            return
        x = torch.randn(5, 64, device="cuda")
        y = torch.from_dlpack(ops.rms_norm(x, torch.ones(64, device="cuda"), 1e-6))
        expected = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
        torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
        assert y.device == x.device


@pytest.mark.gpu
@requires_cuda
@pytest.mark.skipif(not IS_EMULATED, reason="the emulator's memory can be small")
def test_nothing_leaks_whoever_had_it_and_whatever_went_wrong() -> None:
    script = """
        import numpy as np
        import llama_ext
        from dlpack_capsules import Producer, address_of, consume, delete
        from llama_ext import ops

        x = np.ones((50, 100), np.float32)  # 20 kB
        def work():
            for _ in range(25):
                there = ops.to_device(x)
                there.__dlpack__(max_version=(1, 0))  # never consumed
                there.__dlpack__(copy=True)
                delete(consume(there.__dlpack__(copy=True, max_version=(1, 0))))
                theirs = Producer(address_of(there), x.shape, device=(2, 0), keep=there)
                ops.softmax(theirs, out=theirs)
                ops.matmul_backward(theirs, x=theirs)
                ops.from_dlpack(there)
                for bad in ({"dtype": (1, 32, 1)}, {"version": (9, 0)}, {"strides": (1, 50)}):
                    refused = Producer(address_of(there), x.shape, device=(2, 0), **bad)
                    try:
                        ops.softmax(refused)
                    except llama_ext.LlamaExtError:
                        pass
                    else:
                        raise AssertionError(bad)
                    assert refused.deleted == len(refused.asked) == 1
                assert theirs.deleted == 2, theirs.deleted  # an operation each
        work()
        print("done")
    """
    assert run_script(script, LLAMA_EXT_CUDA_EMULATION_MEMORY="350000") == "done\n"
