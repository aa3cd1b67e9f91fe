"""How a merge sees its inputs: under common names, and with the rows of embeddings in the order of one tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.merge.names import prefixed
from btm_scale.checkpoint.merge.token_rows import RowsByToken, TokenRows


@dataclass(frozen=True)
class Views:
    """What is changed while inputs are read; it can be sent to other processes."""

    prefixes: Mapping[Path, str] = field(default_factory=dict)
    rows: TokenRows | None = None

    def open(self, paths: Iterable[Path], stack: ExitStack) -> dict[Path, ModelReader]:
        """Open models as this merge sees them; `stack` closes them."""
        models = {path: stack.enter_context(open_model(path)) for path in dict.fromkeys(paths)}
        return self.of(models)

    def of(self, models: Mapping[Path, ModelReader]) -> dict[Path, ModelReader]:
        """Return open models as this merge sees them."""
        heads = frozenset(name for path, model in models.items() if path not in self.prefixes for name in model.names)
        named: dict[Path, ModelReader] = {
            path: prefixed(model, prefix, heads) if (prefix := self.prefixes.get(path)) else model
            for path, model in models.items()
        }
        if self.rows is None:
            return named
        return {path: RowsByToken(model, self.rows, named, path) for path, model in named.items()}

    def digest(self) -> str:
        """Return text that changes with anything that could change a byte of the output."""
        named = repr(sorted((str(path), prefix) for path, prefix in self.prefixes.items())) if self.prefixes else ""
        return named + (self.rows.digest if self.rows else "")
