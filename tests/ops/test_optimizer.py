"""adam and sgd: step by step against float64, with every option."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import numpy_training
from devices import REFERENCE, Device, all_devices, each_isa
from guarded import guarded
from llama_ext import DTypeError, OptionError, ShapeError
from tolerances import TINY, assert_same_bits, assert_within, units

Array = npt.NDArray[Any]

SIZES = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 1023, 4099, 20011]

ADAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decoupled": {"weight_decay": 0.1},
    "l2": {"weight_decay": 0.1, "decoupled": False},
    "scaled": {"gradient_scale": 0.25, "weight_decay": 0.01},
    "betas": {"betas": (0.9, 0.95), "eps": 1e-6},
    "no-memory": {"betas": (0.0, 0.0), "eps": 1e-3},
}
SGDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"weight_decay": 0.1},
    "all": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05, "gradient_scale": 0.5},
}


def make_problem(size: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(size)
    # Gradients of very different size.
    gradients = rng.standard_normal((5, size)) * 10.0 ** rng.uniform(-6, 1, size)
    return rng.standard_normal(size).astype(np.float32), gradients.astype(np.float32)


def run_adam(device: Device, state: list[Array], gradient: Array, step: int, lr: float, **options: Any) -> None:
    """Changes parameter, first and second."""
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    device.backend.adam(
        state[0],
        guarded(gradient),
        state[1],
        state[2],
        step,
        lr,
        beta1,
        beta2,
        options.get("eps", 1e-8),
        options.get("weight_decay", 0.0),
        options.get("decoupled", True),
        options.get("gradient_scale", 1.0),
    )


def run_sgd(
    device: Device, parameter: Array, gradient: Array, velocity: Array | None, lr: float, **options: Any
) -> None:
    device.backend.sgd(
        parameter,
        guarded(gradient),
        velocity,
        lr,
        options.get("momentum", 0.0),
        options.get("weight_decay", 0.0),
        options.get("nesterov", False),
        options.get("gradient_scale", 1.0),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ADAMS)
@all_devices
def test_a_step_of_adam_matches_float64(device: Device, name: str, size: int) -> None:
    options = ADAMS[name]
    parameter, gradients = make_problem(size)
    state = [guarded(parameter), guarded(np.zeros_like(parameter)), guarded(np.zeros_like(parameter))]
    for step, gradient in enumerate(gradients, start=1):
        # From the state in float32, so that each step is judged by itself.
        before = [each.astype(np.float64) for each in state]
        expected = numpy_training.adam_step(
            before[0], gradient.astype(np.float64), before[1], before[2], step=step, lr=0.01, **options
        )
        run_adam(device, state, gradient, step, 0.01, **options)
        beta1, beta2 = options.get("betas", (0.9, 0.999))
        g = options.get("gradient_scale", 1.0) * np.abs(gradient.astype(np.float64))
        if not options.get("decoupled", True):
            g = g + options["weight_decay"] * np.abs(before[0])
        means = beta1 * np.abs(before[1]) + (1 - beta1) * g
        squares = beta2 * before[2] + (1 - beta2) * g**2
        root = np.sqrt(expected[2] / (1 - beta2**step)) + options.get("eps", 1e-8)
        # An error of g is one of its square, where L2 makes it a difference.
        moved = (
            0.01 / (1 - beta1**step) * (means / root + np.abs(expected[1]) / root * squares / (expected[2] + 1e-300))
        )
        for what, found, wanted, scale in zip(
            ("parameter", "first", "second"), state, expected, (np.abs(before[0]) + moved, means, squares), strict=True
        ):
            assert_within(found, wanted, units("optimizer") * scale + TINY, f"{what} of step {step}")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SGDS)
@all_devices
def test_a_step_of_sgd_matches_float64(device: Device, name: str, size: int) -> None:
    options = SGDS[name]
    parameter, gradients = make_problem(size)
    found, velocity = guarded(parameter), guarded(np.zeros_like(parameter))
    for step, gradient in enumerate(gradients, start=1):
        before, speed = found.astype(np.float64), velocity.astype(np.float64)
        expected = numpy_training.sgd_step(before, gradient.astype(np.float64), speed, lr=0.01, **options)
        run_sgd(device, found, gradient, velocity, 0.01, **options)
        g = options.get("gradient_scale", 1.0) * np.abs(gradient.astype(np.float64))
        g = g + options.get("weight_decay", 0.0) * np.abs(before)
        scale = 2 * g + np.abs(speed)
        assert_within(velocity, expected[1], units("optimizer") * scale + TINY, f"velocity of step {step}")
        assert_within(found, expected[0], units("optimizer") * (np.abs(before) + 0.01 * scale) + TINY, f"step {step}")


@pytest.mark.parametrize("name", ["plain", "decay"])
@all_devices
def test_sgd_without_momentum_needs_no_velocity(device: Device, name: str) -> None:
    parameter, gradients = make_problem(129)
    without, beside, velocity = guarded(parameter), guarded(parameter), guarded(np.zeros_like(parameter))
    for gradient in gradients:
        run_sgd(device, without, gradient, None, 0.1, **SGDS[name])
        run_sgd(device, beside, gradient, velocity, 0.1, **SGDS[name])
    assert_same_bits(without, beside)


@pytest.mark.parametrize("name", ADAMS)
@all_devices
def test_a_hundred_steps_of_adam_stay_near_float64(device: Device, name: str) -> None:
    rng = np.random.default_rng(3)
    parameter = rng.standard_normal(65).astype(np.float32)
    state = [guarded(parameter), guarded(np.zeros_like(parameter)), guarded(np.zeros_like(parameter))]
    exact = [parameter.astype(np.float64), np.zeros(65), np.zeros(65)]
    for step in range(1, 101):
        gradient = (rng.standard_normal(65) + parameter).astype(np.float32)
        run_adam(device, state, gradient, step, 0.01, **ADAMS[name])
        exact = list(
            numpy_training.adam_step(
                exact[0], gradient.astype(np.float64), *exact[1:], step=step, lr=0.01, **ADAMS[name]
            )
        )
    assert_within(state[0], exact[0], 3e-6)


@all_devices
def test_the_first_step_of_adam_is_the_learning_rate_against_the_sign(device: Device) -> None:
    state = [guarded(np.zeros(33, np.float32)) for _ in range(3)]
    gradient = np.where(np.arange(33) % 2, 1e-3, -7.0).astype(np.float32)
    run_adam(device, state, gradient, 1, 0.5, eps=0.0)
    assert_within(state[0], -0.5 * np.sign(gradient.astype(np.float64)), 1e-6)


@all_devices
def test_a_gradient_of_zero_moves_nothing(device: Device) -> None:
    parameter, _ = make_problem(65)
    state = [guarded(parameter), guarded(np.zeros_like(parameter)), guarded(np.zeros_like(parameter))]
    run_adam(device, state, np.zeros_like(parameter), 1, 0.1)
    assert_same_bits(state[0], parameter)
    assert (np.array(state[1:]) == 0).all()


@each_isa
def test_steps_have_the_same_bits_with_any_threads(isa: str) -> None:
    parameter, gradients = make_problem(100003)
    results = []
    for threads in (1, 2, 3):
        device = Device(isa, threads)
        state = [parameter.copy(), np.zeros_like(parameter), np.zeros_like(parameter)]
        other, velocity = parameter.copy(), np.zeros_like(parameter)
        for step, gradient in enumerate(gradients, start=1):
            run_adam(device, state, gradient, step, 0.01, weight_decay=0.1)
            run_sgd(device, other, gradient, velocity, 0.01, **SGDS["all"])
        results.append([*state, other, velocity])
    for result in results[1:]:
        for ours, theirs in zip(result, results[0], strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize("size", [0, 1, 7, 1000, 100003])
@all_devices
def test_sum_of_squares_is_that_of_float64(device: Device, size: int) -> None:
    _, gradients = make_problem(size)
    expected = float((gradients[0].astype(np.float64) ** 2).sum())
    assert device.backend.sum_of_squares(guarded(gradients[0])) == pytest.approx(expected, rel=1e-13)
    # Numbers whose squares overflow and vanish in float32.
    assert device.backend.sum_of_squares(np.array([1e30, 1e-30], np.float32)) == pytest.approx(1e60, rel=1e-6)


@each_isa
def test_sum_of_squares_has_the_same_bits_with_any_threads(isa: str) -> None:
    x = np.random.default_rng(4).standard_normal(1_000_003).astype(np.float32)
    assert len({Device(isa, threads).backend.sum_of_squares(x) for threads in (1, 2, 3)}) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": 0},
        {"step": -1},
        {"lr": float("nan")},
        {"beta1": 1.0},
        {"beta1": -0.1},
        {"beta2": 1.0},
        {"beta2": float("nan")},
        {"eps": -1e-8},
        {"eps": float("inf")},
        {"decay": float("inf")},
        {"gradient_scale": float("nan")},
        # Finite, but not in float32, which kernels compute in.
        {"lr": 1e300},
        {"lr": -1e39},
        {"lr": 1e38, "beta1": 0.999},
        {"lr": 1e20, "decay": 1e20},
        {"eps": 1e-60},
        {"eps": 1e39},
        {"decay": 1e39},
        {"gradient_scale": 1e39},
    ],
    ids=str,
)
@all_devices
def test_adam_refuses_numbers_out_of_range(device: Device, wrong: dict[str, Any]) -> None:
    arrays = [np.zeros(3, np.float32) for _ in range(4)]
    with pytest.raises(OptionError):
        device.backend.adam(*arrays, **{"step": 1, "lr": 0.1, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": float("inf")},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"decay": float("nan")},
        {"gradient_scale": float("inf")},
        {"lr": 1e300},
        {"decay": 1e39},
        {"gradient_scale": 1e39},
    ],
    ids=str,
)
@all_devices
def test_sgd_refuses_numbers_out_of_range(device: Device, wrong: dict[str, Any]) -> None:
    arrays = [np.zeros(3, np.float32) for _ in range(3)]
    with pytest.raises(OptionError):
        device.backend.sgd(*arrays, **{"lr": 0.1, **wrong})


@all_devices
def test_steps_refuse_arrays_that_do_not_fit(device: Device) -> None:
    backend = device.backend
    parameter, gradient, first, second = (np.zeros(3, np.float32) for _ in range(4))
    with pytest.raises(ShapeError, match="gradient"):
        backend.adam(parameter, np.zeros(4, np.float32), first, second, 1, 0.1)
    with pytest.raises(ShapeError, match="second"):
        backend.adam(parameter, gradient, first, np.zeros(2, np.float32), 1, 0.1)
    with pytest.raises(DTypeError):
        backend.adam(parameter.astype(np.float64), gradient, first, second, 1, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="velocity"):
        backend.sgd(parameter, gradient, None, 0.1, 0.9)
    with pytest.raises(ShapeError, match="gradient"):
        backend.sgd(parameter, np.zeros(4, np.float32), None, 0.1)
    assert REFERENCE.backend.sum_of_squares(parameter) == 0
    with pytest.raises(DTypeError):
        backend.sum_of_squares(parameter.astype(np.float64))  # type: ignore[arg-type]
