"""Names of users on a terminal: neither rich's markup nor a terminal's escapes are interpreted."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from btm_scale.report.doctor_table import print_doctor
from btm_scale.report.plan_table import print_plan
from btm_scale.report.progress_table import progress_line, progress_table
from btm_scale.report.results_table import ablation_table, print_results
from btm_scale.train.progress import ModelProgress

NAME = "[red]x\x1b]0;t\x07"
SHOWN = r"[red]x\x1b]0;t\x07"


@pytest.fixture
def console() -> Console:
    return Console(width=300, file=io.StringIO(), force_terminal=True, color_system=None, highlight=False)


def _shown_literally(text: str) -> bool:
    return SHOWN in text and "\x07" not in text and "\x1b]" not in text


def test_results(console, make_results):
    results = make_results(training=(NAME, "b"))
    results.methods[f"other {NAME}"] = results.methods["dense"]
    print_results(results.model_copy(update={"notes": (f"a note on {NAME}",)}), console)
    text = console.file.getvalue()
    assert _shown_literally(text)
    for words in (f"expert {SHOWN}", f"other {SHOWN}", f"a note on {SHOWN}"):
        assert words in text


def test_ablation(console):
    ranking = [{"rank": 1, "experts": [NAME], "mean": 2.0, "perplexity": {NAME: 2.0}}]
    console.print(ablation_table({"ranking": ranking, "texts": {NAME: 1}}))
    assert _shown_literally(console.file.getvalue())
    assert console.file.getvalue().count(SHOWN) == 2


def test_progress(console):
    row = ModelProgress(NAME, "stopped", 1, 2, None, None, None, note=f"rank 0: {NAME}")
    console.print(progress_table([row]))
    assert console.file.getvalue().count(SHOWN) == 3
    assert _shown_literally(console.file.getvalue())
    assert _shown_literally(progress_line([row]))


def test_plan(console):
    cluster = {"gpus": 1, "name": NAME, "nodes": 1, "gpus_per_node": 1, "compute_share": 0.5, "transfer_share": 0.5}
    cluster |= dict.fromkeys(("fp16", "fp32", "memory", "bandwidth", "link", "network"), 1e12)
    memory = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "head", "buffers", "total"), 1e9)
    group: dict[str, Any] = {
        "models": [NAME],
        "layout": NAME,
        "micro_batch": 1,
        "accumulation": 1,
        "memory_bytes": memory,
        "step_seconds": {"total": 1.0},
        "longest_sequence": 10240,
        "checkpoint_seconds": 1.0,
        "steps": 1,
        "tokens_per_second": 1.0,
        "seconds": 1.0,
        "ranks": 1,
        "places": [{"nodes": [(0, 1)]}],
    }
    stage = {"seconds": 1.0, "lower_bound_seconds": 1.0, "waves": 1, "groups": [group]}
    between = {"data_parallel_bytes": 1.0, "data_parallel_bytes_a_step": 1.0}
    plan = {"cluster": cluster, "parameters": 1e6, "proposed": {"experts": {NAME: 1}}, "stages": [stage], "days": 1.0}
    print_plan(plan | {"between_groups": between}, console)
    assert _shown_literally(console.file.getvalue())
    assert console.file.getvalue().count(SHOWN) >= 3


@pytest.mark.parametrize("is_terminal", [True, False])
def test_doctor(is_terminal, monkeypatch):
    finding = {
        "part": "launchers",
        "name": NAME,
        "state": "ok",
        "found": f"/opt/{NAME}",
        "needed_for": "",
        "remedy": "",
    }
    answer = {"findings": [finding], "verdicts": [{"name": "run", "works": True, "note": f"in {NAME}"}]}
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setenv("COLUMNS", "300")
    print_doctor(answer)
    assert _shown_literally(written.getvalue())
    assert written.getvalue().count(SHOWN) == 3
