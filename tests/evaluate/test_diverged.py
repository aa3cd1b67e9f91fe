"""Models whose loss is so large that exp(loss) overflows."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from btm_scale.config.run import RunConfig
from btm_scale.evaluate import ablate as ablation
from btm_scale.evaluate.ablate import ablate, file_text
from btm_scale.evaluate.evaluate import evaluate
from btm_scale.forest.forest import experts
from btm_scale.forest.scores import Scores
from btm_scale.run_dir import RunDir


def test_a_diverged_expert_is_reported_by_name_and_left_out(
    finished_run: tuple[RunConfig, RunDir], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, original = finished_run
    run = RunDir(tmp_path / "run")
    shutil.copytree(original.root, run.root)
    [name, *others] = experts(run)
    for path in run.model_scores(name).rglob("*.safetensors"):
        scores = Scores.load(path)
        path.unlink()
        replace(scores, log_probs=np.full_like(scores.log_probs, -1000.0)).save(path)
    with caplog.at_level(logging.WARNING):
        results = evaluate(config, run)
    assert results.methods[f"expert:{name}"].perplexity == {}
    for domain in config.all_domains:
        assert any(f"'expert:{name}' diverged: its loss on {domain} is 1,000 nats" in note for note in results.notes)
        assert f"'expert:{name}' diverged" in caplog.text
        assert np.isfinite(results.methods["ensemble"].perplexity[domain])
        assert results.priors[domain][name] < 0.01
        assert all(domain in results.methods[f"expert:{other}"].perplexity for other in others)
    json.loads(run.results.read_text(), parse_constant=pytest.fail)  # no Infinity, which is not JSON


@pytest.mark.parametrize("loss", [1000.0, math.nan])
def test_a_diverged_average_is_left_out_of_the_ranking(
    loss: float,
    handmade: tuple[RunConfig, RunDir],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, run = handmade
    (tmp_path / "sample.txt").write_text(f"of this test alone {loss}")
    text = file_text(config, run, tmp_path / "sample.txt")
    losses = ablation._average_losses

    def diverges(run: RunDir, subset: tuple[str, ...], *arguments: object) -> dict[str, float]:
        measured = losses(run, subset, *arguments)  # type: ignore[arg-type]
        return dict.fromkeys(measured, loss) if subset == ("cpp",) else measured

    monkeypatch.setattr(ablation, "_average_losses", diverges)
    with caplog.at_level(logging.WARNING):
        answer = ablate(run, {"sample": text}, [("cpp",), ("docs",)])
    assert [row["experts"] for row in answer["ranking"]] == [["docs"]]
    assert "the average of cpp diverged" in caplog.text
