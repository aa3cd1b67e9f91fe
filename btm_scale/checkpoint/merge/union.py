"""Extend a tokenizer.json by the tokens of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from btm_scale.checkpoint.formats.locate import read_json
from btm_scale.checkpoint.merge.tokenizers import Tokens
from btm_scale.errors import CheckpointError


@dataclass(frozen=True)
class Union:
    """The vocabulary of several tokenizers; `document` is its tokenizer.json, None if it is the first's unchanged."""

    ids: Mapping[str, int]
    document: dict[str, Any] | None = None

    @property
    def added(self) -> list[dict[str, Any]]:
        """The added tokens of the document."""
        return list(self.document["added_tokens"]) if self.document else []


def extended(first: Tokens, others: Sequence[Tokens]) -> Union:
    """Return the first vocabulary with the tokens of the others after its last id.

    A piece list (Unigram) grows in place, so that the added tokens behind it get larger ids. The merges of the others
    come after those of the first. Raises `CheckpointError` if tokens must be added and not all have a tokenizer.json.
    """
    new = [token for other in others for token, _ in sorted(other.ids.items(), key=lambda item: item[1])]
    new = [token for token in dict.fromkeys(new) if token not in first.ids]
    if not new:
        return Union(first.ids)
    for tokens in (first, *others):
        if tokens.file.name != "tokenizer.json":
            raise CheckpointError(
                f"{tokens.file} cannot be extended: a union of different vocabularies is written as tokenizer.json. "
                "Save this tokenizer as tokenizer.json with transformers first."
            )
    document = read_json(first.file)
    theirs = [read_json(other.file) for other in others]
    kinds = {str(each["model"].get("type") or "BPE") for each in (document, *theirs)}
    if len(kinds) > 1:
        raise CheckpointError(
            f"The tokenizers are of the kinds {', '.join(sorted(kinds))}. A union needs one kind: choose --tokenizer "
            "PATH."
        )
    added: dict[str, Any] = {}
    for each in theirs:
        for token in each.get("added_tokens") or []:
            added.setdefault(token["content"], token)
    ordinary = [token for token in new if token not in added]
    listed = [dict(token) for token in document.get("added_tokens") or []]
    if isinstance(document["model"]["vocab"], list):
        _extend_pieces(document["model"], theirs, ordinary, listed)
    else:
        next_id = max(first.ids.values(), default=-1) + 1
        document["model"]["vocab"] |= {token: next_id + i for i, token in enumerate(ordinary)}
        _extend_merges(document["model"], theirs)
    ids = _ids_of(document["model"]["vocab"], listed)
    for token in new:
        if token in added:
            listed.append(dict(added[token]) | {"id": max(ids.values()) + 1})
            ids[token] = listed[-1]["id"]
    if isinstance(document["model"]["vocab"], dict):
        # The tokenizers library numbers added tokens anew unless the model has them too.
        document["model"]["vocab"] |= {token["content"]: token["id"] for token in listed}
    document["added_tokens"] = sorted(listed, key=lambda token: int(token["id"]))
    return Union(ids, document)


def _ids_of(vocabulary: Any, added: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    if isinstance(vocabulary, list):
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in added}}


def _extend_pieces(
    model: dict[str, Any],
    theirs: Sequence[Mapping[str, Any]],
    new: Sequence[str],
    added: Sequence[dict[str, Any]],
) -> None:
    """Append pieces with their scores, and move the added tokens that follow the list."""
    scores = {piece: score for each in reversed(theirs) for piece, score in each["model"]["vocab"]}
    before = len(model["vocab"])
    model["vocab"] += [[piece, scores[piece]] for piece in new]
    for token in added:
        if token["id"] >= before:
            token["id"] += len(new)


def _extend_merges(model: dict[str, Any], theirs: Sequence[Mapping[str, Any]]) -> None:
    """Append the merges of the others whose parts and result are tokens of the extended vocabulary."""
    if model.get("continuing_subword_prefix") or "merges" not in model:
        return
    vocabulary = model["vocab"]
    known = [_pair(merge) for merge in model["merges"]]
    more = [_pair(merge) for each in theirs for merge in each["model"].get("merges") or []]
    seen = set(known)
    for left, right in more:
        if (left, right) not in seen and {left, right, left + right} <= vocabulary.keys():
            seen.add((left, right))
            known.append((left, right))
    model["merges"] = [list(pair) for pair in known]


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right
