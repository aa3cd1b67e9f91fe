"""Compare tokenizers by what they do, whatever the form and formatting of their files."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm_scale.checkpoint.merge.settings import is_allowed
from btm_scale.checkpoint.merge.tokenizer_files import (
    BYTE_LETTERS,
    Parts,
    read_parts,
    tokenizer_files,
    tokenizer_folder,
)
from btm_scale.errors import CheckpointError
from btm_scale.util.bounded_json import parse_json, read_bounded, shown

_LOG = logging.getLogger(__name__)
_LETTER_BYTES = {letter: byte for byte, letter in BYTE_LETTERS.items()}
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REMEDY = (
    "Rows of embeddings can be merged only for the same tokens: merge models with one tokenizer, match rows by token "
    "(--tokenizer union|base|PATH; `tokenizer` in Python), or accept the difference with --allow tokenizer.{key}."
)


def tokenizer_problems(paths: Sequence[Path], allow: Sequence[str] = ()) -> list[str]:
    """Return a problem for every tokenizer that does something else than the first, unless `allow` names the part.

    A different chat template is only a warning: it changes no token.
    """
    folders = [folder for folder in dict.fromkeys(tokenizer_folder(path) for path in paths) if tokenizer_files(folder)]
    problems = [problem for other in folders[1:] for problem in _problems_between(folders[0], other, allow)]
    _warn_of_templates(list(dict.fromkeys(tokenizer_folder(path) for path in paths)), allow)
    return problems


def _problems_between(first: Path, other: Path, allow: Sequence[str]) -> list[str]:
    ours, theirs = ({file.name: file for file in tokenizer_files(folder)} for folder in (first, other))
    common = [name for name in ours if name in theirs]
    if not common:
        return _across_forms(first, other, allow)
    problems = []
    for name in common:
        if ours[name].read_bytes() == theirs[name].read_bytes():
            continue
        for key, difference in _differing_parts(ours[name], theirs[name]):
            if not is_allowed(f"tokenizer.{key}", allow) and name not in allow:
                problems.append(
                    f"{name} differs between {first} and {other}: {key} {difference}. {_REMEDY.format(key=key)}"
                )
    return problems


def _differing_parts(one: Path, other: Path) -> list[tuple[str, str]]:
    """Return the parts in which two files of one form differ, each with both values in words."""
    ours, theirs = _parts_or_none(one), _parts_or_none(other)
    if ours is None or theirs is None:
        if one.suffix == ".json" and _same_json(one, other):
            return []
        return [("content", f"{_start(one)} and {_start(other)}")]
    return [
        (key, _difference(ours.get(key), theirs.get(key)))
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key)
    ]


def _parts_or_none(file: Path) -> Parts | None:
    try:
        return read_parts(file)
    except (ValueError, OSError):
        return None


def _same_json(one: Path, other: Path) -> bool:
    try:
        return bool(parse_json(read_bounded(one)) == parse_json(read_bounded(other)))
    except (ValueError, OSError):
        return False


def _start(file: Path) -> str:
    with file.open("rb") as opened:
        return repr(opened.read(24))


def _difference(one: Any, other: Any) -> str:
    """Return both values of a part in words: of a mapping or list the number of differences and the first."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
        return f"({len(keys)} entries differ; {shown(keys[0])} is {_value(one, keys[0])} and {_value(other, keys[0])})"
    if isinstance(one, list) and isinstance(other, list):
        most = max(len(one), len(other))
        places = [i for i in range(most) if one[i : i + 1] != other[i : i + 1]]
        mine, its = (shown(part[places[0]]) if places[0] < len(part) else "absent" for part in (one, other))
        return f"({len(places)} of {most} entries differ; number {places[0]} is {mine} and {its})"
    return f"{shown(one)} and {shown(other)}"


def _value(values: Mapping[Any, Any], key: Any) -> str:
    return shown(values[key]) if key in values else "absent"


def _across_forms(first: Path, other: Path, allow: Sequence[str]) -> list[str]:
    """Compare the tokens of tokenizers that have no file of the same form."""
    if is_allowed("tokenizer.vocabulary", allow):
        return []
    ours, theirs = _tokens_or_none(first), _tokens_or_none(other)
    if ours is None or theirs is None:
        return []
    by_id = [{row: token for token, row in each.named(ours.kind != theirs.kind).items()} for each in (ours, theirs)]
    odd = [row for row in sorted(by_id[0].keys() & by_id[1].keys()) if by_id[0][row] != by_id[1][row]]
    if not odd:
        return []
    return [
        f"{ours.file.name} of {first} and {theirs.file.name} of {other} differ: vocabulary ({len(odd)} tokens differ; "
        f"{odd[0]} is {shown(by_id[0][odd[0]])} and {shown(by_id[1][odd[0]])}). {_REMEDY.format(key='vocabulary')}"
    ]


@dataclass(frozen=True)
class Tokens:
    """The vocabulary of a tokenizer: the id of every token, and how tokens are written.

    `kind` is `byte-level` (GPT-2's letters for bytes), `sentencepiece` (`▁` for a space) or `plain`.
    """

    file: Path
    ids: Mapping[str, int]
    kind: str

    def named(self, across_kinds: bool) -> dict[str, int]:
        """Return the ids by token, written as text if tokenizers of several kinds are compared."""
        if not across_kinds:
            return dict(self.ids)
        named: dict[str, int] = {}
        for token, row in self.ids.items():
            named.setdefault(_as_text(token, self.kind), row)
        return named


def _as_text(token: str, kind: str) -> str:
    if kind == "byte-level" and all(letter in _LETTER_BYTES for letter in token):
        return bytes(_LETTER_BYTES[letter] for letter in token).decode("utf-8", "backslashreplace")
    if kind == "sentencepiece":
        if byte := _BYTE_PIECE.fullmatch(token):
            return bytes([int(byte[1], 16)]).decode("utf-8", "backslashreplace")
        return token.replace("▁", " ")
    return token


def read_tokens(path: Path) -> Tokens:
    """Return the vocabulary of a model's folder or of a tokenizer file. Raises `CheckpointError` if there is none."""
    folder = tokenizer_folder(path) if path.is_dir() else path.parent
    files = tokenizer_files(folder) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise CheckpointError(
            f"{path} has no tokenizer, which gives the token of every row. Copy its tokenizer.json there, or choose "
            "another tokenizer."
        )
    file = files[0]
    try:
        parts = read_parts(file)
        ids = dict(parts.get("vocabulary", {}))
        if file.name != "tokenizer.json":
            ids |= _added_beside(folder, files)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} is {error}. Copy the tokenizer again.") from None
    return Tokens(file, ids, _kind(file, parts))


def _tokens_or_none(folder: Path) -> Tokens | None:
    try:
        return read_tokens(folder)
    except CheckpointError:
        return None


def _added_beside(folder: Path, files: Sequence[Path]) -> dict[str, int]:
    """Return the tokens that a folder adds to a vocabulary in another file."""
    added: dict[str, int] = {}
    for file in files:
        if file.name == "added_tokens.json":
            added |= read_parts(file)["vocabulary"]
    listed = _json_or_empty(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for row, token in listed.items() if isinstance(listed, dict) else ():
        if row.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
            added[token["content"]] = int(row)
    return added


def _kind(file: Path, parts: Parts) -> str:
    model = parts.get("model", {})
    if file.name != "tokenizer.json":
        if file.name == "vocab.txt":
            return "plain"
        return "sentencepiece" if "kinds" in parts else "byte-level"
    rules = repr([parts["normalizer"], parts["pre_tokenizer"]])
    if "ByteLevel" in rules:
        return "byte-level"
    is_piecewise = model["type"] == "Unigram" or "▁" in rules or model.get("byte_fallback")
    return "sentencepiece" if is_piecewise else "plain"


def _json_or_empty(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_bounded(file))
    except (ValueError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def _warn_of_templates(folders: Sequence[Path], allow: Sequence[str]) -> None:
    templates = {folder: text for folder in folders if (text := _chat_template(folder))}
    if not templates or is_allowed("tokenizer.chat_template", allow):
        return
    (first, ours), *others = templates.items()
    for folder, theirs in others:
        if ours != theirs:
            _LOG.warning(
                "chat_template differs between %s (%s) and %s (%s). The output gets that of the first input that has "
                "one; --allow chat_template accepts this.",
                first,
                shown(ours, 40),
                folder,
                shown(theirs, 40),
            )


def _chat_template(folder: Path) -> Any:
    """Return a folder's chat template, wherever a version of transformers stores it."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return read_bounded(file).decode("utf-8", "replace").strip()
        except (OSError, ValueError):
            return None
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _json_or_empty(folder / name).get("chat_template")
        if template:
            return template.strip() if isinstance(template, str) else template
    return None
