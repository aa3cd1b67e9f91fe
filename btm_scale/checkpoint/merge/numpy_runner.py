"""Merge small models, and copy tensors of any size, with NumPy instead of torch. The bytes are the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from threading import Lock, local
from typing import Any

import numpy as np

from btm_scale.checkpoint.formats.rounded import EXPONENTS
from btm_scale.checkpoint.formats.tensors import FP8, ModelReader
from btm_scale.checkpoint.hashing import BlockHashes
from btm_scale.checkpoint.merge.moe import drawn
from btm_scale.checkpoint.merge.noise import uniform
from btm_scale.checkpoint.merge.plan import MergePlan, Unit
from btm_scale.checkpoint.merge.registry import Piece
from btm_scale.checkpoint.merge.runner import Target, UnitRunner, kept_hash, parts_of
from btm_scale.util.one_thread import one_torch_thread

MOST_BYTES = 32 << 20  # of all inputs; larger merges are faster with torch, its import included
_NARROW = ("F32", "F16", "BF16")  # whose products with a float64 weight do not underflow
_FLOATS = ("F64", *_NARROW)


def without_torch(target: Target) -> frozenset[str]:
    """Return the tensors that are merged without torch: all of a small merge, or those that are copied or drawn.

    Empty for a small merge in which another tensor needs torch, since the process imports it anyway.
    """
    names = [name for name in target.plan.specs if _has_numpy_method(target, name)]
    if target.plan.bytes_read <= MOST_BYTES:
        return frozenset(names if len(names) == len(target.plan.specs) else [])
    return frozenset(name for name in names if is_copied_or_drawn(target.plan, name))


def is_copied_or_drawn(plan: MergePlan, name: str) -> bool:
    """Whether a tensor needs no sums. Float8, whose numbers torch counts, is left out."""
    return plan.specs[name].code not in FP8 and (plan.copies(name) or not plan.how(name).models)


def torch_is_loaded() -> bool:
    """Return whether this process has imported torch already, so that NumPy would save no time."""
    return "torch" in sys.modules


def _has_numpy_method(target: Target, name: str) -> bool:
    plan = target.plan
    how, code = plan.how(name), plan.specs[name].code
    if not how.models:  # a tensor that a mixture adds
        return code in _FLOATS
    read = [*zip(how.models, how.names, strict=True), *([how.base] if how.base else [])]
    if any(target.everyone[model].needs_torch for model, _ in read):
        return False
    codes = {target.everyone[model].spec(own).code for model, own in read}
    if plan.copies(name):
        return codes <= set(_FLOATS) if code in _FLOATS else codes == {code} and not plan.specs[name].is_floating_point
    return how.method.elementwise and code in _FLOATS and codes <= set(_NARROW)


class NumpyRunner:
    """Merges, writes and hashes one unit of a tensor in `without_torch`; thread-safe.

    Units with NaN or infinities are left to torch, which counts them.
    """

    def __init__(self, target: Target, chunk_bytes: int) -> None:
        self.targets, self.chunk_bytes = [target], chunk_bytes
        self._target = target
        self._memory = local()
        self._by_torch = Lock()  # the number of torch's threads is the process's

    def __call__(self, unit: Unit) -> tuple[Unit, list[list[str]]]:
        """Return the unit and its block hashes."""
        hashes, kept = BlockHashes(), kept_hash(self._target, unit)
        for part in parts_of(unit, self.chunk_bytes // self._target.plan.specs[unit.name].itemsize):
            data = self._merged(part)
            if data is None:
                with self._by_torch, one_torch_thread():
                    return UnitRunner(self._target, self.chunk_bytes)(unit)
            self._target.writer.write_bytes(unit.name, part.start, data)
            if kept is None:
                hashes.update(data)
        return unit, [hashes.finished() if kept is None else [kept]]

    def _merged(self, part: Unit) -> memoryview | None:
        """Return the bytes of a part of the output; None if torch must compute it."""
        plan, models = self._target.plan, self._target.everyone
        how, spec = plan.how(part.name), plan.specs[part.name]
        with np.errstate(all="ignore"):
            if not how.models:
                exact = drawn(how.weights[0], plan.seed, part.name, part.start, part.stop)
            elif plan.copies(part.name):
                model, name = models[how.models[0]], how.names[0]
                code = model.spec(name).code
                data = self._bytes((part.stop - part.start) * model.spec(name).itemsize)
                model.read_bytes_into(name, part.start, data)
                if code == spec.code:
                    return data if not spec.is_floating_point or _is_finite(data, code) else None
                exact = widened(data, code)
            else:
                try:
                    exact = how.method.function(_piece(plan, models, part), **how.parameters)
                except OverflowError:
                    return None
            rounded = narrowed(exact, spec.code)
        # Infinities that rounding makes are counted too.
        return rounded.data.cast("B") if np.isfinite(widened(rounded.data, spec.code)).all() else None

    def _bytes(self, size: int) -> memoryview:
        """Return a buffer that this thread reuses: to allocate it takes longer than to copy into it."""
        data: memoryview | None = getattr(self._memory, "data", None)
        if data is None or len(data) < size:
            self._memory.data = data = memoryview(bytearray(size))
        return data[:size]


def _is_finite(data: memoryview, code: str) -> bool:
    """Return whether all floating-point numbers of a dtype are finite, which their largest bit patterns show."""
    size, exponent = int(EXPONENTS[code][0][1:]) // 8, EXPONENTS[code][1]
    if not data:
        return True
    positive, negative = (int(np.frombuffer(data, f"<{kind}{size}").max()) for kind in "iu")
    return positive < exponent and negative < exponent | 1 << (8 * size - 1)


def _piece(plan: MergePlan, models: Sequence[ModelReader], part: Unit) -> Piece:
    """Return a part of every model as a piece of NumPy arrays, which elementwise methods accept as well as tensors."""
    how = plan.how(part.name)

    def read(model: int, name: str) -> Any:
        return widened(models[model].read_bytes(name, part.start, part.stop), models[model].spec(name).code)

    def noise(i: int) -> Any:
        return uniform(plan.noise_key(part.name, i), part.start, part.stop)

    zeros: Any = np.zeros(part.stop - part.start)
    return Piece(
        tensors=map(read, how.models, how.names),
        weights=how.weights,
        zeros=zeros,
        base=read(*how.base) if how.base else None,
        noise=noise,
    )


def widened(data: memoryview, code: str) -> np.ndarray:
    """Return floating-point numbers of a dtype as float64."""
    if code == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)).view("<f4").astype(np.float64)
    stored = np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[code])
    return stored.astype(np.float64, copy=False)


def narrowed(values: np.ndarray, code: str) -> np.ndarray:
    """Return finite float64 numbers rounded to a dtype as torch rounds them: to float32, and from there to 16 bits."""
    if code == "F64":
        return values
    single = values.astype("<f4")
    if code == "F32":
        return single
    if code == "F16":
        return single.astype("<f2")
    bits = single.view("<u4")
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
