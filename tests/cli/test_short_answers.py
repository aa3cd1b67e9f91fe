"""`inspect` and `prepare` answer in a few lines; everything is under --verbose and --json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.forked_commands import call
from helpers.small_models import random_weights
from safetensors.torch import save_file

from btm_scale.cli.show import show_jobs
from btm_scale.config.run import RunConfig
from btm_scale.report.checkpoint_text import checkpoint_lines
from btm_scale.run_dir import RunDir

LLAMA = {
    "path": "llama",
    "format": "deepspeed",
    "family": "llama",
    "tensors": 39,
    "parameters": 3_000,
    "dtypes": {"bfloat16": 2_000, "float32": 1_000},
    "files": {"mp_rank_00_model_states.pt": 4_000, "mp_rank_01_model_states.pt": 4_000},
    "step": 1_500,
    "tensor_degree": 2,
    "problem": None,
    "converts_to": ["huggingface", "megatron", "deepspeed"],
    "tensor_degrees": [1, 2, 4],
}


def test_a_checkpoint_is_described_in_four_lines_without_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(0).items()}
    for shard, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        save_file({name: weights[name] for name in names}, tmp_path / f"model-0000{shard + 1}-of-00002.safetensors")
    index = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    elements = sum(tensor.numel() for tensor in weights.values())

    assert call("inspect", tmp_path) == 0
    short = capsys.readouterr().out.splitlines()
    assert short[0] == f"{tmp_path}: safetensors, unheard-of"
    assert short[1] == f"  weights  {elements:,} parameters in {len(weights)} tensors: bfloat16"
    assert short[2].startswith("  files    2 files, ")
    assert short[3] == "  convert  to huggingface; config.json does not describe a dense model of a supported family"
    assert len(short) == 4

    assert call("inspect", tmp_path, "--verbose") == 0
    assert "model-00002-of-00002.safetensors: " in capsys.readouterr().out
    assert call("inspect", tmp_path, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["files"]) == 2


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {},
            [
                "llama: deepspeed, llama, step 1,500, tensor parallel degree 2",
                "  weights  3,000 parameters in 39 tensors: 2,000 bfloat16, 1,000 float32",
                "  files    2 files, 8 kB",
                "  convert  to huggingface, megatron or deepspeed, at tensor parallel degree 1, 2 or 4",
            ],
        ),
        ({"problem": "a tensor is missing", "converts_to": []}, ["  problem  a tensor is missing"]),
    ],
)
def test_step_degree_types_and_problems_are_reported(changes: dict[str, Any], lines: list[str]) -> None:
    assert list(checkpoint_lines({**LLAMA, **changes}))[-len(lines) :] == lines


def test_prepared_text_is_one_row_per_domain(
    prepared: tuple[RunConfig, RunDir],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(prepared[1].root, run.root)
    prepared[0].save(tmp_path / "config.yaml")
    monkeypatch.setenv("COLUMNS", "120")
    assert call("prepare", tmp_path / "config.yaml", "--out", run.root) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == "domain documents text train tokens dev test duplicates skipped lines"
    assert [row.split()[0] for row in rows[:2]] == ["code", "prose"]
    assert rows[2:] == [f"The token files are in {run.data}"]
    assert call("prepare", tmp_path / "config.yaml", "--out", run.root, "--json") == 0
    assert json.loads(capsys.readouterr().out)["domains"]["code"]["train"]["documents"] > 0


@pytest.mark.parametrize(
    ("submitted", "dry_run", "shown"),
    [
        ({}, True, "wrote the scripts of seed, experts to a run/slurm; submitted nothing\n"),
        ({"seed": "7"}, False, "submitted seed (7)\nFollow the jobs with: btm-scale status 'a run' --watch\n"),
        ({}, False, "submitted nothing: every job is completed or in the queue\n"),
    ],
)
def test_slurm_jobs_are_one_line(
    submitted: dict[str, str], dry_run: bool, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = {"scripts": {"seed": "seed.sh", "experts": "experts.sh"}, "submitted": submitted}
    show_jobs(jobs, Path("a run"), dry_run=dry_run)
    assert capsys.readouterr().out.startswith(shown)
