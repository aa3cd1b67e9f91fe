"""The files of each domain's text. Paths and globs are resolved once, so that every later step reads the same files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from btm_scale.config.data import DomainConfig
from btm_scale.data.files import SourceFile, is_utf8
from btm_scale.data.locations import matches_of
from btm_scale.errors import DataError


@dataclass(frozen=True)
class DomainSource:
    """A domain's text: its files, sorted by name, and how they are read and split."""

    name: str
    files: tuple[SourceFile, ...]
    settings: DomainConfig
    tokenizer: Path | None = (
        None  # directory of the one that made token files, or whose chat template renders conversations
    )
    text_root: Path = Path()

    @property
    def is_grouped(self) -> bool:
        """Whether documents are placed in splits by their file or a field instead of their own text."""
        return self.settings.split_by not in ("document", "position")

    @property
    def may_be_cut(self) -> bool:
        """Whether a split may begin inside a document: neither in conversations nor if documents are grouped."""
        return not self.is_grouped and self.settings.chat is None

    @property
    def bytes(self) -> int:
        """The size of the (compressed) files on disk."""
        return sum(file.stat().st_size for file in self.files)


def resolve_sources(
    domains: Mapping[str, DomainConfig], text_root: Path, tokenizer: Path | None = None
) -> list[DomainSource]:
    """Return the source of every domain, in the given order. Raises one DataError with the problems of all domains.

    `tokenizer`: the directory of the tokenizer with which token files are read.
    """
    sources, problems = [], []
    for name, settings in domains.items():
        try:
            sources.append(replace(resolve_domain(name, settings, text_root), tokenizer=tokenizer))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return sources


def resolve_domain(name: str, settings: DomainConfig, text_root: Path) -> DomainSource:
    """Return the source of one domain; a file that several patterns match is included once.

    Raises a DataError that lists every path or glob without a readable file.
    """
    files: dict[str, SourceFile] = {}
    problems = []
    for pattern in settings.text or _pairs(settings.token_files):
        try:
            matches = matches_of(pattern, text_root)
        except DataError as error:
            problems.append(f"domain '{name}': {error}")
            continue
        broken = [path for path in matches if isinstance(path, Path) and path.is_symlink() and not path.exists()]
        problems += [
            f"domain '{name}': {path} is a link to {path.readlink()}, which does not exist. Restore it, or remove the "
            "link."
            for path in broken
        ]
        paths = [path for path in matches if path.is_file()]
        if not paths and not broken:
            problems.append(_no_match(name, pattern, text_root, matches))
        if settings.token_files:
            if any(not isinstance(path, Path) for path in paths):
                problems.append(
                    f"domain '{name}': '{pattern}' is remote. Token files are read in place: copy them here."
                )
                continue
            paths += [path.with_suffix(".bin") for path in paths]
            missing = [path for path in paths if not path.is_file()]
            problems += [
                f"domain '{name}': {path} is missing. Token files are a pair, PREFIX.bin and PREFIX.idx: copy both."
                for path in missing
            ]
            paths = [path for path in paths if path not in missing]
        for path in paths:
            if isinstance(path, Path) and not os.access(path, os.R_OK):
                problems.append(f"domain '{name}': {path} is not readable. Change its permissions, or remove it.")
            file_name = path.relative_to(text_root).as_posix() if path.is_relative_to(text_root) else str(path)
            if not is_utf8(file_name):
                problems.append(f"domain '{name}': the file name {file_name!r} is not UTF-8. Rename the file.")
            files[file_name] = SourceFile(path, file_name)
    if problems:
        raise DataError("\n".join(problems))
    return DomainSource(name, tuple(files[file_name] for file_name in sorted(files)), settings, None, text_root)


def _pairs(prefixes: Sequence[str]) -> list[str]:
    """Return the index of each prefix of token files, which may be given with the suffix of one of the two files."""
    return [f"{prefix.removesuffix('.bin').removesuffix('.idx')}.idx" for prefix in prefixes]


def _no_match(name: str, pattern: str, text_root: Path, matches: list[Path]) -> str:
    is_absolute = Path(pattern).is_absolute() or "://" in pattern
    start = f"domain '{name}': '{pattern}' matches no file" + ("" if is_absolute else f" below {text_root}")
    if matches:
        return f"{start}, only folders. Name files in them, such as '{pattern.rstrip('/')}/**/*.txt'."
    if is_absolute:
        return f"{start}. Correct the path."
    return f"{start}. Correct the path, or set text_root to the folder that it is relative to."
