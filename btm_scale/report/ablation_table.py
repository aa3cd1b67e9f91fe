"""Which experts' average is best, as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

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
        table.add_column(name, justify="right", no_wrap=True)
    for row in ranking[:_SHOWN]:
        numbers = (row["mean"], *(row["perplexity"][text] for text in texts))
        table.add_row(str(row["rank"]), " + ".join(row["experts"]), *(f"{number:.2f}" for number in numbers))
    return table
