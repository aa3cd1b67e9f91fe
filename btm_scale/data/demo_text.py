"""The demo's four domains, from text that every installation of this project has: nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sysconfig
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from btm_scale.errors import DataError

_DOCUMENT_BYTES = 32_000
_SECTION_BYTES = 4_000
_LEAST_CHARACTERS = 200
# Longer files are tables or generated code.
_LONGEST_FILE = 400_000
_LICENCE = re.compile(r"licen[sc]e|notice|copying|third.?party", re.IGNORECASE)
_TESTS = {"test", "tests", "testing", "idle_test", "__pycache__"}

Text = tuple[str, str]


def write_installed_text(
    folder: Path, *, bytes_per_domain: int, longest: int = _DOCUMENT_BYTES
) -> dict[str, dict[str, Any]]:
    """Write `python`, `cpp`, `licences` and `docs`, each a .jsonl file with the fields text and source.

    Returns the `domains` of a config, with paths relative to `folder`. The selection depends only on the installed
    packages and is spread over them. A domain has at most `bytes_per_domain` bytes of text, a document `longest` bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    site, torch = _packages()
    library = Path(sysconfig.get_paths()["stdlib"])
    domains = {
        "python": _texts({"python": library, "site-packages": site}, ("*.py",), _is_python),
        "cpp": _texts({"torch/include": torch / "include"}, ("*.h", "*.hpp", "*.cuh"), _is_anything),
        "licences": _without_near_copies(_texts({"site-packages": site}, ("*",), _is_licence)),
        "docs": _docs(site),
    }
    for name, texts in domains.items():
        most = min(longest, _SECTION_BYTES) if name == "licences" else longest
        _write(folder / f"{name}.jsonl", _cut(texts, most), bytes_per_domain)
    # There are few licences, and two hold half of the text, so their sections are split, not their sources.
    return {
        name: {"text": [f"{name}.jsonl"]} | ({} if name == "licences" else {"split_by": {"field": "source"}})
        for name in domains
    }


def _packages() -> tuple[Path, Path]:
    """Return the folder of installed packages, and torch's folder in it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("torch is not installed as a folder of files. Install the project's dependencies with pip.")
    torch = Path(next(iter(spec.submodule_search_locations)))
    return torch.parent, torch


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


def _texts(roots: dict[str, Path], patterns: tuple[str, ...], wanted: Any) -> Iterator[Text]:
    """Yield files below `roots` with their names, from one package after the other in turn, in the order of a hash."""
    packages: dict[str, list[tuple[str, Path]]] = {}
    for prefix, root in roots.items():
        for path in {path for pattern in patterns for path in root.rglob(pattern)}:
            place = path.relative_to(root)
            if wanted(place) and not _TESTS.intersection(place.parts):
                package = place.parts[0] if len(place.parts) > 1 else ""
                name = f"{prefix}/{place.as_posix()}"
                packages.setdefault(f"{prefix}/{package}", []).append((name, path))
    columns = [sorted(files, key=lambda file: _order(file[0])) for _, files in sorted(packages.items())]
    for turn in zip_longest(*columns):
        for source, path in filter(None, turn):
            if (text := _read(path)) is not None:
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
    return text if len(text) >= _LEAST_CHARACTERS and "@generated" not in text[:300] else None


def _is_anything(place: Path) -> bool:
    return True


def _is_python(place: Path) -> bool:
    return "site-packages" not in place.parts


def _is_licence(place: Path) -> bool:
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


def _docs(site: Path) -> Iterator[Text]:
    """Yield prose about software: package descriptions, README files and Python's language reference."""
    from pydoc_data.topics import topics

    for path in sorted(site.glob("*.dist-info/METADATA")):
        _, _, description = (_read(path) or "").partition("\n\n")
        if len(description) >= _LEAST_CHARACTERS:
            yield f"site-packages/{path.parent.name}/METADATA", description
    for name in sorted(topics, key=_order):
        if len(topics[name]) >= _LEAST_CHARACTERS:
            yield f"pydoc_data/topics/{name}", topics[name]
    yield from _texts({"site-packages": site}, ("*.md", "*.rst"), lambda place: not _is_licence(place))
