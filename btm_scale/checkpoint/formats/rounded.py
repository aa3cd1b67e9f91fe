"""Round weights once, and count what rounding and inputs leave that is not a number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, code_of, dtype_name, dtype_of
from btm_scale.errors import few_names
from btm_scale.util.imports import torch

# Of each dtype, the integers of its size and the mask of its exponent.
EXPONENTS = {
    "F16": ("I16", 0x7C00),
    "BF16": ("I16", 0x7F80),
    "F32": ("I32", 0x7F800000),
    "F64": ("I64", 0x7FF << 52),
}
Counts = tuple[int, int, int]  # NaN, infinities of an input, infinities that rounding made


@dataclass(frozen=True)
class NonFinite:
    """Elements of an output that are not finite, in all and by tensor."""

    nan: int = 0
    infinite: int = 0
    overflowed: int = 0  # those of the infinities that are finite before rounding
    tensors: tuple[str, ...] = ()

    @classmethod
    def total(cls, counted: Mapping[str, Iterable[Counts]]) -> Self:
        """Sum the counts of parts of tensors, by the tensor's name."""
        rows = [row for rows in counted.values() for row in rows]
        nan, infinite, overflowed = (sum(row[i] for row in rows) for i in range(3))
        return cls(nan, infinite + overflowed, overflowed, tuple(sorted(name for name in counted)))

    def __bool__(self) -> bool:
        return bool(self.nan or self.infinite)

    def message(self, output: object, dtype: torch.dtype | None) -> str:
        """Return what a user should know of an output that has such elements."""
        parts = [f"{self.nan:,} NaN, from an input"] if self.nan else []
        if self.infinite > self.overflowed:
            parts.append(f"{self.infinite - self.overflowed:,} infinities, from an input")
        if self.overflowed:
            target = f"rounding to {dtype_name(dtype)}" if dtype is not None else "rounding"
            parts.append(f"{self.overflowed:,} infinities, made by {target}")
        remedy = "Choose a --dtype with a larger range." if self.overflowed else "Check the inputs."
        return f"{output} has {' and '.join(parts)}: in {few_names(self.tensors, 'tensors')}. {remedy}"


ALL_FINITE = NonFinite()


def count_nonfinite(exact: torch.Tensor, rounded: torch.Tensor) -> Counts | None:
    """Return the counts of a piece and of its rounded copy; None, after one fast pass, if all elements are finite."""
    if not rounded.numel() or not rounded.is_floating_point() or _is_finite(exact, rounded):
        return None
    wide, narrow = exact.reshape(-1).float() if exact.element_size() < 4 else exact.reshape(-1), rounded.reshape(-1)
    narrow = narrow.float() if narrow.element_size() < 2 else narrow
    infinite = int(narrow.isinf().sum())
    overflowed = int((narrow.isinf() & wide.isfinite()).sum())
    counts = int(narrow.isnan().sum()), infinite - overflowed, overflowed
    return counts if any(counts) else None


def _is_finite(exact: torch.Tensor, rounded: torch.Tensor) -> bool:
    """Whether all elements are surely finite; False if that is not known yet."""
    if exact.dtype is torch.float64 and exact.is_contiguous():
        # A product with itself is a fraction of the time of any comparison, and bounds every element.
        flat = exact.reshape(-1)
        limit = min(torch.finfo(rounded.dtype).max, 1e150)
        return float(torch.dot(flat, flat)) < limit * limit
    if (code := code_of(rounded.dtype)) not in EXPONENTS:
        return False
    words, mask = EXPONENTS[code]
    bits = rounded.reshape(-1).view(dtype_of(words)).bitwise_and(mask)
    return int(bits.max()) < mask


class RoundedModel(ModelReader):
    """A model in one floating-point dtype, or in its own for None; each read counts what is not finite."""

    def __init__(self, model: ModelReader, dtype: torch.dtype | None) -> None:
        self.path, self._model, self._to = model.path, model, dtype
        self._counts: dict[tuple[str, int, int], Counts] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return self._model.names

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype after rounding, and its shape."""
        spec = self._model.spec(name)
        return TensorSpec(self._to, spec.shape) if self._to and spec.is_floating_point else spec

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`, rounded once."""
        exact = self._model.exact_dtype(name)
        source = out if exact == out.dtype else torch.empty(out.numel(), dtype=exact)
        self._model.read_into(name, start, source)
        if source is not out:
            out.copy_(source)
        if counts := count_nonfinite(source, out):
            self._counts[name, start, out.numel()] = counts

    def close(self) -> None:
        """Close the model."""
        self._model.close()

    @property
    def nonfinite(self) -> NonFinite:
        """What was read so far that is not finite."""
        by_name: dict[str, list[Counts]] = {}
        for (name, _, _), counts in self._counts.items():
            by_name.setdefault(name, []).append(counts)
        return NonFinite.total(by_name)
