"""Experts of which only the MLPs were trained: all their other tensors have the bits of the parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.tensors import ModelReader, same_bits
from btm_scale.checkpoint.merge.plan import Unit
from btm_scale.checkpoint.merge.runner import Buffers, parts_of
from btm_scale.errors import ForestError
from btm_scale.forest.expert import Expert, is_finished
from btm_scale.model.hf_config import read_shape
from btm_scale.model.trained import frozen_names
from btm_scale.run_dir import RunDir
from btm_scale.util.pools import in_threads

_CHUNK_ELEMENTS = 1 << 18  # a chunk of the reference and one of an expert remain in a core's cache
_PART_ELEMENTS = 1 << 23  # compared by one thread


def share_the_rest(run: RunDir, experts: Mapping[str, Expert]) -> bool:
    """Return whether all experts have the same bits in all but their MLPs, because they were trained that way.

    Compares the tensors themselves. Raises ForestError if the card of an expert says that only its MLPs were trained,
    and another of its tensors differs from its parent's, or from that of an expert with the same parents.
    """
    firsts: dict[object, str] = {}
    kinds: set[object] = set()
    pairs: list[tuple[str, str, str]] = []  # an expert, what it is compared with, and whose that is
    for name, card in experts.items():
        if card.trains != "mlp" or not card.parents:  # its parents are models of another run
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
    differing = _first_differences(run, [(name, other) for name, other, _ in pairs])
    for name, other, whose in pairs:
        if name in differing:
            raise ForestError(
                f"'{name}' was trained with train: mlp, but '{differing[name]}' differs from that of {whose} "
                f"'{other}'. Such an expert has the bits of its parents in all but its MLPs. Restore it, or leave it "
                f"out: --without {name}"
            )
    return len(kinds) == 1


def _dtype(directory: Path) -> torch.dtype:
    with open_model(directory) as model:
        return next(spec.dtype for spec in model.specs().values() if spec.dtype.is_floating_point)


def _first_differences(run: RunDir, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the first tensor beside the MLPs in which each expert differs from its reference, of those that differ.

    `pairs` are (expert, reference). A reference of several experts is read once, and rounded to their dtype.
    """
    found: dict[str, str] = {}
    for reference in dict.fromkeys(reference for _, reference in pairs):
        experts = [expert for expert, theirs in pairs if theirs == reference]
        with ExitStack() as stack:
            theirs = stack.enter_context(open_model(run.model(reference)))
            ours = {expert: stack.enter_context(open_model(run.model(expert))) for expert in experts}
            parts = [
                part
                for name in sorted(frozen_names(read_shape(run.model(experts[0])), "mlp"))
                for part in parts_of(Unit(name, 0, theirs.spec(name).elements), _PART_ELEMENTS)
            ]
            for part, those in zip(parts, in_threads(partial(_differing, theirs, ours), parts), strict=True):
                for expert in those:
                    found.setdefault(expert, part.name)
    return found


def _differing(reference: ModelReader, experts: Mapping[str, ModelReader], part: Unit) -> set[str]:
    """Return the experts that differ from the reference in a part of a tensor."""
    buffers, found = Buffers(), set()
    for chunk in parts_of(part, _CHUNK_ELEMENTS):
        theirs = buffers.stored(reference, chunk, "reference")
        for name, expert in experts.items():
            ours = buffers.stored(expert, chunk)
            if not same_bits(ours, theirs.to(ours.dtype)):
                found.add(name)
    return found
