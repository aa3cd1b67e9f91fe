"""Loss on dev text during training: what is recorded, early stopping, the best checkpoint, and monitors."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.launcher import TESTS
from helpers.tiny_run import share_text, tiny_values, write_config
from helpers.worlds import run_script
from safetensors.torch import load_file

from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError
from btm_scale.forest.expert import read_expert
from btm_scale.forest.scores import Scores
from btm_scale.run.status import run_status
from btm_scale.run_dir import RunDir
from btm_scale.train import dev_loss
from btm_scale.train.checkpoint import state_path
from btm_scale.train.dev_loss import DevLoss
from btm_scale.train.jobs import training_job

STEPS, LENGTH = 8, 32


def values(text: Path, **settings: Any) -> dict[str, Any]:
    return tiny_values(
        text,
        model={"family": "llama", "layers": 1, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 48},
        domains={"code": {"text": "code.jsonl"}, "prose": {"text": "prose.jsonl"}},
        novel_domains={},
        budget={"tokens": 2 * STEPS * 128, "sequence_length": LENGTH, "batch_tokens": 128},
        layout={"precision": "fp32", "data": 2, "context": 2},
        seed_layout={"zero": 3},
        checkpoint={"every": 3, "keep": 2},
        baselines={"dense": False},
        evaluate={"tokens_per_domain": 7 * LENGTH, "dev_blocks": 7, "averages": []},
        dev_loss={"every": 3, "tokens": 7 * LENGTH, **settings},
        deepspeed={"csv_monitor": {"enabled": True}},
    )


def rows(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics("code").read_text().splitlines()]


def of_csv(run: RunDir, name: str) -> list[list[str]]:
    return list(csv.reader((run.monitors / "csv_monitor" / "code" / f"code_{name}.csv").open()))


@pytest.fixture(scope="module")
def trained(
    prepared: tuple[RunConfig, RunDir], text_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A run with dev losses, its metrics, the same after an interruption, and one that ended early."""
    folder = tmp_path_factory.mktemp("dev-loss")
    run, early = RunDir(folder / "run"), RunDir(folder / "early")
    for one in (run, early):
        share_text(one, prepared[1])
    write_config(folder / "a.yaml", values(text_root))
    write_config(folder / "b.yaml", values(text_root, every=1, patience=2, best=True))
    scripted = [3.0, 2.0, 2.5, 2.0, 1.0]
    call: dict[str, Any] = {"config": str(folder / "a.yaml"), "settings": [], "run": str(run.root)}
    other: dict[str, Any] = {"config": str(folder / "b.yaml"), "settings": [], "run": str(early.root)}
    calls = [call | {"models": ["seed", "code"]}, other | {"models": ["code"], "dev_losses": scripted}]
    run_script(TESTS / "train" / "train_models.py", [calls[0]], folder)
    shutil.copytree(run.train("seed"), early.train("seed"))
    shutil.copytree(run.model("seed"), early.model("seed"))
    before, weights = rows(run), read_expert(run.model("code")).content_hash
    shutil.rmtree(run.model("code"))
    shutil.rmtree(state_path(run.checkpoints("code"), STEPS))
    run_script(TESTS / "train" / "train_models.py", [call | {"models": ["code"]}, calls[1]], folder)
    return {"run": run, "before": before, "weights": weights, "early": early}


@pytest.mark.slow
def test_the_loss_of_each_domain_is_that_of_the_scores_of_its_dev_text(trained: dict[str, Any]) -> None:
    run = trained["run"]
    measured = {row["step"]: row for row in rows(run) if "dev_loss" in row}
    assert list(measured) == [3, 6, STEPS]
    scores = Scores.load(run.scores("code", "code", "dev")).log_probs
    last = measured[STEPS]
    assert last["dev_loss"] == last["dev_loss/code"] == pytest.approx(-float(scores.mean()), abs=1e-5)
    seed = [json.loads(line) for line in run.metrics("seed").read_text().splitlines()][-1]
    assert seed["dev_loss"] == pytest.approx((seed["dev_loss/code"] + seed["dev_loss/prose"]) / 2)
    progress = {row.model: row for row in run_status(RunConfig.load(run.config), run)}
    assert progress["code"].dev_loss == last["dev_loss"]


@pytest.mark.slow
def test_a_restart_repeats_no_step_in_the_metrics_or_a_monitor(trained: dict[str, Any]) -> None:
    run = trained["run"]
    assert read_expert(run.model("code")).content_hash == trained["weights"]
    assert [(row["step"], row["loss"], row.get("dev_loss")) for row in rows(run)] == [
        (row["step"], row["loss"], row.get("dev_loss")) for row in trained["before"]
    ]
    assert [row[0] for row in of_csv(run, "loss")] == ["step", *map(str, range(1, STEPS + 1))]
    assert [row[0] for row in of_csv(run, "dev_loss")] == ["step", "3", "6", "8"]


@pytest.mark.slow
def test_training_ends_without_a_lower_loss_and_exports_the_best_checkpoint(trained: dict[str, Any]) -> None:
    run = trained["early"]
    card = read_expert(run.model("code"))
    assert (card.steps, card.best_step, card.tokens) == (4, 2, 4 * 2 * LENGTH)
    exported = load_file(run.model("code") / "model.safetensors")
    best = load_file(state_path(run.checkpoints("code"), 2) / "model.safetensors")
    assert all((tensor == best[f"master/{name}"]).all() for name, tensor in exported.items())
    assert sorted(path.name for path in run.checkpoints("code").glob("step-*")) == [
        f"step-{step:08d}" for step in (2, 3, 4)
    ]


def decisions(monkeypatch: pytest.MonkeyPatch, model: str, losses: Sequence[float], **settings: Any) -> DevLoss:
    """Return a DevLoss that has measured these losses after steps 1, 2, ..."""
    monkeypatch.setattr(dev_loss.dist, "broadcast_object_list", lambda values, src: None)
    monkeypatch.setattr(dev_loss, "_blocks", lambda config, run, domain: [domain])
    config = RunConfig.model_validate(values(Path(), **({"every": 1} | settings)))
    group: Any = SimpleNamespace(is_first=True)
    dev = DevLoss(group, config, RunDir(Path()), training_job(config, model), {"code": 1.0})
    for step, loss in enumerate(losses, 1):
        monkeypatch.setattr(dev_loss, "mean_loss", lambda engine, blocks, loss=loss: loss)
        dev.measure(SimpleNamespace(), step)  # type: ignore[arg-type]
    return dev


@pytest.mark.parametrize(
    ("losses", "is_over"),
    [([3, 2, 2.5], False), ([3, 2, 2.5, 2.0], True), ([3, 2, 2.5, 1.9], False), ([1, 2], False), ([1, 2, 2], True)],
)
def test_training_is_over_after_as_many_measurements_without_a_lower_loss(
    losses: list[float], is_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decisions(monkeypatch, "code", losses, patience=2).is_over(len(losses)) is is_over
    assert not decisions(monkeypatch, "seed", losses, patience=2).is_over(len(losses))


def test_the_best_step_is_the_first_with_the_lowest_finite_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [3.0, float("nan"), 2.0, 2.0]
    assert decisions(monkeypatch, "code", losses, best=True).best_step == 3
    assert decisions(monkeypatch, "code", losses).best_step is None
    assert decisions(monkeypatch, "seed", losses, best=True).best_step is None


def test_early_stopping_without_dev_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dev_loss: patience and best need dev losses, and every is 0\. Set every"):
        write_config(tmp_path / "a.yaml", values(tmp_path, every=0, patience=2))
