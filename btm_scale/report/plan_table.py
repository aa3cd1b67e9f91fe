"""A plan as tables: what each group holds, how long it takes and where it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from btm_scale.report.progress import duration

_KINDS = ("weights", "gradients", "optimizer", "activations", "total")


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    """The whole plan, stage by stage."""
    cluster = plan["cluster"]
    say = console.print
    say(
        f"{plan['parameters'] / 1e6:,.1f}M parameters on {cluster['gpus']:,} {cluster['name']} "
        f"({cluster['nodes']:,} nodes of {cluster['gpus_per_node']})"
    )
    reached = (
        f"{cluster['compute_share']:.0%} of operations, {cluster['transfer_share']:.0%} of bytes a second"
    )
    say(
        f"a GPU: {cluster['flops'] / 1e12:,.0f} TFLOP/s, {cluster['memory'] / 1e9:,.0f} GB, "
        f"{cluster['bandwidth'] / 1e12:.2f} TB/s, {cluster['link'] / 1e9:,.0f} GB/s in a node, "
        f"{cluster['network'] / 1e9:,.1f} GB/s between nodes; taken as reached: {reached}",
        style="dim",
    )
    if plan["proposed"]:
        say("proposed, because the YAML gives no layout:")
        say(Text(yaml.safe_dump(plan["proposed"], sort_keys=False, default_flow_style=None).rstrip()))
    for number, stage in enumerate(plan["stages"], start=1):
        over = stage["seconds"] / stage["lower_bound_seconds"] - 1
        say(
            f"\nstage {number}: {_long(stage['seconds'])}, {over:.1%} over what no placement could beat; "
            f"{stage['waves']} wave{'s' if stage['waves'] > 1 else ''}"
        )
        say(_groups(stage["groups"]))
    between = plan["between_groups"]
    say(f"\nin all {plan['days']:,.2f} days; between the groups no byte is sent while experts train.")
    say(
        "One model trained by all groups together would have sent "
        f"{_bytes(between['data_parallel_bytes'])} between them, "
        f"{_bytes(between['data_parallel_bytes_a_step'])} a step."
    )


def _groups(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("models", "layout"):
        table.add_column(name, overflow="fold")
    for name in (
        "GPUs",
        "micro x acc.",
        *(f"{kind} GB" for kind in _KINDS),
        "step",
        "tokens/s",
        "takes",
        "nodes",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        step = row["step_seconds"]["total"]
        table.add_row(
            Text(_names(row["models"])),
            Text(row["layout"]),
            str(row["ranks"]),
            f"{row['micro_batch']} x {row['accumulation']}",
            *(f"{row['memory_bytes'][kind] / 1e9:.1f}" for kind in _KINDS),
            f"{step * 1000:,.0f} ms" if step < 10 else f"{step:,.1f} s",
            f"{row['tokens_per_second']:,.0f}",
            _long(row["seconds"]),
            _nodes(row["places"]),
        )
    return table


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]} ({len(names)})"


def _nodes(places: Sequence[Mapping[str, Any]]) -> str:
    used = sorted({node for place in places for node, _ in place["nodes"]})
    whole = used == list(range(used[0], used[-1] + 1))
    return f"{used[0]}-{used[-1]}" if whole and len(used) > 1 else ",".join(map(str, used))


def _long(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:,.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} PB"
