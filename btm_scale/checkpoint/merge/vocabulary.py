"""Choose the vocabulary of a merge, and match the rows of every model to it by token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.checkpoint.formats.locate import read_json
from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.merge.token_rows import TokenRows, is_token_tensor
from btm_scale.checkpoint.merge.tokenizer_files import tokenizer_files, tokenizer_folder
from btm_scale.checkpoint.merge.tokenizers import Tokens, read_tokens
from btm_scale.checkpoint.merge.union import Union, extended
from btm_scale.errors import CheckpointError, unknown_name
from btm_scale.util.bounded_json import shown
from btm_scale.util.inside import copy_inside

NEW_ROWS = ("mean", "zero")
_MOST_TOKENS = 1 << 24
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


def token_rows(choice: str | Path, new_rows: str, models: Mapping[Path, ModelReader], base: Path | None) -> TokenRows:
    """Return the rows of every model for a vocabulary: `union`, `base`, or that of a folder or tokenizer file.

    `models` are the inputs in the order in which they were given, then the base. `union` keeps the ids of the base, or
    without one of the first input, and appends the tokens of the others. Padding after the last token is kept.
    Raises `CheckpointError`.
    """
    if new_rows not in NEW_ROWS:
        raise CheckpointError(unknown_name("kind of new rows", new_rows, NEW_ROWS))
    reference = _reference(choice, models, base)
    vocabularies = {path: read_tokens(path) for path in models}
    own = vocabularies.get(reference) or read_tokens(reference)
    across = len({each.kind for each in (own, *vocabularies.values())}) > 1
    ids = dict(_union(own, vocabularies, across).ids) if str(choice) == "union" else own.named(across)
    heights = {path: _height(model) for path, model in models.items()}
    rows = max([*ids.values(), -1]) + 1
    if not 0 < rows <= _MOST_TOKENS:
        raise CheckpointError(f"{own.file} has token ids up to {rows - 1}. Ids must be below {_MOST_TOKENS}: copy it.")
    rows = max(rows, heights.get(reference, 0))
    is_token = np.zeros(rows, dtype=bool)
    is_token[list(ids.values())] = True
    sources = {
        path: _matched(ids, is_token, vocabulary.named(across), heights[path], path)
        for path, vocabulary in vocabularies.items()
    }
    return TokenRows(
        choice=str(choice),
        reference=reference,
        order=tuple(models),
        sources=sources,
        is_token=is_token,
        base=base,
        zero=new_rows == "zero",
        tokens_digest=hashlib.sha256(json.dumps(sorted(ids.items())).encode("utf-8", "surrogatepass")).hexdigest(),
    )


def _reference(choice: str | Path, models: Mapping[Path, ModelReader], base: Path | None) -> Path:
    if str(choice) == "union":
        return base or next(iter(models))
    if str(choice) != "base":
        path = Path(choice)
        if not path.exists():
            raise CheckpointError(
                f"{path} does not exist. Give --tokenizer union, base, or the path of a tokenizer or a model's folder."
            )
        return next((model for model in models if model.resolve() == path.resolve()), path)
    if base is None:
        raise CheckpointError(
            "--tokenizer base needs a base, and this merge has none. Give the path of a model's folder in its place."
        )
    return base


def _union(own: Tokens, vocabularies: Mapping[Path, Tokens], across: bool) -> Union:
    others = [each for each in vocabularies.values() if each is not own]
    if across and any(token not in own.named(True) for each in others for token in each.named(True)):
        kinds = ", ".join(sorted({f"{each.file} ({each.kind})" for each in (own, *others)}))
        raise CheckpointError(
            f"The tokenizers write tokens in different ways: {kinds}. A union needs one way: choose --tokenizer PATH."
        )
    return extended(own, others)


def _height(model: ModelReader) -> int:
    """Return the number of rows that all token tensors of a model have."""
    heights = [model.spec(name).shape[0] for name in model.names if is_token_tensor(name) and model.spec(name).shape]
    if not heights:
        raise CheckpointError(
            f"{model.path} has no embedding under a known name, so its rows cannot be matched by token. Leave out "
            "--tokenizer."
        )
    return min(heights)


def _matched(
    ids: Mapping[str, int], is_token: np.ndarray, theirs: Mapping[str, int], height: int, path: Path
) -> np.ndarray:
    """Return a model's row for every row of the output, -1 for none. Padding is matched to padding of the same id."""
    mapping = np.full(len(is_token), -1, dtype=np.int64)
    named = np.zeros(height, dtype=bool)
    named[[row for row in theirs.values() if row < height]] = True
    both = min(len(mapping), height)
    padding = np.flatnonzero(~is_token[:both] & ~named[:both])
    mapping[padding] = padding
    holders: dict[int, str] = {}
    for token, row in ids.items():
        source = theirs.get(token, -1)
        if 0 <= source < height:
            if holders.setdefault(row, token) != token and mapping[row] != source:
                raise CheckpointError(
                    f"The tokens {shown(holders[row])} and {shown(token)} have one id in the output's tokenizer and "
                    f"two in that of {path}, so their rows cannot be matched. Correct the tokenizer with one id."
                )
            mapping[row] = source
    return mapping


def write_tokenizer(rows: TokenRows, first: Path, target: Path) -> None:
    """Replace the tokenizer in `target`, copied from the model `first`, by the chosen one, and adapt ids in configs."""
    reference = rows.reference
    folder = tokenizer_folder(reference) if reference.is_dir() else reference.parent
    files = [file.name for file in tokenizer_files(folder)] if reference.is_dir() else [reference.name]
    vocabularies = {path: read_tokens(path) for path in rows.order}
    own = vocabularies.get(reference) or read_tokens(reference)
    across = len({each.kind for each in (own, *vocabularies.values())}) > 1
    if folder.resolve() != tokenizer_folder(first).resolve():
        for file in [*tokenizer_files(target), *(target / name for name in _BESIDE)]:
            file.unlink(missing_ok=True)
        for name in [*files, *(name for name in _BESIDE if (folder / name).is_file())]:
            copy_inside(folder, name, target)
    ids: Mapping[str, int] = own.named(across)
    if rows.choice == "union":
        union = _union(own, vocabularies, across)
        ids = union.ids
        if union.document is not None:
            _write_union(union, target)
    before = {row: token for token, row in read_tokens(first).named(across).items()}
    for name in ("config.json", "generation_config.json"):
        if (target / name).is_file():
            content = _adapted(read_json(target / name), before, ids, rows.rows)
            (target / name).write_text(json.dumps(content, indent=2) + "\n")


def _write_union(union: Union, target: Path) -> None:
    """Write an extended tokenizer.json; files of other forms, which lack the new tokens, are removed."""
    for file in tokenizer_files(target):
        file.unlink()
    text = json.dumps(union.document, ensure_ascii=False, indent=2)
    (target / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    settings = read_json(target / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        listed = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in union.added}
        (target / "tokenizer_config.json").write_text(
            json.dumps(settings | {"added_tokens_decoder": listed}, indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )


def _adapted(config: Any, before: Mapping[int, str], ids: Mapping[str, int], rows: int) -> Any:
    """Return a config with the size of the vocabulary and the ids of its tokens in the output's vocabulary."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(each) for each in value]
        return ids.get(before[value], value) if type(value) is int and value in before else value

    changed = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            changed[key] = _adapted(value, before, ids, rows) if key == "text_config" else value
        elif key == "vocab_size":
            changed[key] = rows
        elif key.endswith(("_token_id", "_token_ids", "_token_index")) or key in ("suppress_tokens",):
            changed[key] = moved(value)
        else:
            changed[key] = value
    return changed
