"""The demo's four domains, from text that every installation of this project has: nothing is downloaded.

Other installed packages do not change the text: it comes from Python's standard library and a fixed list of
packages that this project needs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any

from btm_scale.errors import DataError

_DOCUMENT_BYTES = 32_000
_SECTION_BYTES = 4_000
_LEAST_CHARACTERS = 200
# Longer files are tables or generated code.
_LONGEST_FILE = 400_000
_LICENCE = re.compile(r"licen[sc]e|notice|copying|third.?party", re.IGNORECASE)
_TESTS = {"test", "tests", "testing", "idle_test", "__pycache__"}
# Tables of characters, grammars and topics, and packages that are not part of the library.
_NOT_CODE = {"encodings", "pydoc_data", "lib2to3", "site-packages", "dist-packages", "ensurepip"}
_GENERATED = re.compile(
    r"@generated|\b(?:auto(?:matically)?[- ]?)?generated (?:by|from|file|code)|do not (?:edit|modify)|code generator",
    re.IGNORECASE,
)
_HEAD = 1_500  # characters of a file in which it says that it is generated
_LEAST_LETTERS = 0.55  # as a fraction of a file's characters other than spaces; tables have fewer
# Distributions whose licences and descriptions are text of the demo.
_PACKAGES = (
    "torch",
    "numpy",
    "pyarrow",
    "deepspeed",
    "megatron-core",
    "transformers",
    "tokenizers",
    "huggingface-hub",
    "safetensors",
    "sentencepiece",
    "pydantic",
    "pydantic-core",
    "rich",
    "typer",
    "jinja2",
    "psutil",
    "zstandard",
    "ninja",
    "sympy",
    "networkx",
    "fsspec",
    "filelock",
    "packaging",
    "tqdm",
    "regex",
    "pyyaml",
    "requests",
    "setuptools",
    "ruamel.yaml",
    "pygments",
    "markdown-it-py",
    "typing-extensions",
    "einops",
    "hjson",
    "msgpack",
    "mpmath",
)

Text = tuple[str, str]
Files = Iterable[tuple[str, Path]]  # names and paths


def write_installed_text(
    folder: Path, *, bytes_per_domain: int, longest: int = _DOCUMENT_BYTES
) -> dict[str, dict[str, Any]]:
    """Write `python`, `cpp`, `licences` and `docs`, each a .jsonl file with the fields text and source.

    Returns the `domains` of a config, with paths relative to `folder`. The selection depends only on the installed
    packages and is spread over them. A domain has at most `bytes_per_domain` bytes of text, a document `longest` bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    include = _torch() / "include"
    domains = {
        "python": _texts(_below(library, "python", ("*.py",)), _is_code),
        "cpp": _texts(_below(include, "torch/include", ("*.h", "*.hpp", "*.cuh")), _is_code),
        "licences": _without_near_copies(_texts(_in_packages(_is_licence))),
        "docs": _docs(),
    }
    for name, texts in domains.items():
        most = min(longest, _SECTION_BYTES) if name == "licences" else longest
        _write(folder / f"{name}.jsonl", _cut(texts, most), bytes_per_domain)
    # There are few licences, and two hold half of the text, so their sections are split, not their sources.
    return {
        name: {"text": [f"{name}.jsonl"]} | ({} if name == "licences" else {"split_by": {"field": "source"}})
        for name in domains
    }


def _torch() -> Path:
    """Return the folder of the installed torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("torch is not installed as a folder of files. Install the project's dependencies with pip.")
    return Path(next(iter(spec.submodule_search_locations)))


def _write(path: Path, texts: Iterator[Text], limit: int) -> None:
    size = 0
    with path.open("wb") as file:
        for source, text in texts:
            size += len(text.encode())
            if size > limit:
                break
            file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False).encode() + b"\n")


def _cut(texts: Iterator[Text], longest: int) -> Iterator[Text]:
    """Yield every text in parts of at most `longest` bytes that end with a line, without repeated parts."""
    seen = set()
    for source, text in texts:
        for part in _parts(text, longest):
            digest = hashlib.sha256(part.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                yield source, part


def _parts(text: str, longest: int) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        size += len(line.encode())
        if lines and size > longest:
            yield "".join(lines)
            lines, size = [], len(line.encode())
        lines.append(line)
    yield "".join(lines)


def _below(root: Path, prefix: str, patterns: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Yield the files below a folder, each with its name: the prefix and its path."""
    for path in {path for pattern in patterns for path in root.rglob(pattern)}:
        yield f"{prefix}/{path.relative_to(root).as_posix()}", path


def _in_packages(wanted: Callable[[PurePath], bool]) -> Iterator[tuple[str, Path]]:
    """Yield the files of the packages, each with its name: the package and its path without the version."""
    for name, package in _installed():
        for file in package.files or ():
            folder = "dist-info" if file.parts[0].endswith(".dist-info") else file.parts[0]
            if wanted(file):
                yield "/".join((name, folder, *file.parts[1:])), Path(str(package.locate_file(file)))


def _installed() -> Iterator[tuple[str, metadata.Distribution]]:
    for name in _PACKAGES:
        try:
            yield name, metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue


def _texts(files: Files, wanted: Callable[[str, str], bool] = lambda name, text: True) -> Iterator[Text]:
    """Yield texts with their names, taking the packages or folders in turn, each in the order of a hash."""
    packages: dict[str, list[tuple[str, Path]]] = {}
    for name, path in files:
        parts = name.split("/")
        if not _TESTS.intersection(parts):
            packages.setdefault("/".join(parts[:2]) if len(parts) > 2 else parts[0], []).append((name, path))
    columns = [sorted(listed, key=lambda file: _order(file[0])) for _, listed in sorted(packages.items())]
    for turn in zip_longest(*columns):
        for source, path in filter(None, turn):
            text = _read(path)
            if text is not None and wanted(source, text):
                yield source, text


def _order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _read(path: Path) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > _LONGEST_FILE:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if len(text) >= _LEAST_CHARACTERS else None


def _is_code(name: str, text: str) -> bool:
    """Return whether a file is code that people wrote: not generated, and not a table of data."""
    if "generated" in name or not _NOT_CODE.isdisjoint(name.split("/")) or _GENERATED.search(text[:_HEAD]):
        return False
    visible = [character for character in text if not character.isspace()]
    return sum(map(str.isalpha, visible)) >= _LEAST_LETTERS * len(visible)


def _is_licence(place: PurePath) -> bool:
    return bool(_LICENCE.search(place.name)) and place.suffix.lower() in ("", ".txt", ".md", ".rst")


def _without_near_copies(texts: Iterator[Text]) -> Iterator[Text]:
    """Drop texts most of whose lines are in earlier ones: licences are copied with few changes."""
    seen: set[str] = set()
    for source, text in texts:
        lines = {"".join(line.lower().split()) for line in text.splitlines() if "copyright" not in line.lower()}
        long_lines = {line for line in lines if len(line) > 30}
        if 2 * len(long_lines & seen) <= len(long_lines):
            yield source, text
        seen |= long_lines


def _docs() -> Iterator[Text]:
    """Yield prose about software: package descriptions, README files and Python's language reference."""
    from pydoc_data.topics import topics

    for name, package in _installed():
        description = package.read_text("METADATA") or ""
        _, _, description = description.partition("\n\n")
        if len(description) >= _LEAST_CHARACTERS:
            yield f"{name}/METADATA", description
    for topic in sorted(topics, key=_order):
        if len(topics[topic]) >= _LEAST_CHARACTERS:
            yield f"pydoc_data/topics/{topic}", topics[topic]
    yield from _texts(_in_packages(lambda place: place.suffix in (".md", ".rst") and not _is_licence(place)))
