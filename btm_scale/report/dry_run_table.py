"""A dry run as tables: the text of each domain, the models, and the estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from btm_scale.report.fitting import Fitting
from btm_scale.report.quantities import amount, rounded, size, time
from btm_scale.report.summary import NOTHING, shorten
from btm_scale.util.terminal import printable

_LONGEST_NAME = 24
_LONGEST_VALUE = 60
_PARTS = {"all": "", "mlp": " (MLPs)", "router": " (routers)"}  # what is trained
# Columns after the model's name: all of them, and fewer for a narrow terminal.
_COLUMNS = (
    ("parents", "steps", "batch", "tokens", "state", "layout"),
    ("parents", "steps", "batch", "tokens", "state"),
    ("steps", "batch", "tokens", "state"),
    ("steps", "tokens", "state"),
)


def print_dry_run(plan: Mapping[str, Any], console: Console) -> None:
    """Print what a run would do: its text, its models, its time and disk space, and what may go wrong."""

    def say(text: str) -> None:
        console.print(Text(printable(text)))

    say(f"{plan['run']}: models of {amount(plan['parameters'])} parameters")
    if plan["changes"]:
        console.print()
        say("Changes from the run in this folder:")
    for change in plan["changes"]:
        say(f"  {change['key']}: {_value(change['before'])} -> {_value(change['after'])}; {change['effect']}")
    console.print()
    console.print(Fitting(tuple(_text_table(plan["text"], files) for files in (True, False))))
    if any(not row["encoded"] for row in plan["text"].values()):
        say("Tokens are estimated from bytes.")
    say("budget: tokens for the seed LM and the expert; passes: budget per token of the train split.")
    console.print()
    console.print(Fitting(tuple(_model_table(plan["models"], columns) for columns in _COLUMNS)))
    layouts = {model["layout"] for model in plan["models"].values()}
    if len(layouts) == 1:
        say(f"Layout of each: {layouts.pop()}.")
    console.print()
    seconds, disk = plan["estimates"]["seconds"], size(plan["estimates"]["disk_bytes"], 1)
    if seconds is None:
        say(f"Estimate: {disk} on disk. For time and memory on a cluster: btm-scale plan CONFIG --nodes N --gpu KIND")
    else:
        say(f"Estimate: {time(seconds, 1)} on this machine, within a factor of 3, and {disk} on disk.")
    for note in plan["notes"]:
        say(note)


def _text_table(text: Mapping[str, Mapping[str, Any]], with_files: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("text", no_wrap=True)
    for name in (*(["files"] if with_files else []), "on disk", "tokens", "budget", "passes"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in text.items():
        is_novel = not row["budget_tokens"]
        cells = [size(row["bytes"]), amount(row["tokens"], 3 if row["encoded"] else 2)]
        cells += [NOTHING, NOTHING] if is_novel else [amount(row["budget_tokens"]), rounded(row["passes"], 2)]
        if with_files:
            cells.insert(0, f"{row['files']:,}")
        table.add_row(Text(shorten(printable(name), _LONGEST_NAME) + (" (novel)" if is_novel else "")), *cells)
    return table


def _model_table(models: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> Table:
    if len({model["layout"] for model in models.values()}) == 1:  # written below the table
        columns = [name for name in columns if name != "layout"]
    table = Table(box=None, pad_edge=False)
    for name in ("model", *columns):
        justify: Any = "right" if name in ("steps", "batch", "tokens") else "left"
        table.add_column(name, justify=justify, no_wrap=True)
    for name, model in models.items():
        cells = {
            "parents": Text(_parents(model["parents"]) + _PARTS[model.get("trains", "all")]),
            "steps": f"{model['steps']:,}",
            "batch": model["batch"].removesuffix(" tokens"),
            "tokens": amount(model["tokens"]),
            "state": _state(model),
            "layout": model["layout"],
        }
        table.add_row(Text(shorten(printable(name), _LONGEST_NAME)), *(cells[column] for column in columns))
    return table


def _state(model: Mapping[str, Any]) -> str:
    if model["done"]:
        return "done"
    return "to do" if model["resumes_at"] is None else f"from {model['resumes_at']:,}"


def _value(value: Any) -> str:
    return NOTHING if value in (None, {}, []) else shorten(str(value), _LONGEST_VALUE)


def _parents(parents: str | Mapping[str, float] | None) -> str:
    if parents is None:
        return NOTHING
    if not isinstance(parents, str):
        parents = " ".join(f"{name}={rounded(weight, 2)}" for name, weight in parents.items())
    return shorten(printable(parents), _LONGEST_NAME)
