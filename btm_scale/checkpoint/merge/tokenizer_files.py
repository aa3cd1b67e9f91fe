"""Read tokenizer files of every form as data: what each says is split into named parts that can be compared."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from btm_scale.checkpoint.formats.based import is_adapter
from btm_scale.checkpoint.formats.locate import described_in
from btm_scale.util.bounded_json import parse_json, read_bounded

Parts = dict[str, Any]
"""What a tokenizer does, by `vocabulary` (id by token), `merges`, `added_tokens`, `normalizer` and so on."""

_SENTENCEPIECE = re.compile(r".*\.(?:model|spm)(?:\.v\d+)?")
_TOKEN_IDS = ("vocab.json", "encoder.json", "added_tokens.json")
_MERGES = ("merges.txt", "vocab.bpe", "bpe.codes")
# In the order in which a model's vocabulary is taken from them.
_FORMS = (
    re.compile(r"tokenizer\.json"),
    re.compile(r"tekken\.json"),
    re.compile(r".*\.tiktoken"),
    _SENTENCEPIECE,
    re.compile(r"vocab\.json|encoder\.json"),
    re.compile(r"vocab\.txt"),
    re.compile(r"added_tokens\.json|merges\.txt|vocab\.bpe|bpe\.codes"),
)


def _byte_letters() -> dict[int, str]:
    """Return GPT-2's printable letter for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_LETTERS = _byte_letters()


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the tokenizer files of a folder, those that define the vocabulary first."""
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return [file for form in _FORMS for file in files if form.fullmatch(file.name)]


def tokenizer_folder(path: Path) -> Path:
    """Return the folder with a model's tokenizer; one that was saved with an adapter may have more tokens."""
    return path if is_adapter(path) and tokenizer_files(path) else described_in(path)


def read_parts(file: Path) -> Parts:
    """Return what a tokenizer file says. Raises `ValueError` with a reason if it is not in a known form; `OSError`."""
    content = read_bounded(file)
    try:
        if file.name == "tokenizer.json":
            return _fast(_object(parse_json(content)))
        if file.name == "tekken.json":
            return _tekken(_object(parse_json(content)))
        if file.name in _TOKEN_IDS:
            return {"vocabulary": _ids(_object(parse_json(content)))}
        if file.name in _MERGES:
            lines = content.decode("utf-8").splitlines()
            return {"merges": [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]}
        if file.name == "vocab.txt":
            return {"vocabulary": {line: i for i, line in enumerate(content.decode("utf-8").splitlines())}}
        return _tiktoken(content) or _sentencepiece(content)
    except (KeyError, TypeError, IndexError, AttributeError, struct.error, OverflowError) as error:
        raise ValueError(f"not in the form of {file.name} ({type(error).__name__}: {error})") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, and must be an object")
    return value


def _ids(values: Mapping[str, Any]) -> dict[str, int]:
    for token, row in values.items():
        if type(row) is not int or not 0 <= row < 1 << 31:
            raise ValueError(f"invalid: the id of the token {token[:60]!r} is not a natural number")
    return dict(values)


def _fast(content: dict[str, Any]) -> Parts:
    """Return the parts of a tokenizer.json. `truncation`, `padding` and `decoder` do not change ids."""
    model = content["model"]
    vocabulary = model["vocab"]
    parts: Parts = {}
    if isinstance(vocabulary, list):  # of Unigram: pairs of piece and score
        parts["scores"] = [score for _, score in vocabulary]
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    added = content.get("added_tokens") or []
    normalizer = _component(content.get("normalizer"))
    flags = ["lstrip", "rstrip", "single_word"] + (["normalized"] if normalizer else [])
    rest = {key: value for key, value in model.items() if key not in ("vocab", "merges", "dropout", "type") and value}
    return parts | {
        "vocabulary": _ids({**vocabulary, **{token["content"]: token["id"] for token in added}}),
        "model": {"type": model.get("type") or "BPE"} | rest,
        "merges": [
            tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model.get("merges") or []
        ],
        "added_tokens": {token["content"]: [flag for flag in flags if token.get(flag)] for token in added},
        "normalizer": normalizer,
        "pre_tokenizer": _component(content.get("pre_tokenizer")),
        "post_processor": _component(content.get("post_processor"), processor=True),
    }


def _component(value: Any, *, processor: bool = False) -> Any:
    """Return a component without what has no effect, and with defaults that some versions leave out."""
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if kind == "Sequence":
        key = next(name for name in ("processors", "pretokenizers", "normalizers") if name in value)
        inner = [part for each in value[key] if (part := _component(each, processor=processor)) is not None]
        return {"type": kind, "parts": inner} if len(inner) > 1 else inner[0] if inner else None
    if kind == "ByteLevel":  # as a processor it changes offsets only
        return (
            None
            if processor
            else {
                "type": kind,
                "add_prefix_space": value.get("add_prefix_space", True),
                "use_regex": value.get("use_regex", True),
            }
        )
    if kind == "Metaspace":
        scheme = value.get("prepend_scheme") or ("always" if value.get("add_prefix_space", True) else "never")
        return {
            "type": kind,
            "replacement": value.get("replacement"),
            "prepend_scheme": scheme,
            "split": value.get("split", True),
        }
    return {key: each for key, each in value.items() if key != "trim_offsets" and each is not None}


def _tekken(content: dict[str, Any]) -> Parts:
    settings = content["config"]
    special = int(settings["default_num_special_tokens"])
    most = int(settings["default_vocab_size"]) - special
    tokens = {
        text_of(base64.b64decode(entry["token_bytes"])): special + int(entry["rank"]) for entry in content["vocab"]
    }
    named = {entry["token_str"]: int(entry["rank"]) for entry in content.get("special_tokens") or []}
    return {
        "vocabulary": _ids({**{token: row for token, row in tokens.items() if row < special + most}, **named}),
        "added_tokens": {token: [] for token in named},
        "pre_tokenizer": settings.get("pattern"),
    }


def text_of(token: bytes) -> str:
    """Return a token's bytes in the letters of byte-level tokenizers."""
    return "".join(BYTE_LETTERS[byte] for byte in token)


def _tiktoken(content: bytes) -> Parts | None:
    """Return the tokens of lines of base64 and rank, or None if a line is something else."""
    tokens: dict[str, int] = {}
    for line in content.splitlines():
        match = re.fullmatch(rb"([A-Za-z0-9+/]+=*) (\d{1,9})", line)
        if match is None:
            return None
        tokens[text_of(base64.b64decode(match[1]))] = int(match[2])
    return {"vocabulary": tokens} if tokens else None


def _sentencepiece(content: bytes) -> Parts:
    """Return the pieces and rules of a sentencepiece model, a protocol buffer."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode("utf-8"), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, 1)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("not a sentencepiece model: it has no pieces")
    return {
        "vocabulary": {piece: i for i, (piece, _, _) in enumerate(pieces)},
        "scores": [score for _, score, _ in pieces],
        "kinds": [kind for _, _, kind in pieces],
        "model": {number: trainer.get(number) for number in (3, 24, 35) if trainer.get(number)},
        "normalizer": [normalizer.get(2) or b"", *(normalizer.get(number, 1) for number in (3, 4, 5))],
    }


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of every field of a protocol buffer: an integer, or bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(message, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("not a sentencepiece model")
        if position + size > len(message):
            raise ValueError("truncated")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = message[position]
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("not a sentencepiece model")
