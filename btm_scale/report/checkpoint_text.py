"""A checkpoint in a few lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from btm_scale.report.quantities import size


def checkpoint_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that describe a checkpoint, given what `inspect` answers under --json."""
    yield f"{facts['path']}: {', '.join(_kind(facts))}"
    yield _row("weights", f"{facts['parameters']:,} parameters in {facts['tensors']:,} tensors: {_types(facts)}")
    number = len(facts["files"])
    yield _row("files", f"{number:,} {'file' if number == 1 else 'files'}, {size(sum(facts['files'].values()))}")
    if facts["problem"]:
        yield _row("problem", facts["problem"])
    if facts["converts_to"]:
        yield _row("convert", f"to {_choice(facts['converts_to'])}{_degrees(facts)}")


def _degrees(facts: Mapping[str, Any]) -> str:
    if facts["tensor_degrees"]:
        return f", at tensor parallel degree {_choice(facts['tensor_degrees'])}"
    return "" if facts["problem"] else "; config.json does not describe a dense model of a supported family"


def _kind(facts: Mapping[str, Any]) -> Iterator[str]:
    yield facts["format"]
    yield facts["family"] or "no model family"
    if facts["step"] is not None:
        yield f"step {facts['step']:,}"
    if facts["tensor_degree"] is not None:
        yield f"tensor parallel degree {facts['tensor_degree']}"


def _types(facts: Mapping[str, Any]) -> str:
    """Return the only dtype, or the elements of each."""
    if len(facts["dtypes"]) == 1:
        return str(*facts["dtypes"])
    return ", ".join(f"{elements:,} {dtype}" for dtype, elements in facts["dtypes"].items()) or "none"


def _choice(options: Sequence[object]) -> str:
    """Return `a`, `a or b`, or `a, b or c`."""
    *first, last = map(str, options)
    return f"{', '.join(first)} or {last}" if first else last


def _row(name: str, text: str) -> str:
    return f"  {name:<8} {text}"
