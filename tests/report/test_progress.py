from __future__ import annotations

import io
import json
import subprocess
import sys

from rich.console import Console

from btm_scale.report.progress_table import duration, live_table, progress_line, progress_table
from btm_scale.run_dir import RunDir
from btm_scale.train.progress import ModelProgress, read_progress


def _write(run: RunDir, model: str, steps: int, *, seconds: float = 2.0, tail: str = "") -> None:
    path = run.metrics(model)
    path.parent.mkdir(parents=True)
    rows = [
        {
            "step": i,
            "loss": 5 - i / 1000,
            "learning_rate": 1e-3,
            "gradient_norm": 1.0,
            "tokens_per_second": 1000.0 + (i == steps) * 5000,
            "seconds": seconds,
        }
        for i in range(1, steps + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_progress_is_that_of_the_last_whole_line(tmp_path):
    run = RunDir(tmp_path)
    _write(run, "math", 3000, tail='{"step": 3001, "lo')
    progress = read_progress(run, "math", 4000, state="running")
    assert (progress.step, progress.loss) == (3000, 2.0)
    assert progress.seconds_left == 2000.0


def test_progress_is_read_from_rows_that_are_long(tmp_path):
    run = RunDir(tmp_path)
    _write(run, "moe", 40)
    routing = {"load": {"math": {"math": [0.1234] * 5000}}, "entropy": {"math": [1.2345] * 5000}}
    rows = [json.loads(line) for line in run.metrics("moe").read_text().splitlines()]
    rows = [row | ({"routing": routing} if row["step"] % 10 == 0 else {}) for row in rows]
    run.metrics("moe").write_text("".join(json.dumps(row) + "\n" for row in rows))
    progress = read_progress(run, "moe", 50, state="running")
    assert (progress.step, progress.tokens_per_second) == (40, 1000.0)


def test_speed_is_a_median_that_one_odd_step_does_not_move(tmp_path):
    run = RunDir(tmp_path)
    _write(run, "math", 100)
    assert read_progress(run, "math", 200, state="running").tokens_per_second == 1000.0


def test_a_model_that_has_not_begun_or_wrote_rubbish_has_no_figures(tmp_path):
    run = RunDir(tmp_path)
    assert read_progress(run, "math", 9, state="waiting") == ModelProgress("math", "waiting", 0, 9, None, None, None)
    _write(run, "math", 0, tail="not json\n[1]\n{}\n")
    assert read_progress(run, "math", 9, state="running").step == 0


def test_a_model_that_is_done_has_no_time_left(tmp_path):
    run = RunDir(tmp_path)
    _write(run, "math", 9)
    assert read_progress(run, "math", 9, state="done").seconds_left is None


def test_the_table_and_the_line_tell_the_same(tmp_path):
    rows = [
        ModelProgress("seed", "done", 50, 50, 3.5, 9000.0, None),
        ModelProgress("[red]math", "running", 12, 50, 4.25, 10_400.0, 95.0),
        ModelProgress("code", "failed", 7, 50, None, None, None, note="out of memory"),
        ModelProgress("law", "waiting", 0, 50, None, None, None),
        ModelProgress("news", "stopped", 9, 50, None, None, None),
    ]
    console = Console(width=110, file=io.StringIO())
    console.print(progress_table(rows))
    table = console.file.getvalue()
    for words in ("12/50", "4.250", "10,400", "1:35", "failed", "[red]math", "stopped"):
        assert words in table
    assert progress_line(rows) == (
        "training: 1/5 done (seed) | [red]math 12/50 loss 4.250 10,400 tokens/s, 1:35 left"
        " | code FAILED at 7/50: out of memory | news stopped at 9/50"
    )


def test_a_model_is_saving_after_its_last_step_and_scoring_once_it_is_exported(tmp_path):
    run = RunDir(tmp_path)
    _write(run, "math", 9)
    assert read_progress(run, "math", 10, state="running").state == "running"
    assert read_progress(run, "math", 9, state="running").state == "saving"
    progress = read_progress(run, "math", 9, state="running", is_exported=True)
    assert progress.state == "scoring"
    assert progress_line([progress]) == "training: 0/1 done | math 9/9 loss 4.991 1,000 tokens/s, scoring"
    assert read_progress(run, "math", 9, state="done", is_exported=True).state == "done"


def test_durations_grow_coarser():
    assert [duration(s) for s in (0, 59.6, 3599, 3661, 200_000)] == [
        "0:00",
        "1:00",
        "59:59",
        "1h 01m",
        "2d 07h",
    ]
    assert duration(None) == duration(float("inf")) == "\u2013"


def logged(caplog, monkeypatch, *states: str) -> list[str]:
    """Return what a command without a terminal logs about a model in these states."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with caplog.at_level("INFO"), live_table(quiet=False) as show:
        for state in states:
            show(
                [ModelProgress("math", state, 3, 9, None, None, None), ModelProgress("b", "waiting", 0, 9, *[None] * 3)]
            )
    return caplog.messages


def test_the_last_line_of_a_log_names_what_was_stopped(caplog, monkeypatch):
    lines = logged(caplog, monkeypatch, "running", "running", "stopped")
    assert [line.split(" | ")[1] for line in lines] == ["math 3/9", "math stopped at 3/9"]


def test_a_log_names_the_models_that_are_done_and_repeats_no_line(caplog, monkeypatch):
    monkeypatch.setattr("btm_scale.report.progress_table._LINE_SECONDS", 0.0)
    lines = logged(caplog, monkeypatch, "running", "running", "scoring", "done", "done")
    assert lines == [
        "training: 0/2 done | math 3/9",
        "training: 0/2 done | math 3/9, scoring",
        "training: 1/2 done (math)",
    ]


def test_tables_and_the_pages_module_import_no_torch_no_plotly_and_no_jinja():
    names = ("page", "results_table", "progress_table", "plan_table", "doctor_table", "equivalence")
    modules = ", ".join(f"btm_scale.report.{name}" for name in names)
    heavy = "{'torch', 'plotly', 'jinja2'}"
    code = f"import sys, {modules}, btm_scale.run.status; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
