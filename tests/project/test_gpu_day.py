"""benchmarks/gpu_day.py at toy size: rows are written as they finish, and calls continue each other."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.cuts import full

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_day.py"
TOY_ROW = "tune mix"


@pytest.fixture
def phases(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_phases

    return gpu_phases


def gpu_day(out: Path, *options: str, code: int = 0) -> str:
    command = [sys.executable, str(SCRIPT), "--simulate", "--out", str(out), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


def recorded(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_every_row_has_its_own_name_and_fits_one_call(phases, tmp_path):
    from gpu_phases.ledger import Site

    for site in (Site(tmp_path), Site(tmp_path, simulated=True)):
        rows = [row for phase in phases.PHASES for row in phases.rows_of(phase, site)]
        assert len({row.name for row in rows}) == len(rows) > 20
        assert all(row.limit_s < 540 for row in rows)


def test_the_ledger_drops_a_torn_line_and_keeps_the_last_state_of_each_row(phases, tmp_path):
    from gpu_phases.ledger import DONE, FAILED, Ledger, Row

    first, second = (Row(name, 1, lambda site: {}) for name in ("first", "second"))
    ledger = Ledger(tmp_path / "rows.jsonl")
    ledger.append({"row": "first", "status": FAILED, "seconds": 1.0, "error": "no"})
    ledger.append({"row": "second", "status": DONE, "seconds": 1.0, "figures": {}})
    with ledger.path.open("ab") as file:
        file.write(b'{"row": "third", "sta')
    again = Ledger(ledger.path, retry=True)
    assert not again.has(first)
    assert again.has(second)
    assert Ledger(ledger.path).has(first)
    again.append({"row": "first", "status": DONE, "seconds": 1.0, "figures": {}})
    assert [row["row"] for row in recorded(tmp_path)] == ["first", "second", "first"]
    assert Ledger(ledger.path, retry=True).has(first)


def test_a_row_that_fails_or_takes_too_long_is_a_row(phases, tmp_path, monkeypatch):
    from gpu_phases import ledger

    failing = tmp_path / "row.py"
    failing.write_text("import sys, time\nif 'slow' in sys.argv: time.sleep(60)\nraise ValueError('no such kernel')\n")
    monkeypatch.setattr(ledger, "SCRIPT", failing)
    site = ledger.Site(tmp_path, simulated=True)
    written = ledger.Ledger(tmp_path / "rows.jsonl")
    written.append({"row": "environment", "status": ledger.DONE, "seconds": 0.0, "figures": {}})
    slow, fails, late = (ledger.Row(name, limit, lambda site: {}) for name, limit in [("slow", 2), ("x", 9), ("y", 99)])
    assert ledger.measure([slow, fails, late], written, site, budget=30) == [late]
    rows = {row["row"]: row for row in recorded(tmp_path)}
    assert rows["slow"]["status"] == ledger.TIMEOUT
    assert rows["x"]["status"] == ledger.FAILED
    assert "ValueError: no such kernel" in rows["x"]["error"]


def test_what_a_library_prints_after_the_result_does_not_hide_it(phases, tmp_path, monkeypatch):
    from gpu_phases import ledger

    row = tmp_path / "row.py"
    row.write_text(
        'import sys\nif \'x\' in sys.argv: print(\'\\n{"status": "done", "figures": {"a": 1}}\', flush=True)\n'
        "print('[rank0] Warning: destroy_process_group() was not called before program exit', file=sys.stderr)\n"
    )
    monkeypatch.setattr(ledger, "SCRIPT", row)
    site = ledger.Site(tmp_path, simulated=True)
    written = ledger.Ledger(tmp_path / "rows.jsonl")
    written.append({"row": "environment", "status": ledger.DONE, "seconds": 0.0, "figures": {}})
    ledger.measure([ledger.Row(name, 9, lambda site: {}) for name in ("x", "y")], written, site, budget=30)
    rows = {row["row"]: row for row in recorded(tmp_path)}
    assert rows["x"]["figures"] == {"a": 1}
    assert rows["y"]["status"] == ledger.FAILED
    assert "without a result" in rows["y"]["error"]


def test_a_row_measures_the_kernels(tmp_path):
    printed = gpu_day(tmp_path, "--row", TOY_ROW)
    result = json.loads(printed.splitlines()[-1])
    assert result["status"] == "done"
    assert result["figures"]["timed"] == 2


@pytest.mark.parametrize(("options", "budget"), [(["--simulate"], math.inf), ([], 540), (["--budget", "60"], 60)])
def test_only_a_call_at_toy_size_measures_every_phase_in_one_go(phases, tmp_path, monkeypatch, options, budget):
    import gpu_day as script

    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "--out", str(tmp_path), *options])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(script.os, "environ", dict(script.os.environ))
    asked = {}
    monkeypatch.setattr(script, "measure", lambda rows, ledger, site, seconds: asked.update(rows=rows, budget=seconds))
    assert script.main() == 0
    assert asked["budget"] == budget
    assert {row.name for row in asked["rows"]} >= {"demo", "tests test_gpu_kernels"} if options else asked["rows"]


@pytest.mark.parametrize("phase", [full(1)])
def test_a_killed_call_loses_at_most_the_row_in_progress(phase, tmp_path):
    command = [sys.executable, str(SCRIPT), "--simulate", "--phase", str(phase), "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (tmp_path / "rows.jsonl").exists() or len(recorded(tmp_path)) < 4:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = recorded(tmp_path)
    assert "Complete." in gpu_day(tmp_path, "--phase", str(phase))
    after = recorded(tmp_path)
    assert after[: len(before)] == before
    names = [row["row"] for row in after]
    assert len(set(names)) == len(names)
    assert {row["status"] for row in after} <= {"done", "unavailable"}


@pytest.mark.parametrize("phase", [full(2), full(3), full(4), full(5)])
def test_every_phase_runs_at_toy_size(phase, tmp_path):
    gpu_day(tmp_path, "--phase", str(phase))
    failures = [row for row in recorded(tmp_path) if row["status"] not in ("done", "unavailable")]
    assert not failures
