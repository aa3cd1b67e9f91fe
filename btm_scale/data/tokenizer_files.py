"""The files of a tokenizer's directory: which of them is used, and which determine the ids of a text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from btm_scale.errors import DataError
from btm_scale.util.bounded_json import shown
from btm_scale.util.inside import file_inside
from btm_scale.util.records import read_object

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGING_FACE_FILE = "tokenizer.json"
TEKKEN_FILE = "tekken.json"
CHAT_TEMPLATE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of .jinja files
# In the tokenizer of a run: each document begins with the BOS token.
DOCUMENT_START = "document_start.json"
# The files that determine the ids of a text; others in a tokenizer's directory do not affect them.
IDENTITY_FILES = (
    SENTENCEPIECE_FILE,
    HUGGING_FACE_FILE,
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    TEKKEN_FILE,
    DOCUMENT_START,
)
_HUGGING_FACE_FILES = (HUGGING_FACE_FILE, "vocab.json", "vocab.txt")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_TIKTOKEN_NAMES = re.compile(r".*\.tiktoken|tiktoken\.model")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,9}\r?\n")

Kind = Literal["sentencepiece", "transformers", "tekken"]


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory has the vocabulary of a tokenizer, in whatever form."""
    names = (SENTENCEPIECE_FILE, TEKKEN_FILE, *_HUGGING_FACE_FILES)
    return any((directory / name).is_file() for name in names) or bool(tiktoken_files(directory))


def kind_of(directory: Path) -> Kind:
    """Return which library loads the tokenizer in a directory.

    A sentencepiece model comes first, then the files of Hugging Face, then tekken.json. Raises DataError if only
    tiktoken files are there.
    """
    if (directory / SENTENCEPIECE_FILE).is_file() and not _is_tiktoken(directory / SENTENCEPIECE_FILE):
        return "sentencepiece"
    if any((directory / name).is_file() for name in _HUGGING_FACE_FILES):
        return "transformers"
    if (directory / TEKKEN_FILE).is_file():
        return "tekken"
    if files := tiktoken_files(directory):
        raise DataError(
            f"{directory / files[0]} is a tiktoken file: it has the tokens, but neither the pattern that cuts text "
            "nor the special tokens, which are in the code of its model. A tokenizer needs all three: copy the "
            "tokenizer.json of the model's Hugging Face version, or write one with "
            "transformers.integrations.tiktoken.convert_tiktoken_to_fast and a tokenizer_config.json with eos_token."
        )
    return "transformers"


def require_contents(directory: Path) -> None:
    """Raise DataError if a file of a tokenizer is only Git LFS's pointer to it."""
    for name in (*IDENTITY_FILES, "tokenizer_config.json"):
        if _head(directory / name, len(_LFS_POINTER)) == _LFS_POINTER:
            raise DataError(
                f"{directory / name} is a Git LFS pointer, not the file itself. A tokenizer is loaded from complete "
                "files: run `git lfs pull` in its repository."
            )


def tiktoken_files(directory: Path) -> list[str]:
    """Return the names of the files with tokens of tiktoken; Llama 3's is called tokenizer.model."""
    if not directory.is_dir():
        return []
    named = sorted(path.name for path in directory.iterdir() if _TIKTOKEN_NAMES.fullmatch(path.name))
    return named + ([SENTENCEPIECE_FILE] if _is_tiktoken(directory / SENTENCEPIECE_FILE) else [])


def main_file(directory: Path) -> str:
    """Return the name of the file with a tokenizer's vocabulary; "" if there is none."""
    names = (name for name in IDENTITY_FILES if name != DOCUMENT_START and (directory / name).is_file())
    return next(names, "")


def added_ids(directory: Path) -> list[int]:
    """Return the ids that Hugging Face files add to a sentencepiece vocabulary. Raises DataError if one is invalid."""
    ids: list[int] = []
    if (path := file_inside(directory, "added_tokens.json")).is_file():
        ids += (_token_id(path, name, value) for name, value in read_object(path, DataError).items())
    if (path := file_inside(directory, "tokenizer_config.json")).is_file():
        decoder = read_object(path, DataError).get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise DataError(f"{path}: 'added_tokens_decoder' must be an object. Copy the tokenizer again.")
        ids += (_token_id(path, key, int(key) if key.isdecimal() and len(key) < 11 else key) for key in decoder)
    return ids


def _token_id(path: Path, name: str, value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise DataError(
            f"{path}: '{name:.80}' must be the id of a token and is {shown(value)}. Copy the tokenizer again."
        )
    return value


def _head(path: Path, size: int) -> bytes:
    """Return the first bytes of a regular file, or b"" for any other path; loading it reports the error."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def _is_tiktoken(path: Path) -> bool:
    """Return whether a file has tiktoken's lines, a token in base64 and its rank."""
    try:
        with path.open("rb") as file:
            lines = [file.readline(1 << 12) for _ in range(3)]
    except OSError:
        return False
    return bool(lines[0]) and all(_TIKTOKEN_LINE.fullmatch(line) for line in lines if line)
