"""Passes over a domain's text, in status and dry run, and their limit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.in_process import answer, refusal
from helpers.text_samples import CODE

from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.report.passes import passes_line
from btm_scale.run_dir import RunDir
from btm_scale.train.passes import budget_tokens, passes_of_run, require_few_passes


def test_a_budget_of_too_many_passes_is_refused_with_a_limit_that_works(text_root: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "text_root": str(text_root),
        "domains": {"code": CODE, "prose": {"text": "prose.jsonl"}},
        "tokenizer": {"vocab_size": 512, "sample_bytes": 100_000},
        "data": {"workers": 1, "dev": 0.1, "test": 0.1},
        "layout": {"precision": "fp32"},
        "budget": {"sequence_length": 64, "batch_tokens": 1024, "tokens": 2_000_000, "max_passes": 1.5},
    }
    config, run = tmp_path / "run.yaml", RunDir(tmp_path / "run")
    config.write_text(dump_text(values))
    message = refusal("prepare", config, "--out", run.root)
    assert re.search(r"Training passes [\d.]+ times over the train split of domain 'code'", message)
    limit = max(float(number) for number in re.findall(r"set budget\.max_passes to ([\d.]*\d)", message))
    settings = ("--out", run.root, "--set", f"budget.max_passes={limit}")
    answer("prepare", config, *settings)
    notes = answer("run", config, "--out", run.root, "--dry-run")["notes"]
    assert any("budget.max_passes is 1.5" in note for note in notes)
    planned = answer("run", config, *settings, "--dry-run")
    assert planned["notes"] == []
    passes = answer("status", run.root)["passes"]
    assert passes == pytest.approx({name: planned["text"][name]["passes"] for name in ("code", "prose")})
    assert max(passes.values()) <= limit


def test_passes_are_those_of_the_seeds_tokens_and_the_experts(prepared: tuple[RunConfig, RunDir]) -> None:
    config, run = prepared
    passes = passes_of_run(config, run)
    for name in config.domains:
        train = Fingerprint.of_domain(run, name).splits["train"].tokens
        assert passes[name] * train == pytest.approx(budget_tokens(config, name))
    require_few_passes(config, passes)  # without a limit


def test_many_domains_are_shown_by_the_fewest_and_the_most_passes() -> None:
    assert passes_line({"a": 1.234, "b": 12.0}) == "passes over the train split: a 1.2, b 12"
    many = {f"d{i}": i + 0.5 for i in range(20)}
    assert passes_line(many) == "passes over the train split: from d0 0.5 to d19 20"
