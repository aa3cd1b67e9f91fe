"""Experts of which only the MLPs were trained: all their other tensors have the bits of the parent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.tensors import ModelReader, same_bits
from btm_scale.errors import ForestError
from btm_scale.forest.expert import Expert, is_finished
from btm_scale.model.hf_config import read_shape
from btm_scale.model.trained import frozen_names
from btm_scale.run_dir import RunDir
from btm_scale.util.pools import in_threads

_CHUNK_ELEMENTS = 1 << 19  # that remain in a core's cache


def share_the_rest(run: RunDir, experts: Mapping[str, Expert]) -> bool:
    """Return whether all experts have the same bits in all but their MLPs, because they were trained that way.

    Compares the tensors themselves. Raises ForestError if the card of an expert says that only its MLPs were trained,
    and another of its tensors differs from its parent's, or from that of an expert with the same parents.
    """
    firsts: dict[object, str] = {}
    kinds: set[object] = set()
    pairs: list[tuple[str, str, str]] = []  # an expert, what it is compared with, and whose that is
    for name, card in experts.items():
        if card.trains != "mlp":
            kinds.add(name)  # shares nothing with another
            continue
        dtype = _dtype(run.model(name))
        kind = (card.parents, dtype)
        kinds.add(kind)
        first = firsts.setdefault(kind, name)
        parent = run.model(card.parents[0].name)
        # A parent in a narrower dtype has been rounded; the mean of several is not stored.
        is_stored = len(card.parents) == 1 and is_finished(parent) and _dtype(parent) in (dtype, torch.float32)
        if is_stored:
            pairs.append((name, card.parents[0].name, "its parent"))
        elif first != name:
            pairs.append((name, first, "an expert of the same parents,"))
    found = in_threads(lambda pair: _first_difference(run.model(pair[0]), run.model(pair[1])), pairs)
    for (name, other, whose), differing in zip(pairs, found, strict=True):
        if differing is not None:
            raise ForestError(
                f"'{name}' was trained with train: mlp, but '{differing}' differs from that of {whose} '{other}'. Such "
                f"an expert has the bits of its parents in all but its MLPs. Restore it, or leave it out: --without "
                f"{name}"
            )
    return len(kinds) == 1


def _dtype(directory: Path) -> torch.dtype:
    with open_model(directory) as model:
        return next(spec.dtype for spec in model.specs().values() if spec.dtype.is_floating_point)


def _first_difference(directory: Path, other: Path) -> str | None:
    """Return the first tensor beside the MLPs that differs from another model's, rounded to the same dtype, or None."""
    names = sorted(frozen_names(read_shape(directory), "mlp"))
    with open_model(directory) as ours, open_model(other) as theirs:
        return next(_differing(ours, theirs, names), None)


def _differing(ours: ModelReader, theirs: ModelReader, names: Iterable[str]) -> Iterator[str]:
    arrays: dict[tuple[ModelReader, torch.dtype], torch.Tensor] = {}

    def read(model: ModelReader, name: str, start: int, stop: int) -> torch.Tensor:
        dtype = model.exact_dtype(name)
        if (model, dtype) not in arrays:
            arrays[model, dtype] = torch.empty(_CHUNK_ELEMENTS, dtype=dtype)
        out = arrays[model, dtype][: stop - start]
        model.read_into(name, start, out)
        return out

    for name in names:
        elements = ours.spec(name).elements
        for start in range(0, elements, _CHUNK_ELEMENTS):
            stop = min(start + _CHUNK_ELEMENTS, elements)
            mine, other = (read(model, name, start, stop) for model in (ours, theirs))
            if not same_bits(mine, other.to(mine.dtype)):
                yield name
                break
