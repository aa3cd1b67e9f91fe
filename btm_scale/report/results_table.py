"""The results as a table for the terminal: methods down, domains across."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from btm_scale.evaluate.results import Results
from btm_scale.forest.methods import EXPERT, kind, label
from btm_scale.report.fitting import width
from btm_scale.report.summary import (
    NOTHING,
    Mean,
    headline,
    lowest,
    lowest_means,
    mean,
    moe_sentence,
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
from btm_scale.util.terminal import printable

_LONGEST_NAME = 18


def results_table(results: Results, domains: Sequence[str] | None = None, *, means: bool = True) -> Table:
    """Perplexity by method and domain, the mean over the training domains, and the mean's ratio to dense's
    (to the seed's in a run without dense). The best of a column is bold; `*` marks a mean over fewer domains.

    `domains`: the domains to give a column; all by default. The means, which `means` includes, are always over all.
    """
    training, novel = training_domains(results), novel_domains(results)
    shown = list(results.domains) if domains is None else list(domains)
    to = reference(results)
    title = "Perplexity (lower is better)" if means else "Perplexity by domain"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    if means:
        table.add_column("mean", justify="right", no_wrap=True)
        if to:
            table.add_column(f"/ {to}", justify="right", no_wrap=True)
        if novel:
            table.add_column("novel\nmean", justify="right", no_wrap=True)
    for domain in shown:
        name = shorten(printable(domain), _LONGEST_NAME) + ("\n(novel)" if domain in novel else "")
        table.add_column(Text(name), justify="right", no_wrap=True)

    best = {domain: lowest({m: value(results, m, domain) for m in results.methods}) for domain in shown}
    best_mean, best_novel = lowest_means(results, training), lowest_means(results, novel)
    previous = None
    for method in ordered_methods(results):
        if previous not in (None, kind(method)):
            table.add_section()
        previous = kind(method)
        name = f"expert {shorten(printable(label(method)), _LONGEST_NAME)}"
        cells = [Text(name if method.startswith(EXPERT) else printable(method))]
        if means:
            cells.append(_mean_cell(mean(results, method, training), method in best_mean))
            if to:
                against = ratio(results, method, to, training)
                cells.append(Text(NOTHING if against is None else share_text(against.value) + "*" * against.partial))
            if novel:
                cells.append(_mean_cell(mean(results, method, novel), method in best_novel))
        cells += [_cell(value(results, method, domain), method in best[domain]) for domain in shown]
        table.add_row(*cells)
    return table


def print_results(results: Results, console: Console) -> None:
    """Print the table, or where it is too wide the means and then the domains, and what came of the run."""
    table = results_table(results)
    tables = [table] if width(console, table) <= console.width else _narrow_tables(results, console)
    for one in tables:
        console.print(one)
        console.print()
    if _has_partial_mean(results):
        console.print("* over those domains only that the method has", style="dim")
    for note in results.notes:
        console.print(printable(note), markup=False, highlight=False)
    for sentence in filter(None, (headline(results), moe_sentence(results))):
        console.print(printable(sentence), markup=False, highlight=False)


def _narrow_tables(results: Results, console: Console) -> list[Table]:
    """Return a table of the means, and tables of as many domains each as the terminal has room for, at least one."""

    def by_domain(domains: Sequence[str]) -> Table:
        return results_table(results, domains, means=False)

    frame = width(console, by_domain([]))
    groups: list[list[str]] = [[]]
    used = frame
    for domain in results.domains:
        more = width(console, by_domain([domain])) - frame
        if groups[-1] and used + more > console.width:
            groups.append([])
            used = frame
        groups[-1].append(domain)
        used += more
    return [results_table(results, []), *map(by_domain, groups)]


def _has_partial_mean(results: Results) -> bool:
    means = [
        mean(results, method, domains)
        for method in results.methods
        for domains in (training_domains(results), novel_domains(results))
    ]
    return any(found is not None and found.partial for found in means)


def _mean_cell(found: Mean | None, best: bool) -> Text:
    cell = _cell(None if found is None else found.value, best)
    return cell.append("*") if found is not None and found.partial else cell


def _cell(number: float | None, best: bool) -> Text:
    return Text(NOTHING if number is None else perplexity(number), style="bold" if best else "")


_SHOWN = 20


def ablation_table(answer: dict[str, Any]) -> Table:
    """The first subsets of a ranking with their mean and each text's perplexity."""
    ranking, texts = answer["ranking"], list(answer["texts"])
    title = "Perplexity of the experts' uniform average (lower is better)"
    if len(ranking) > _SHOWN:
        title += f": the best {_SHOWN} of {len(ranking)}, all with --json"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("experts")
    for name in ("mean", *texts):
        table.add_column(Text(printable(name)), justify="right", no_wrap=True)
    for row in ranking[:_SHOWN]:
        numbers = (row["mean"], *(row["perplexity"][text] for text in texts))
        table.add_row(
            str(row["rank"]), Text(printable(" + ".join(row["experts"]))), *(f"{number:.2f}" for number in numbers)
        )
    return table
