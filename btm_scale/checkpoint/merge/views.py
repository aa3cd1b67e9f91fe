"""How a merge sees its inputs: under common names, with an LM head each, and with the rows of one tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from btm_scale.checkpoint.formats.newer_names import with_newer_names
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.merge.heads import WithHead
from btm_scale.checkpoint.merge.names import prefixed
from btm_scale.checkpoint.merge.token_rows import RowsByToken, TokenRows


@dataclass(frozen=True)
class Views:
    """What is changed while inputs are read; it can be sent to other processes."""

    renamed: frozenset[Path] = frozenset()  # to the names of newer versions of transformers
    prefixes: Mapping[Path, str] = field(default_factory=dict)
    heads: Mapping[Path, str] = field(default_factory=dict)  # the embedding that is the LM head of a tied model
    rows: TokenRows | None = None

    def open(self, paths: Iterable[Path], stack: ExitStack) -> dict[Path, ModelReader]:
        """Open models as this merge sees them; `stack` closes them."""
        models = {path: stack.enter_context(open_model(path)) for path in dict.fromkeys(paths)}
        return self.of(models)

    def of(self, models: Mapping[Path, ModelReader]) -> dict[Path, ModelReader]:
        """Return open models as this merge sees them."""
        newer = {path: with_newer_names(model) if path in self.renamed else model for path, model in models.items()}
        full = frozenset(name for path, model in newer.items() if path not in self.prefixes for name in model.names)
        named: dict[Path, ModelReader] = {
            path: prefixed(model, prefix, full) if (prefix := self.prefixes.get(path)) else model
            for path, model in newer.items()
        }
        named |= {path: WithHead(named[path], embedding) for path, embedding in self.heads.items() if path in named}
        if self.rows is None:
            return named
        return {path: RowsByToken(model, self.rows, named, path) for path, model in named.items()}

    def digest(self) -> str:
        """Return text that changes with anything that could change a byte of the output."""
        changes = [
            [str(path) for path in sorted(self.renamed)],
            *(sorted((str(path), name) for path, name in each.items()) for each in (self.prefixes, self.heads)),
        ]
        return "".join(repr(change) for change in changes if change) + (self.rows.digest if self.rows else "")
