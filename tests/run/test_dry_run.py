"""What a dry run reports about a run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from helpers.tiny_run import save_card, tiny_values, write_config
from helpers.warm import Warm
from rich.console import Console

from btm_scale.config.run import RunConfig
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.errors import DataError
from btm_scale.report.dry_run_table import print_dry_run
from btm_scale.run import estimate
from btm_scale.run.dry_run import dry_run
from btm_scale.run.state import open_run
from btm_scale.run_dir import RunDir


def test_tokens_of_every_domain_are_near_those_that_are_encoded(
    prepared: tuple[RunConfig, RunDir], tmp_path: Path
) -> None:
    config, run = prepared
    estimated, exact = dry_run(config, RunDir(tmp_path / "new"))["text"], dry_run(config, run)["text"]
    for name in config.domains:
        tokens = Fingerprint.of_domain(run, name).tokens
        assert exact[name]["tokens"] == tokens
        assert 0.6 < estimated[name]["tokens"] / tokens < 1.6
        assert exact[name]["encoded"]
        assert not estimated[name]["encoded"]


def test_the_budget_of_a_domain_is_its_part_of_the_seeds_tokens_and_its_experts(
    prepared: tuple[RunConfig, RunDir],
) -> None:
    config, run = prepared
    planned = dry_run(config, run)
    models = planned["models"]
    for name, row in planned["text"].items():
        assert row["budget_tokens"] == pytest.approx(models["seed"]["tokens"] / 2 + models[name]["tokens"], abs=1)
        train = Fingerprint.of_domain(run, name).splits["train"].tokens
        assert row["passes"] == pytest.approx(row["budget_tokens"] / train)
    # seed and experts together have the budget's tokens, up to the rounding of steps
    assert sum(row["budget_tokens"] for row in planned["text"].values()) == pytest.approx(100_000, rel=0.05)


def test_time_is_estimated_for_this_machine_only_and_without_finished_models(
    real_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = estimate._matrix_speed()  # once: other load changes it
    monkeypatch.setattr(estimate, "_matrix_speed", lambda: speed)
    config, run = write_config(tmp_path / "a.yaml", tiny_values(real_text)), RunDir(tmp_path / "run")
    before = dry_run(config, run)["estimates"]
    assert 30 < before["seconds"] < 1800
    assert 1e6 < before["disk_bytes"] < 100e6
    seconds = [before["seconds"]]
    (run.checkpoints("seed") / "step-00000010").mkdir(parents=True)
    seconds.append(dry_run(config, run)["estimates"]["seconds"])
    save_card(run.model("seed"), "seed")
    seconds.append(dry_run(config, run)["estimates"]["seconds"])
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) == 3
    assert dry_run(config, run, trains_here=False)["estimates"]["seconds"] is None


def test_a_domain_without_the_field_is_refused_as_the_run_would_refuse_it(real_text: Path, tmp_path: Path) -> None:
    values = tiny_values(real_text)
    values["domains"]["python"]["field"] = "body"
    config = write_config(tmp_path / "a.yaml", values)
    with pytest.raises(DataError, match=r"Domain 'python': .* no field 'body'; fields are 'text', 'source'"):
        dry_run(config, RunDir(tmp_path / "run"))


def test_a_dry_run_lists_what_changed_and_what_is_done_again(real_text: Path, tmp_path: Path) -> None:
    values, run = tiny_values(real_text), RunDir(tmp_path / "run")
    open_run(write_config(tmp_path / "a.yaml", values), run)
    run.tokenizer.mkdir()
    checkpoint = run.checkpoints("seed") / "step-00000005"
    checkpoint.mkdir(parents=True)
    values["evaluate"] |= {"dev_blocks": 5}
    plan = dry_run(write_config(tmp_path / "b.yaml", values | {"deepspeed": {"csv_monitor": {"enabled": True}}}), run)
    assert [(change["key"], change["effect"]) for change in plan["changes"]] == [
        ("evaluate.dev_blocks", "every model is scored again"),
        ("deepspeed.csv_monitor.enabled", "no model is trained or scored again"),
    ]
    assert plan["models"]["seed"]["resumes_at"] == 5
    out = io.StringIO()
    print_dry_run(plan, Console(file=out, width=100))
    assert "  evaluate.dev_blocks: 20 -> 5; every model is scored again\n" in out.getvalue()
    assert next(line for line in out.getvalue().splitlines() if line.startswith("seed")).rstrip().endswith("from 5")


def test_a_dry_run_prints_a_table_of_text_and_one_of_models(real_text: Path, warm: Warm, tmp_path: Path) -> None:
    write_config(tmp_path / "a.yaml", tiny_values(real_text))
    out = warm.check("run", tmp_path / "a.yaml", "--out", tmp_path / "run", "--dry-run").stdout
    lines = [line.rstrip() for line in out.splitlines()]
    assert next(line for line in lines if line.startswith("text")).split()[-3:] == ["tokens", "budget", "passes"]
    assert next(line for line in lines if line.startswith("docs (novel)")).split()[-2:] == ["\u2013", "\u2013"]
    assert next(line for line in lines if line.startswith("seed")).endswith("to do")
    assert "on this machine, within a factor of 3, and" in out
    assert max(map(len, lines)) <= 80 + len(str(tmp_path))
