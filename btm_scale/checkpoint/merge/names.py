"""Bring models under common tensor names: some files have the names of the base model, without a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from btm_scale.checkpoint.expected import HEADS
from btm_scale.checkpoint.formats.newer_names import newer_names
from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.formats.wrapped import RenamedModel

_MOST_PREFIXES = 64  # that are tried


def older_names(models: Mapping[Path, ModelReader]) -> frozenset[Path]:
    """Return the vision-language models whose names are of an older transformers version than another model's."""
    names = {path: frozenset(model.names) - {*HEADS} for path, model in models.items()}
    return frozenset(
        path
        for path, own in names.items()
        if (newer := newer_names(own)) is not None
        and any(newer.keys() - {*HEADS} == other for other in names.values() if other != own)
    )


def missing_prefixes(models: Mapping[Path, ModelReader]) -> dict[Path, str]:
    """Return, for models whose tensors lack a prefix that another model's names have, that prefix.

    Hub repositories of GPT-2, OPT, BLOOM and others have the names of the base model (`wte.weight`), and what
    transformers saves has those of the causal LM (`transformer.wte.weight`). Both load, as the same model.
    """
    prefixes: dict[Path, str] = {}
    names = {path: frozenset(model.names) for path, model in models.items()}
    for path, own in names.items():
        found = {prefix for other in names.values() if other != own and (prefix := _prefix_between(own, other))}
        if found:
            prefixes[path] = max(sorted(found), key=len)
    return prefixes


def _prefix_between(bare: frozenset[str], full: frozenset[str]) -> str | None:
    """Return what precedes most of the names of `bare` in `full`, or None."""
    lacking = bare - full
    if not lacking:
        return None
    known = sum(1 for name in bare if name in full)
    best = max(_prefixes(full), key=lambda prefix: _matches(lacking, full, prefix), default=None)
    if best is None or 2 * _matches(lacking, full, best) <= len(lacking) or known > len(lacking):
        return None
    return best


def _matches(names: Iterable[str], full: frozenset[str], prefix: str) -> int:
    return sum(1 for name in names if prefix + name in full)


def _prefixes(names: Iterable[str]) -> list[str]:
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[:n]) + "." for n in (1, 2) if n < len(parts)}
    return sorted(found)[:_MOST_PREFIXES]


def prefixed(model: ModelReader, prefix: str, heads: frozenset[str]) -> RenamedModel:
    """Return a model under names with a prefix, but for those in `heads`, such as `lm_head.weight`."""
    return RenamedModel(model, {name if name in heads else f"{prefix}{name}": name for name in model.names})
