"""Merge small models, add those of medium size, and copy any, with NumPy instead of torch. The bytes are the same."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from threading import BoundedSemaphore, Lock, local
from typing import Any

import numpy as np

from btm_scale.checkpoint.formats.rounded import EXPONENTS
from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.hashing import BlockHashes
from btm_scale.checkpoint.merge.noise import uniform
from btm_scale.checkpoint.merge.plan import MergePlan, Unit
from btm_scale.checkpoint.merge.registry import Piece
from btm_scale.checkpoint.merge.runner import Target, UnitRunner, kept_hash, parts_of
from btm_scale.util.direct_io import aligned
from btm_scale.util.one_thread import one_torch_thread

MOST_BYTES = 32 << 20  # of all inputs; most larger merges are faster with torch, its import included
MOST_SUMMED = 6 << 30  # bytes read for plain sums, for which NumPy is slower than torch by less than the import
_WRITTEN_BYTES = 4 << 20  # at once, if they go to the disk directly: a disk is slower with less
_NARROW = ("F32", "F16", "BF16")  # whose products with a float64 weight do not underflow
_FLOATS = ("F64", *_NARROW)


def with_torch(target: Target) -> frozenset[str]:
    """Return the tensors that are merged with torch, because NumPy cannot merge them or would take longer.

    If a small merge needs torch, all of it is merged with torch. A larger one copies without torch. Its sums are left
    to torch, unless all have weights of 1 and together they are faster without torch's import.
    """
    plan = target.plan
    needed = frozenset(name for name in plan.specs if not _has_numpy_method(target, name))
    if plan.bytes_read <= MOST_BYTES:
        return frozenset(plan.specs if needed else [])
    summed = [name for name in plan.specs if name not in needed and plan.how(name).models and not plan.copies(name)]
    read = sum(_bytes_read(target, name) for name in summed)
    if needed or read > MOST_SUMMED or not all(_is_plain_sum(plan, name) for name in summed):
        return needed | frozenset(summed)
    return needed


def _bytes_read(target: Target, name: str) -> int:
    how = target.plan.how(name)
    return sum(target.everyone[model].spec(own).nbytes for model, own in zip(how.models, how.names, strict=True))


def _is_plain_sum(plan: MergePlan, name: str) -> bool:
    how = plan.how(name)
    return how.method_name == "linear" and set(how.weights) == {1.0}


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
    """Merges, writes and hashes one unit of a tensor that is not in `with_torch`; thread-safe.

    Units with NaN or infinities are left to torch, which counts them.
    """

    def __init__(self, target: Target, chunk_bytes: int, cores: int = 1) -> None:
        self.targets, self.chunk_bytes = [target], chunk_bytes
        self._target = target
        self._arrays = Arrays()
        self._computing = BoundedSemaphore(cores)  # other threads wait for the disk
        self._by_torch = Lock()  # the number of torch's threads is the process's

    def __call__(self, unit: Unit) -> tuple[Unit, list[list[str]]]:
        """Return the unit and its block hashes."""
        hashes, kept = BlockHashes(), kept_hash(self._target, unit)
        for piece in self._pieces(unit, kept is not None):
            with nullcontext() if self._target.plan.copies(unit.name) else self._computing:
                data = self._merged(piece, hashes if kept is None else None)
            if data is None:
                with self._by_torch, one_torch_thread():
                    return UnitRunner(self._target, self.chunk_bytes)(unit)
            self._target.writer.write_bytes(unit.name, piece.start, data)
        return unit, [hashes.finished() if kept is None else [kept]]

    def _pieces(self, unit: Unit, is_kept: bool) -> list[Unit]:
        """Return the parts of a unit that are written at once."""
        plan, writer = self._target.plan, self._target.writer
        if not plan.how(unit.name).models:
            return [unit]
        size = plan.specs[unit.name].itemsize
        if writer.is_direct:
            return parts_of(unit, _WRITTEN_BYTES // size, writer.skew(unit.name, unit.start) // size)
        # Bytes that are not hashed need not stay in a core's cache, and larger chunks take fewer calls.
        return parts_of(unit, (2 if is_kept else 1) * self.chunk_bytes // size)

    def _merged(self, piece: Unit, hashes: BlockHashes | None) -> memoryview | None:
        """Return the bytes of a piece of the output, and hash them; None if torch must compute it."""
        plan, writer = self._target.plan, self._target.writer
        spec = plan.specs[piece.name]
        out = self._arrays.bytes_at(writer.skew(piece.name, piece.start), (piece.stop - piece.start) * spec.itemsize)
        whole = hashes is None or not plan.how(piece.name).models
        for part in [piece] if whole else parts_of(piece, self.chunk_bytes // spec.itemsize):
            first = (part.start - piece.start) * spec.itemsize
            own = out[first : first + (part.stop - part.start) * spec.itemsize]
            if not self._merge_into(own, part):
                return None
            if hashes is not None:
                hashes.update(own.data)
        return out.data

    def _merge_into(self, out: np.ndarray, part: Unit) -> bool:
        """Merge a part into its bytes [n], uint8. Returns whether NumPy can: all numbers are finite."""
        plan, models = self._target.plan, self._target.everyone
        how, spec = plan.how(part.name), plan.specs[part.name]
        with np.errstate(all="ignore"):
            if not how.models:
                exact = plan.added(part)
            elif plan.copies(part.name):
                model, name = models[how.models[0]], how.names[0]
                code = model.spec(name).code
                if code == spec.code:
                    model.read_bytes_into(name, part.start, out.data)
                    return not spec.is_floating_point or _is_finite(out.data, code)
                exact = self._arrays.widened("input", self._read(model, name, part), code)
            else:
                try:
                    exact = how.method.function(self._piece(part), **how.parameters)
                except OverflowError:
                    return False
            self._arrays.narrow_into(out, exact, spec.code)
        return _is_finite(out.data, spec.code)  # infinities that rounding makes are counted too

    def _piece(self, part: Unit) -> Piece:
        """Return a part of every model as a piece of arrays, which elementwise methods accept as well as tensors."""
        plan, models, elements = self._target.plan, self._target.everyone, part.stop - part.start
        how = plan.how(part.name)

        def read(model: int, name: str, purpose: str) -> Any:
            data = self._read(models[model], name, part)
            return self._arrays.widened(purpose, data, models[model].spec(name).code)

        def noise(i: int) -> Any:
            return uniform(plan.noise_key(part.name, i), part.start, part.stop)

        zeros: Any = self._arrays.array("result", elements, "<f8")
        zeros.fill(0)
        return Piece(
            tensors=(read(model, name, "input") for model, name in zip(how.models, how.names, strict=True)),
            weights=how.weights,
            zeros=zeros,
            base=read(*how.base, "base") if how.base else None,
            noise=noise,
        )

    def _read(self, model: ModelReader, name: str, part: Unit) -> memoryview:
        data = self._arrays.array("stored", (part.stop - part.start) * model.spec(name).itemsize, "u1").data
        model.read_bytes_into(name, part.start, data)
        return data


class Arrays:
    """Arrays that each thread reuses: to allocate one takes longer than to fill it."""

    def __init__(self) -> None:
        self._local = local()

    def array(self, purpose: str, elements: int, dtype: str) -> np.ndarray:
        """Return this thread's array [elements] for a purpose, with any values."""
        arrays: dict[str, np.ndarray] = self._local.__dict__.setdefault("arrays", {})
        array = arrays.get(purpose)
        if array is None or array.size < elements:
            arrays[purpose] = array = np.empty(elements, dtype)
        return array[:elements]

    def bytes_at(self, skew: int, count: int) -> np.ndarray:
        """Return this thread's uint8 array [count] for output, `skew` bytes after the border of a block in memory."""
        output: np.ndarray | None = self._local.__dict__.get("output")
        if output is None or output.size < skew + count:
            self._local.output = output = aligned(skew + count)
        return output[skew : skew + count]

    def widened(self, purpose: str, data: memoryview, code: str) -> np.ndarray:
        """Return floating-point numbers of a dtype as float64."""
        stored = np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[code])
        if code == "BF16":
            bits = self.array("bits", stored.size, "<u4")
            np.copyto(bits, stored)
            stored = np.left_shift(bits, np.uint32(16), out=bits).view("<f4")
        out = self.array(purpose, stored.size, "<f8")
        np.copyto(out, stored)
        return out

    def narrow_into(self, out: np.ndarray, values: np.ndarray, code: str) -> None:
        """Round finite float64 numbers into bytes as torch rounds them: to float32, and from there to 16 bits."""
        values = values.reshape(-1)
        if code == "F64":
            out.view("<f8")[:] = values
            return
        if code == "F32":
            np.copyto(out.view("<f4"), values, casting="same_kind")
            return
        single = self.array("float32", values.size, "<f4")
        np.copyto(single, values, casting="same_kind")
        if code == "F16":
            np.copyto(out.view("<f2"), single, casting="same_kind")
            return
        bits = single.view("<u4")
        added = np.right_shift(bits, np.uint32(16), out=self.array("bits", bits.size, "<u4"))
        added &= np.uint32(1)
        added += np.uint32(0x7FFF)
        bits += added
        bits >>= np.uint32(16)
        np.copyto(out.view("<u2"), bits, casting="same_kind")


def _is_finite(data: memoryview, code: str) -> bool:
    """Return whether all floating-point numbers of a dtype are finite, which their largest bit patterns show."""
    size, exponent = int(EXPONENTS[code][0][1:]) // 8, EXPONENTS[code][1]
    if not data:
        return True
    positive, negative = (int(np.frombuffer(data, f"<{kind}{size}").max()) for kind in "iu")
    return positive < exponent and negative < exponent | 1 << (8 * size - 1)
