"""Tables of the kernels' resources, of the scoring kernel's grids, and of the mixing kernels' host time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rows = list[list[str]]
_SHOWN = ("score_kernel", "mix_kernel", "draw_kernel", "normalizer_kernel")
_BESIDE = "beside"


def resource_rows(result: dict[str, Any]) -> Rows:
    """Return a row per configuration of the scoring and mixing kernels, and of every kernel on an H100."""
    names = ["kernel", "GPU", "block", "instructions per element", "registers", "shared memory", "blocks per SM"]
    rows = [names]
    older = _first_of_each(result["kernels"]["oldest"])
    for key, row in sorted(_first_of_each(result["kernels"]["pinned"]).items(), key=lambda item: _order(item[1])):
        if row["arch"] != "sm_90" and row["kernel"] not in _SHOWN:
            continue
        other = older[key]
        cells = [
            _both(row, other, lambda row: f"{row['instructions']:.1f}" if "instructions" in row else "-"),
            _both(row, other, lambda row: str(row["registers"])),
            _both(row, other, lambda row: _size(row["shared_bytes"])),
            _both(row, other, lambda row: str(row["resident"])),
        ]
        rows.append([f"`{row['kernel']}`", row["arch"], f"{row['blocks']}, {row['warps']} warps", *cells])
    return rows


def grid_rows(result: dict[str, Any]) -> Rows:
    """Return the programs of the scoring kernel for each number of tokens and vocabulary size."""
    vocabularies = sorted({row["vocabulary"] for row in result["grids"]})
    programs = {(row["tokens"], row["vocabulary"]): row["programs"] for row in result["grids"]}
    rows = [["tokens", *(f"vocabulary {size:,}" for size in vocabularies)]]
    for tokens in sorted({row["tokens"] for row in result["grids"]}):
        rows.append([f"{tokens:,}", *(f"{programs[tokens, size]:,}" for size in vocabularies)])
    return rows


def host_rows(result: dict[str, Any]) -> Rows:
    """Return launches and host time of the mixing kernels, beside another version."""
    other = result[_BESIDE]
    rows = [["experts x rows x vocabulary", "btm-scale", f"commit {other['commit']}", "ratio of host time"]]
    for name, call in result["ours"]["calls"].items():
        before = other["calls"][name]
        function, _, shape = name.partition(" ")
        ratio = call["microseconds"] / before["microseconds"]
        rows.append(
            [
                f"`{function}` {' x '.join(f'{int(size):,}' for size in shape.split('x'))}",
                _call(call),
                _call(before),
                f"{ratio:.3f}",
            ]
        )
    return rows


def _first_of_each(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the first row of each kernel and configuration; others differ in what their arguments are."""
    return {tuple(row[key] for key in ("arch", "kernel", "blocks", "warps", "stages")): row for row in reversed(rows)}


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        _SHOWN.index(row["kernel"]) if row["kernel"] in _SHOWN else len(_SHOWN),
        row["kernel"],
        row["arch"] != "sm_90",
    )


def _size(count: int) -> str:
    return f"{count / 1024:.0f} KiB" if count >= 1024 else f"{count} B"


def _both(row: dict[str, Any], other: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> str:
    """Return a cell, with that of the oldest Triton after it if it differs."""
    ours, older = cell(row), cell(other)
    return ours if ours == older else f"{ours} ({older})"


def _call(call: dict[str, Any]) -> str:
    return f"{call['launches']:.0f} launches, {call['microseconds']:,.0f} us"
