"""The page's tables as rows of cells; the template writes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from btm_scale.evaluate.results import Measure, Results
from btm_scale.forest.methods import ENSEMBLE, KINDS, kind, label, meaning
from btm_scale.report.summary import (
    Mean,
    lowest,
    lowest_means,
    mean,
    novel_domains,
    ordered_methods,
    perplexity,
    ratio,
    reference,
    share_text,
    shorten,
    training_domains,
    value,
)

_LONGEST_NAME = 24


@dataclass(frozen=True)
class Cell:
    """A cell: a number with its text; None is written as a dash. `over`: the domains of a mean that lacks some."""

    number: float | None = None
    text: str = ""
    css: str = ""
    best: bool = False
    over: int | None = None
    bar: float | None = None  # pixels of a small bar, to the left of its middle if negative


@dataclass(frozen=True)
class Heading:
    """A column's heading."""

    text: str
    css: str = ""
    title: str = ""


@dataclass(frozen=True)
class Row:
    """A method's row, or with `heading` that of a kind of methods."""

    name: str
    title: str = ""
    method: str = ""
    css: str = ""
    heading: bool = False
    cells: Sequence[Cell] = ()


@dataclass(frozen=True)
class Table:
    """A table for the template."""

    caption: str
    columns: Sequence[Heading]
    rows: Sequence[Row]
    css: str = ""
    exact: bool = False  # whether each number is there with more digits than its text, for programs


def plain_table(caption: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Any]]]) -> Table:
    """Return a table of texts; the first column names the rows."""
    body = [Row(shorten(name, 40), name, cells=[Cell(text=str(text)) for text in texts]) for name, texts in rows]
    return Table(caption, [Heading(shorten(name, _LONGEST_NAME), title=name) for name in columns], body, "plain")


def method_table(results: Results, measure: Measure, caption: str) -> Table:
    """Return means, the ratio to the reference and every domain's number; the best of each column is bold."""
    training, novel, to = training_domains(results), novel_domains(results), reference(results)
    best = {d: lowest({m: value(results, m, d, measure) for m in results.methods}) for d in [*training, *novel]}
    best_mean, best_novel = (lowest_means(results, domains, measure) for domains in (training, novel))

    def cells(method: str) -> Iterator[Cell]:
        yield _mean_cell(mean(results, method, training, measure), method in best_mean, "mean")
        if to is not None:
            yield _ratio_cell(ratio(results, method, to, training, measure), bar=method != to)
        for domain in training:
            yield _cell(value(results, method, domain, measure), method in best[domain])
        if novel:
            yield _mean_cell(mean(results, method, novel, measure), method in best_novel, "mean novel")
        for domain in novel:
            yield _cell(value(results, method, domain, measure), method in best[domain])

    rows, previous = [], None
    for method in ordered_methods(results):
        if kind(method) != previous:
            previous = kind(method)
            rows.append(Row(KINDS[previous], css="kind", heading=True))
        name, title = shorten(label(method), _LONGEST_NAME), meaning(method) or label(method)
        rows.append(Row(name, title, method, "headline" if method == ENSEMBLE else "", cells=list(cells(method))))
    few = len(training) + len(novel) <= 6
    turned = "" if few and all(len(name) <= 12 for name in (*training, *novel)) else "turned"
    columns = [Heading("Method"), Heading("Mean", "mean"), *([Heading(f"\u00f7 {to}", "ratio")] if to else [])]
    columns += [Heading(shorten(name, _LONGEST_NAME), turned, name) for name in training]
    columns += [Heading("Novel\nmean", "mean novel")] * bool(novel)
    columns += [Heading(shorten(name, _LONGEST_NAME), turned, name) for name in novel]
    return Table(caption, columns, rows, "roomy" if few else "", exact=measure == "perplexity")


def _cell(number: float | None, best: bool) -> Cell:
    return Cell() if number is None else Cell(number, perplexity(number), best=best)


def _mean_cell(over: Mean | None, best: bool, css: str) -> Cell:
    if over is None:
        return Cell(css=css)
    return Cell(over.value, perplexity(over.value), css, best, over.domains if over.partial else None)


def _ratio_cell(against: Mean | None, *, bar: bool) -> Cell:
    if against is None:
        return Cell(css="ratio")
    share, reach = against.value, None
    if bar and math.isfinite(share) and share > 0:
        reach = round(30 * max(-1.0, min(1.0, math.log(share) / math.log(1.3))), 1)
    return Cell(share, share_text(share), "ratio", over=against.domains if against.partial else None, bar=reach)
