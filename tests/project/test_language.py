"""Docs, help texts and messages are in the field's English: helpers/house_style.py has the phrases to avoid."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli_help import help_texts
from helpers.house_style import Hit, hits

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("btm_scale", "kernels", "launch")
TEMPLATES = (".jinja", ".html", ".sh")  # the page, and job scripts that a user reads

# (file, phrase): why it may stay. At most 20.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def check(found: Iterator[Hit]) -> None:
    """Fail with one line per hit that is not an exception."""
    lines = [str(hit) for hit in found if (hit.file, hit.phrase.lower()) not in EXCEPTIONS]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string of three words or more in a source file, without docstrings.

    That is what can be raised, logged, printed or shown on the page, f-strings included. A template is one text.
    """
    if path.suffix in TEMPLATES:
        yield 1, path.read_text()
    if path.suffix != ".py":
        return
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()  # docstrings, and the parts of f-strings
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            skipped.update(id(part) for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in skipped:
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
            if len(text.split()) > 2:
                yield node.lineno, text


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docs_use_the_fields_english(page: Path) -> None:
    check(hits(str(page.relative_to(ROOT)), page.read_text()))


@pytest.mark.parametrize("folder", FOLDERS)
def test_messages_use_the_fields_english(folder: str) -> None:
    found = (
        hit
        for path in sorted((ROOT / folder).rglob("*"))  # which does not follow the links to the other folders
        for line, text in sentences(path)
        for hit in hits(str(path.relative_to(ROOT)), text, line)
    )
    check(found)


@pytest.mark.slow
def test_help_uses_the_fields_english() -> None:
    found = (hit for verb, text in help_texts().items() for hit in hits(f"btm-scale {verb} --help", text))
    check(found)


def test_exceptions_are_few_and_each_has_a_reason() -> None:
    assert len(EXCEPTIONS) <= 20
    assert all(EXCEPTIONS.values())
    stale = [(file, phrase) for file, phrase in EXCEPTIONS if phrase not in (ROOT / file).read_text().lower()]
    assert stale == []


def test_a_phrase_is_found_across_lines_and_in_an_f_string(tmp_path: Path) -> None:
    page = list(hits("page.md", "First.\nThe run goes\non from here; its standard output is no\nlonger kept.\n"))
    assert [(hit.line, hit.phrase) for hit in page] == [(2, "goes on")]
    source = tmp_path / "module.py"
    source.write_text('"""This goes on."""\nraise ValueError(\n    f"{name!r} is no model; " "give a model"\n)\n')
    found = [hit for line, text in sentences(source) for hit in hits("module.py", text, line)]
    assert [str(hit) for hit in found] == ["module.py:3: 'is no' -> is not a ..., invalid"]
