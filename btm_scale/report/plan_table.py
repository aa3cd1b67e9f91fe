"""A plan as tables: what each group holds, how long it takes and where it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from btm_scale.config.yaml import dump_text
from btm_scale.report.quantities import amount, size, time
from btm_scale.report.summary import count
from btm_scale.util.terminal import printable

_KINDS = ("weights", "gradients", "optimizer", "activations", "head", "buffers")


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    """The whole plan, stage by stage."""
    cluster = plan["cluster"]

    def say(text: str, style: str | None = None) -> None:
        console.print(Text(printable(text), style=style or ""), soft_wrap=False)

    say(
        f"{amount(plan['parameters'])} parameters on {cluster['gpus']:,} {cluster['name']} "
        f"({count(cluster['nodes'], 'node')} of {cluster['gpus_per_node']})"
    )
    reached = f"{cluster['compute_share']:.0%} of peak FLOP/s, {cluster['transfer_share']:.0%} of peak bandwidth"
    say(
        f"per GPU: {cluster['fp16'] / 1e12:,.0f} TFLOP/s in 16 bits, {cluster['fp32'] / 1e12:,.0f} in fp32, "
        f"{size(cluster['memory'])}, "
        f"{size(cluster['bandwidth'])}/s, {size(cluster['link'])}/s within a node, "
        f"{size(cluster['network'])}/s between nodes; assumed utilization: {reached}",
        style="dim",
    )
    if plan["proposed"]:
        say("proposed layouts, because the YAML sets none:")
        say(dump_text(plan["proposed"], flow=None).rstrip())
    for number, stage in enumerate(plan["stages"], start=1):
        over = stage["seconds"] / stage["lower_bound_seconds"] - 1
        above = "at" if over < 0.005 else f"{over:.0%} above"
        say(
            f"\nstage {number}: {time(stage['seconds'])}, {above} the lower bound of any placement; "
            f"{count(stage['waves'], 'wave')}"
        )
        _print_groups(stage["groups"], console)
    between = plan["between_groups"]
    say(f"\ntotal: {time(86_400 * plan['days'])}. Groups exchange no data while experts train.")
    say(
        "Training one model on all of these GPUs would send "
        f"{size(between['data_parallel_bytes'])} between them, "
        f"{size(between['data_parallel_bytes_a_step'])} per step."
    )


def _print_groups(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print a block per kind of group: its layout, memory per rank, and time."""
    for row in rows:
        held = row["memory_bytes"]
        parts = ", ".join(f"{kind} {size(held[kind])}" for kind in _KINDS if held[kind])
        table = Table.grid(padding=(0, 2))
        table.add_row(
            "layout",
            Text(
                printable(f"{row['layout']}; {row['micro_batch']} x {row['accumulation']} sequences per rank and step")
            ),
        )
        if row.get("trains", "all") != "all":
            table.add_row("trains", {"mlp": "the MLPs", "router": "the routers"}[row["trains"]])
        table.add_row("memory", f"{size(held['total'])} per GPU: {parts}")
        if host := held.get("host"):
            seconds = time(row["step_seconds"]["host"])
            copied = f"; {seconds} of copies per step run beside the layers" if row["step_seconds"]["host"] else ""
            table.add_row("host", f"{size(host)} of the node's memory per GPU{copied}")
        table.add_row("length", f"sequences of at most {row['longest_sequence']:,} tokens fit, one per micro-batch")
        step, speed = time(row["step_seconds"]["total"]), amount(row["tokens_per_second"])
        table.add_row("time", f"{count(row['steps'], 'step')} of {step}, {speed} tokens/s: {time(row['seconds'])}")
        if sent := row.get("context_bytes_a_step"):
            where = "to other nodes too" if row["context_spans_nodes"] else "within a node"
            seconds = time(row["step_seconds"]["context"])
            table.add_row(
                "context", f"each GPU sends {size(sent)} per step to those with its sequences, {where}: {seconds}"
            )
        table.add_row("save", f"{time(row['checkpoint_seconds'])} per checkpoint, if storage is as fast as the ranks")
        table.add_row("place", f"{count(row['ranks'], 'GPU')} each, on {_nodes(row['places'])}")
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
