"""Bring models under common tensor names: some files have the names of the base model, without a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec

_MOST_PREFIXES = 64  # that are tried


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


class Prefixed(ModelReader):
    """A model whose names get a prefix, but for those that another model has without it, such as `lm_head.weight`."""

    def __init__(self, model: ModelReader, prefix: str, heads: frozenset[str]) -> None:
        self.path = model.path
        self._model = model
        self._own: Mapping[str, str] = {name if name in heads else f"{prefix}{name}": name for name in model.names}
        self._names = tuple(sorted(self._own))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors with their prefix, sorted."""
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape."""
        return self._model.spec(self._own.get(name, name))

    def exact_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that holds a tensor without rounding."""
        return self._model.exact_dtype(self._own.get(name, name))

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`."""
        self._model.read_into(self._own.get(name, name), start, out)

    def close(self) -> None:
        """Close the model."""
        self._model.close()
