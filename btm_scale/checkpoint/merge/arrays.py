"""What elementwise merge methods need of torch tensors and NumPy arrays alike, with the same bits from both."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from btm_scale.util.imports import torch

if TYPE_CHECKING:
    import numpy as np

_Array = TypeVar("_Array")
_SPLIT = 134217729.0  # 2**27 + 1: splits the 53 bits of a float64 into two halves whose products are exact


def _is_numpy(array: object) -> bool:
    return type(array).__module__ == "numpy"  # without importing NumPy for torch tensors


def copied(array: _Array) -> _Array:
    """Return a copy."""
    either: Any = array
    copy: _Array = either.copy() if _is_numpy(array) else either.clone()
    return copy


def as_numbers(mask: _Array) -> _Array:
    """Return a boolean mask as float64: 1 where it is true and 0 elsewhere."""
    either: Any = mask
    numbers: _Array = either.astype("float64") if _is_numpy(mask) else either.double()
    return numbers


def add_weighted(total: Any, weight: float, array: Any) -> None:
    """Add `weight * array` to `total`, all float64, and round once. Raises `OverflowError` for extreme NumPy values."""
    if _is_numpy(total):
        _add_product(total, weight, array)
    else:
        add_outer(total[None], _as_tensor(weight), array)


@lru_cache(maxsize=1024)
def _as_tensor(weight: float) -> torch.Tensor:
    return torch.tensor([weight], dtype=torch.float64)


def add_outer(totals: torch.Tensor, weights: torch.Tensor, tensor: torch.Tensor) -> None:
    """Add the outer product of `weights` [outputs] and `tensor` [elements] to `totals` [outputs, elements].

    All are float64. An element's result does not depend on the number of outputs and elements.
    """
    totals.addcmul_(weights[:, None], tensor)


def _add_product(total: np.ndarray, weight: float, array: np.ndarray) -> None:
    """Emulate a fused multiply-add, which torch's `addcmul_` uses on every processor that has one.

    Raises `OverflowError` for values or weights so extreme that the split product would not be exact, and for NaN.
    By Boldo and Melquiond, "Emulation of FMA and correctly rounded sums" (2008): the product is split exactly, and
    the sum of three numbers is rounded once because the sum of its two small ones is rounded to odd.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        largest = float(np.abs(array).max(initial=0.0))
        if not (largest * abs(weight) < 1e250 and largest < 1e250 and (not weight or 1e-100 < abs(weight) < 1e100)):
            raise OverflowError("the exact product of these values cannot be computed")
        product = array * weight
        high, low = _halves(array)
        weight_high, weight_low = (float(half) for half in _halves(weight))
        rest = ((high * weight_high - product) + high * weight_low + low * weight_high) + low * weight_low
        small, small_rest = _exact_sum(total, rest)
        large, large_rest = _exact_sum(product, small)
        fused = large + _rounded_to_odd(small_rest, large_rest)
        # The sum of an exact product keeps the sign of its zeros.
        np.copyto(total, np.where(rest == 0, total + product, fused))


def _halves(value: Any) -> tuple[Any, Any]:
    """Split float64 numbers into a high half of 26 bits and the rest (Veltkamp)."""
    scaled = value * _SPLIT
    high = scaled - (scaled - value)
    return high, value - high


def _exact_sum(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounded sum and what rounding lost (Knuth)."""
    total = one + other
    part = total - one
    return total, (one - (total - part)) + (other - part)


def _rounded_to_odd(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the sum; where it is not exact, the one of its two neighbours whose last bit is 1."""
    total, lost = _exact_sum(one, other)
    bits = total.view("int64")
    step = ((lost > 0) == (total > 0)) * 2 - 1
    bits += step * ((lost != 0) & (bits & 1 == 0))
    return total
