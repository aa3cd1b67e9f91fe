"""The docs are true: generated tables are up to date, links lead somewhere, commands and files exist."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli_help import help_texts, options_of

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = "benchmarks|btm_scale|configs|docs|kernels|launch|tests"


def test_generated_figures_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "write_docs", raising=False)
    import write_docs

    files = write_docs.rendered()
    pages = {"README.md", "results.md", "serving.md", "moe.md", "mixtures.md", "config.md", "claims.md"}
    drawn = {path.name for path in (ROOT / "docs" / "images").glob("*.svg")}
    assert {path.name for path in files} == pages | drawn
    stale = [path.name for path, content in files.items() if path.read_text() != content]
    assert stale == [], "run `python benchmarks/write_docs.py`"


def test_every_committed_result_is_on_the_results_page() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    tables = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("doc_*.py"))
    shown = set(re.findall(r"`(\w+)\.json`", page) + re.findall(r"""_read\(["'](\w+)["']\)""", tables))
    assert {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")} - shown == set()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (heading and heading not in anchors(file)):
            dead.append(target)
    assert dead == []


def test_the_index_lists_every_page_in_order() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    listed = re.findall(r"^\d+\. \[[^]]+\]\(([\w-]+\.md)\):", index, re.MULTILINE)
    assert sorted([*listed, "index.md"]) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert listed[0] == "install.md"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(rf"(?<![\w/.])((?:{FOLDERS})/[\w./-]*\w)", page.read_text())
    absent = [name for name in named if not (ROOT / name).exists()]
    assert [name for name in absent if name not in FILES_TO_BE_WRITTEN] == []


# Examples of CONTRIBUTING.md, and what a benchmark on a GPU will write.
FILES_TO_BE_WRITTEN = {"launch/toy.py", "tests/gpu"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_exist_with_every_option_that_is_used(page: Path) -> None:
    wrong = []
    for command in commands(page.read_text()):
        verb, words = verb_of(command)
        if verb not in help_texts():
            wrong.append(f"{command}: no verb '{verb}'")
        else:
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            wrong += [f"{command}: no option {option}" for option in sorted(used - options_of(verb))]
    assert wrong == []


def test_commands_are_found_in_blocks_and_in_sentences() -> None:
    block = "    btm-scale run A.yaml \\\n        --set x=1   # comment\n"
    page = f"Call `btm-scale status RUN`:\n\n{block}\nThen btm-scale merges.\n"
    assert list(commands(page)) == ["btm-scale status RUN", "btm-scale run A.yaml --set x=1"]
    assert verb_of("btm-scale forest add RUN --name x") == ("forest add", ["RUN", "--name", "x"])


def commands(text: str) -> Iterator[str]:
    """Every `btm-scale VERB ...` of a page, in code spans and in code blocks, without comments."""
    text = re.sub(r"\\\n\s*", "", text)
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(
        r"(?:^(?: {4}|\t).*\n?)+", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.M
    )
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for line in [*spans, *"\n".join([*blocks, *indented]).splitlines()]:
        for part in re.split(r"&&|\s#\s.*|;", line):
            match = re.search(r"(?:^|\s)(btm-scale [a-z].*)", part or "")
            if match:
                yield re.sub(r"\s+", " ", match[1]).strip()


def verb_of(command: str) -> tuple[str, list[str]]:
    """The verb of a command, and the words behind it."""
    words = shlex.split(command)[1:]
    count = 2 if words[0] == "forest" and len(words) > 1 else 1
    return " ".join(words[:count]), words[count:]


def anchors(page: Path) -> set[str]:
    """The names by which a code host links to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
