"""On terminals of 60 columns and more, no table row wraps and no line is too long."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from btm_scale.evaluate.results import Results
from btm_scale.report.doctor_table import print_doctor
from btm_scale.report.dry_run_table import print_dry_run
from btm_scale.report.forest_table import forest_table
from btm_scale.report.plan_table import print_plan
from btm_scale.report.progress_table import progress_table
from btm_scale.report.results_table import print_results
from btm_scale.train.progress import ModelProgress

COLUMNS = pytest.mark.parametrize("columns", [60, 80, 100, 140])
NAMES = [f"a-domain-with-a-long-name-{i}" for i in range(8)]


def printed(columns: int, show: Callable[[Console], None]) -> list[str]:
    console = Console(width=columns, file=io.StringIO(), color_system=None, highlight=False)
    show(console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= columns
    return [line.rstrip() for line in lines]


def rows_of(lines: Sequence[str], *firsts: str) -> list[str]:
    """Return the lines that begin with one of these words, all of which must be there."""
    rows = [line for line in lines if line.startswith(firsts)]
    assert len(rows) >= len(firsts)
    return rows


@COLUMNS
@pytest.mark.parametrize("number", [2, 8])
def test_a_result_is_in_one_row_per_method_and_table(columns: int, number: int, make_results: Any) -> None:
    results: Results = make_results(training=NAMES[:number], novel=("a novel one", "poems"))
    lines = printed(columns, lambda console: print_results(results, console))
    words = [word for line in lines if line.startswith(("dense ", "ensemble ")) for word in line.split()[1:]]
    # Two means, a ratio and each domain, for each of the two methods, printed once.
    assert len(words) == 2 * (3 + number + 2)
    assert all(word.replace(".", "").isdigit() for word in words)


def test_a_result_of_a_few_domains_is_one_table_at_80_columns(make_results: Any) -> None:
    results: Results = make_results(training=("legal", "math", "reviews"), novel=("news",))
    lines = printed(80, lambda console: print_results(results, console))
    assert sum(line.startswith("method") for line in lines) == 1


@COLUMNS
def test_status_has_one_line_per_model_with_its_state(columns: int) -> None:
    rows = [
        ModelProgress("seed", "done", 1_000_000, 1_000_000, 3.5, 1_234_567.0, None),
        ModelProgress(NAMES[0] * 2, "scoring", 99_999, 100_000, 4.25, 10_400.0, 95.0),
        ModelProgress("law", "failed", 0, 100_000, None, None, None, note="a long sentence " * 9),
    ]
    lines = printed(columns, lambda console: console.print(progress_table(rows)))
    assert [line.split()[-1] for line in lines] == ["state", "done", "scoring", "failed"]
    assert "99,999/100,000" in lines[2]


def test_a_note_of_a_queued_model_is_below_the_table() -> None:
    rows = [ModelProgress("law", "waiting", 0, 9, None, None, None, note="SLURM job 7 is pending (Resources)")]
    lines = printed(80, lambda console: console.print(progress_table(rows)))
    assert lines[-1] == "law: SLURM job 7 is pending (Resources)"


@COLUMNS
def test_the_forest_has_one_line_per_expert(columns: int) -> None:
    expert = {
        "parents": dict.fromkeys(NAMES, 1 / 8),
        "domains": {NAMES[0]: 1.0},
        "tokens": 12_345_678_901,
        "steps": 100_000,
        "content_hash": "0123456789abcdef" * 4,
    }
    lines = printed(columns, lambda console: console.print(forest_table(dict.fromkeys(NAMES, expert))))
    assert len(lines) == 1 + len(NAMES)
    assert all("100,000" in line for line in lines[1:])


@COLUMNS
def test_a_dry_run_has_one_line_per_domain_and_model(columns: int) -> None:
    text = {
        name: {
            "files": 12_345,
            "bytes": 123_456_789_012,
            "tokens": 3e10,
            "encoded": False,
            "budget_tokens": 2_345_678_901,
            "passes": 0.0789,
        }
        for name in NAMES
    }
    models = {
        name: {
            "parents": dict.fromkeys(NAMES, 1 / 8),
            "steps": 123_456,
            "batch": "1024 x 4096 tokens",
            "tokens": 517_823_123_456,
            "layout": f"tensor 8 x data {i}, ZeRO 3, bf16, full recomputation",
            "done": False,
            "resumes_at": None,
        }
        for i, name in enumerate(NAMES)
    }
    plan = {"run": "/runs/x", "parameters": 1.3e9, "text": text, "models": models, "notes": [], "changes": []}
    plan["estimates"] = {"seconds": 123_456.0, "disk_bytes": 1.23e12}
    lines = printed(columns, lambda console: print_dry_run(plan, console))
    shown = [line for line in lines if line.startswith("a-domain")]
    assert len(shown) == 2 * len(NAMES)
    assert all(line.endswith("0.079") for line in shown[: len(NAMES)])
    assert all("123,456" in line and "to do" in line for line in shown[len(NAMES) :])
    text_of_all = "\n".join(lines)
    assert "30 hours on this machine, within a factor of 3, and 1 TB on disk" in " ".join(text_of_all.split())


@COLUMNS
def test_a_plan_fits_and_begins_each_fact_with_its_name(columns: int) -> None:
    cluster = {"gpus": 8, "name": "h100", "nodes": 1, "gpus_per_node": 8, "compute_share": 0.5, "transfer_share": 0.5}
    cluster |= {"fp16": 989e12, "fp32": 67e12, "memory": 80e9, "bandwidth": 3.35e12, "link": 450e9, "network": 50e9}
    memory = {"weights": 296e3, "gradients": 111e3, "optimizer": 222e3, "activations": 1.18e6, "head": 0, "buffers": 0}
    group = {
        "models": NAMES[:3],
        "layout": "tensor 1 x data 8, ZeRO 1, bf16",
        "micro_batch": 1,
        "accumulation": 1,
        "memory_bytes": memory | {"total": 1.81e6, "host": 8.32e9},
        "step_seconds": {"total": 3.9e-6, "host": 1.3},
        "steps": 29,
        "tokens_per_second": 1_059_507_378.0,
        "seconds": 1.1e-4,
        "longest_sequence": 1_234_944,
        "checkpoint_seconds": 4.7e-3,
        "ranks": 1,
        "places": [{"nodes": [(0, 1)]}],
    }
    stage = {"seconds": 1.1e-4, "lower_bound_seconds": 1.1e-4, "waves": 1, "groups": [group]}
    between = {"data_parallel_bytes": 35.5e6, "data_parallel_bytes_a_step": 1.18e6}
    plan = {"cluster": cluster, "parameters": 147_776, "proposed": {}, "stages": [stage], "days": 1.3e-9}
    lines = printed(columns, lambda console: print_plan(plan | {"between_groups": between}, console))
    rows_of(
        lines,
        "  layout  ",
        "  memory  1.81 MB per GPU",
        "  host    8.32 GB of the node's memory per",
        "  length  sequences of at most 1,234,944",
        "  time    29 steps of less than 1 ms",
        "  save    4.7 ms per checkpoint",
        "  place   1 GPU each",
    )
    assert lines[0] == "148,000 parameters on 8 h100 (1 node of 8)"
    assert not [word for line in lines for word in line.split() if word.rstrip(",;") in ("0.0", "0.00", "0")][1:]


@COLUMNS
@pytest.mark.parametrize("is_terminal", [True, False])
def test_doctor_wraps_its_text_below_itself(columns: int, is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def finding(name: str, found: str) -> dict[str, str]:
        return {"part": "programs", "name": name, "state": "ok", "found": found, "needed_for": "", "remedy": ""}

    found = [
        finding("pdsh", "a long remedy " * 12),
        finding("ptxas", "/a" * 22 + "/ptxas"),
        finding("ninja program", ""),
    ]
    answer = {"findings": found, "verdicts": [{"name": "run", "works": True, "note": ""}]}
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setenv("COLUMNS", str(columns))
    print_doctor(answer)
    lines = Text.from_ansi(written.getvalue()).plain.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= columns
    first = next(i for i, line in enumerate(lines) if "pdsh" in line)
    assert lines[first + 1].startswith(" " * lines[first].index("a long")) or columns > 180
    if not is_terminal:
        assert any("/a" * 22 + "/ptxas" in line for line in lines)  # can be copied
