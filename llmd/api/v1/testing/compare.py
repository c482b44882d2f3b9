"""How close two tensors must be, told in words when they are not."""

from __future__ import annotations

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def require_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """AssertionError unless shapes agree and the relative error is at most `tolerance`; NaN is never close."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}; expected: {tuple(expected.shape)}")
    error = relative_error(actual, expected)
    if not error <= tolerance:
        raise AssertionError(f"{what}: relative error {error:.2g}; allowed: {tolerance:g}")


def require(holds: bool, message: str) -> None:
    """AssertionError with the message unless it holds; unlike `assert`, python -O keeps it."""
    if not holds:
        raise AssertionError(message)
