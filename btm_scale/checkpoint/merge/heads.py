"""Merge models with tied embeddings with models that have a separate LM head, by copying the tied embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from btm_scale.checkpoint.expected import EMBEDDINGS, ties_embeddings
from btm_scale.checkpoint.formats.locate import described_config
from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.formats.wrapped import RenamedModel
from btm_scale.checkpoint.merge.compatibility import is_derived
from btm_scale.errors import first_few

HEAD = "lm_head.weight"
SETTING = "tie_word_embeddings"


class WithHead(RenamedModel):
    """A tied model with its embedding as LM head too; closing it closes the model."""

    keeps_head = True

    def __init__(self, model: ModelReader, embedding: str) -> None:
        super().__init__(model, {name: name for name in model.names} | {HEAD: embedding})


def shared_heads(models: Mapping[Path, ModelReader]) -> dict[Path, str]:
    """Return the embeddings of the tied models, if another of the models has an LM head; else nothing."""
    separate = {path for path, model in models.items() if HEAD in model.names and not is_derived(HEAD, model)}
    if not separate:
        return {}
    embeddings: dict[Path, str] = {}
    for path, model in models.items():
        own = [name for name in model.names if name.endswith(EMBEDDINGS)]
        if path not in separate and len(own) == 1 and ties_embeddings(described_config(path)):
            embeddings[path] = own[0]
    return embeddings


def head_problem(tied: Mapping[Path, str], models: Mapping[Path, ModelReader]) -> str:
    """Return the problem of merging these tied models with others, and what to do."""
    first = next(path for path, model in models.items() if path not in tied and HEAD in model.names)
    listed = first_few([str(path) for path in tied], "models")
    return (
        f"The LM head of {listed} is the embedding ({SETTING} in config.json), and that of {first} is a separate "
        f"weight. A merged model has one or the other. Add --allow {SETTING} (`allow` in Python): the output then has "
        "a separate LM head, to which a tied model contributes its embedding."
    )
