"""Experts of which only the MLPs were trained: all their other tensors have the bits of the parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.tensors import ModelReader, as_bytes, dtype_of, same_bits
from btm_scale.checkpoint.merge.plan import Unit
from btm_scale.checkpoint.merge.runner import parts_of
from btm_scale.errors import ForestError
from btm_scale.forest.expert import Expert, find_expert
from btm_scale.model.hf_config import read_shape
from btm_scale.model.trained import frozen_names
from btm_scale.run_dir import RunDir
from btm_scale.util.pools import in_threads

_CHUNK_ELEMENTS = 1 << 18  # a chunk of the reference and one of an expert remain in a core's cache
_PART_ELEMENTS = 1 << 23  # compared by one thread


def share_the_rest(run: RunDir, experts: Mapping[str, Expert]) -> bool:
    """Return whether all experts have the same bits in all but their MLPs, because they were trained that way.

    Compares the tensors themselves or their kept hashes, if all cards say so. Raises ForestError if another tensor of
    an expert differs from its parent's or, where the parent is not what it was when the expert branched, from that of
    another of the experts.
    """
    kinds = {_kind(run, name, card) for name, card in experts.items()}
    if len(kinds) > 1:
        return False
    first, card = next(iter(experts.items()))
    reference = _stored_parent(run, first, card)
    differing = {} if reference is None else _first_differences(run, reference, list(experts))
    is_recorded = reference is not None and reference in card.parent_hashes
    if reference is None or (len(differing) == len(experts) and not is_recorded):  # the parent was trained further
        reference = first
        differing = _first_differences(run, first, [name for name in experts if name != first])
    whose = "an expert of the same parents," if reference == first else "its parent"
    if differing:
        name, tensor = next(iter(differing.items()))
        raise ForestError(
            f"'{name}' was trained with train: mlp, but '{tensor}' differs from that of {whose} '{reference}'. Such an "
            f"expert has the bits of its parents in all but its MLPs. Restore it, or leave it out: --without {name}"
        )
    return True


def _kind(run: RunDir, name: str, card: Expert) -> object:
    """Return what is the same for experts with the same bits in all but their MLPs."""
    if card.trains != "mlp" or not card.parents:  # without parents: an expert of another run
        return name
    return card.parents, tuple(sorted(card.parent_hashes.items())), _dtype(run.model(name))


def _stored_parent(run: RunDir, name: str, card: Expert) -> str | None:
    """Return the parent whose bits an expert has; None if they are not on disk, or those of other weights are."""
    parent = card.parents[0].name
    current = find_expert(run.model(parent))
    if len(card.parents) > 1 or current is None:  # the mean of several parents is not stored
        return None
    if card.parent_hashes.get(parent, current.content_hash) != current.content_hash:
        return None
    # A parent in a narrower dtype has been rounded.
    return parent if _dtype(run.model(parent)) in (_dtype(run.model(name)), "F32") else None


def _dtype(directory: Path) -> str:
    """Return safetensors' code of a model's dtype."""
    with open_model(directory) as model:
        return next(spec.code for spec in model.specs().values() if spec.is_floating_point)


def _first_differences(run: RunDir, reference: str, experts: Sequence[str]) -> dict[str, str]:
    """Return the first tensor beside the MLPs in which each expert differs from the reference, of those that differ.

    The reference is read once for all, and rounded to their dtype. Tensors whose hashes were kept are not read.
    """
    found: dict[str, str] = {}
    with ExitStack() as stack:
        theirs = stack.enter_context(open_model(run.model(reference)))
        ours = {expert: stack.enter_context(open_model(run.model(expert))) for expert in experts}
        parts = [
            part
            for name in sorted(frozen_names(read_shape(run.model(reference)), "mlp"))
            for part in parts_of(Unit(name, 0, theirs.spec(name).elements), _PART_ELEMENTS)
        ]
        for part, those in zip(parts, in_threads(partial(_differing, theirs, ours), parts), strict=True):
            for expert in those:
                found.setdefault(expert, part.name)
    return found


def _differing(reference: ModelReader, experts: Mapping[str, ModelReader], part: Unit) -> list[str]:
    """Return the experts that differ from the reference in a part of a tensor, in their order."""
    same = {name: _have_same_hashes(reference, expert, part.name) for name, expert in experts.items()}
    found = {name for name in experts if same[name] is False}
    specs = {name: expert.spec(part.name) for name, expert in experts.items() if same[name] is None}
    if not specs:
        return [name for name in experts if name in found]
    memory = memoryview(bytearray(_CHUNK_ELEMENTS * max(spec.itemsize for spec in specs.values())))
    for chunk in parts_of(part, _CHUNK_ELEMENTS):
        theirs = {spec.code: _bytes(reference, chunk, spec.code) for spec in specs.values()}
        for name, spec in specs.items():
            ours = memory[: (chunk.stop - chunk.start) * spec.itemsize]
            experts[name].read_bytes_into(part.name, chunk.start, ours)
            if not same_bits(ours, theirs[spec.code]):
                found.add(name)
    return [name for name in experts if name in found]


def _have_same_hashes(reference: ModelReader, expert: ModelReader, tensor: str) -> bool | None:
    """Return whether a tensor has the same bytes in both models; None if they must be read to know."""
    theirs, ours = reference.kept_hashes(tensor), expert.kept_hashes(tensor)
    is_known = theirs is not None and ours is not None and reference.spec(tensor) == expert.spec(tensor)
    return theirs == ours if is_known else None


def _bytes(model: ModelReader, part: Unit, code: str) -> memoryview:
    """Return the bytes of a part of a tensor in the dtype of safetensors' code."""
    if model.spec(part.name).code == code:
        return model.read_bytes(part.name, part.start, part.stop)
    return as_bytes(model.read_range(part.name, part.start, part.stop).to(dtype_of(code)))
