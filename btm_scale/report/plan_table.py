"""A plan as tables: what each group holds, how long it takes and where it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from btm_scale.config.yaml import dump_text
from btm_scale.report.progress_table import duration
from btm_scale.util.terminal import printable

_KINDS = ("weights", "gradients", "optimizer", "activations", "head", "buffers")


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    """The whole plan, stage by stage."""
    cluster = plan["cluster"]

    def say(text: str, style: str | None = None) -> None:
        console.print(Text(printable(text), style=style or ""), soft_wrap=False)

    say(
        f"{plan['parameters'] / 1e6:,.1f}M parameters on {cluster['gpus']:,} {cluster['name']} "
        f"({cluster['nodes']:,} nodes of {cluster['gpus_per_node']})"
    )
    reached = f"{cluster['compute_share']:.0%} of peak FLOP/s, {cluster['transfer_share']:.0%} of peak bandwidth"
    say(
        f"per GPU: {cluster['fp16'] / 1e12:,.0f} TFLOP/s in 16 bits, {cluster['fp32'] / 1e12:,.0f} in fp32, "
        f"{cluster['memory'] / 1e9:,.0f} GB, "
        f"{cluster['bandwidth'] / 1e12:.2f} TB/s, {cluster['link'] / 1e9:,.0f} GB/s within a node, "
        f"{cluster['network'] / 1e9:,.1f} GB/s between nodes; assumed utilization: {reached}",
        style="dim",
    )
    if plan["proposed"]:
        say("proposed layouts, because the YAML sets none:")
        say(dump_text(plan["proposed"], flow=None).rstrip())
    for number, stage in enumerate(plan["stages"], start=1):
        over = max(0.0, stage["seconds"] / stage["lower_bound_seconds"] - 1)
        say(
            f"\nstage {number}: {_long(stage['seconds'])}, {over:.1%} above the lower bound of any placement; "
            f"{stage['waves']} wave{'s' if stage['waves'] > 1 else ''}"
        )
        _print_groups(stage["groups"], console)
    between = plan["between_groups"]
    say(f"\ntotal: {plan['days']:,.2f} days. Groups exchange no data while experts train.")
    say(
        "Training one model on all of these GPUs would send "
        f"{_bytes(between['data_parallel_bytes'])} between them, "
        f"{_bytes(between['data_parallel_bytes_a_step'])} per step."
    )


def _print_groups(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print a block per kind of group: its layout, memory per rank, and time."""
    for row in rows:
        held = row["memory_bytes"]
        parts = ", ".join(f"{kind} {held[kind] / 1e9:.1f}" for kind in _KINDS if held[kind])
        step = row["step_seconds"]["total"]
        took = f"{step * 1000:,.0f} ms" if step < 10 else f"{step:,.1f} s"
        table = Table.grid(padding=(0, 2))
        table.add_row(
            "layout",
            Text(
                printable(f"{row['layout']}; {row['micro_batch']} x {row['accumulation']} sequences per rank and step")
            ),
        )
        table.add_row("memory", f"{held['total'] / 1e9:.1f} GB per GPU: {parts}")
        table.add_row(
            "time",
            f"{row['steps']:,} steps of {took}, {row['tokens_per_second']:,.0f} tokens/s: {_long(row['seconds'])}",
        )
        table.add_row("checkpoint", f"{_long(row['checkpoint_seconds'])}, if storage is as fast as the ranks")
        table.add_row("place", f"{row['ranks']} GPUs each, on {_nodes(row['places'])}")
        console.print(Text(printable(_names(row["models"])), style="bold"))
        console.print(Padding(table, (0, 0, 0, 2)))


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]} ({len(names)})"


def _nodes(places: Sequence[Mapping[str, Any]]) -> str:
    used = sorted({node for place in places for node, _ in place["nodes"]})
    if len(used) == 1:
        return f"node {used[0]}"
    if used == list(range(used[0], used[-1] + 1)):
        return f"nodes {used[0]} to {used[-1]}"
    return f"{len(used)} of nodes {used[0]} to {used[-1]}"


def _long(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:,.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} PB"
