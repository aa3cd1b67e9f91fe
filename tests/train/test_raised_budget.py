"""A budget that is raised: the seed LM is kept, dense and experts train further, and no step is taken twice."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launcher import TESTS
from helpers.tiny_run import share_text, tiny_values, write_config
from helpers.worlds import run_script

from btm_scale.config.run import RunConfig
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import ConfigError
from btm_scale.forest.expert import read_expert
from btm_scale.run.dry_run import dry_run
from btm_scale.run.state import open_run
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import is_trained, training_job
from btm_scale.train.mixture import DomainMixture

pytestmark = pytest.mark.slow

SEED_STEPS, STEPS, ADDED = 4, 8, 12  # of the seed LM, of a branch, and of a branch with the doubled budget
BATCH = 128


def values(text: Path, **changes: Any) -> dict[str, Any]:
    return tiny_values(
        text,
        model={"family": "llama", "layers": 1, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 48},
        domains={"code": {"text": "code.jsonl"}, "prose": {"text": "prose.jsonl"}},
        novel_domains={},
        budget={
            "tokens": (SEED_STEPS + STEPS) * BATCH,
            "seed_share": SEED_STEPS / (SEED_STEPS + STEPS),
            "sequence_length": 32,
            "batch_tokens": BATCH,
        },
        layout={"precision": "fp32"},
        checkpoint={"every": 3, "keep": 1},
        baselines={},
        evaluate={"tokens_per_domain": 200, "dev_blocks": 2, "averages": []},
        **changes,
    )


RAISED = f"budget.tokens={(SEED_STEPS + STEPS + ADDED) * BATCH}"
WSD = {"lr": 1e-2, "decay": "wsd", "decay_share": 1 / 3}
STABLE = 4  # steps of a branch before the decay of the first budget


def rows(run: RunDir, model: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics(model).read_text().splitlines()]


def weights(run: RunDir, model: str) -> str:
    return read_expert(run.model(model)).content_hash


def copy_run(source: RunDir, target: RunDir, models: tuple[str, ...]) -> None:
    """Copy a run's config, text and some of its models."""
    target.root.mkdir()
    for path in (source.config, source.data, source.tokenizer):
        (target.root / path.name).symlink_to(path)
    for model in models:
        for folder in (source.train(model), source.model(model), source.model_scores(model)):
            shutil.copytree(folder, target.root / folder.relative_to(source.root))


@pytest.fixture(scope="module")
def raised(
    prepared: tuple[RunConfig, RunDir], text_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """By schedule: a run whose budget was doubled after training, and what it had before."""
    folder = tmp_path_factory.mktemp("raised")
    models = {"linear": ["seed", "dense", "code"], "wsd": ["seed", "code"]}
    calls: list[dict[str, Any]] = []
    for name, optimizer in (("linear", {"lr": 1e-2}), ("wsd", WSD)):
        run = RunDir(folder / name)
        share_text(run, prepared[1])
        write_config(folder / f"{name}.yaml", values(text_root, optimizer=optimizer))
        calls.append({"config": str(folder / f"{name}.yaml"), "settings": [], "run": str(run.root)})
        calls[-1]["models"] = models[name]
    run_script(TESTS / "train" / "train_models.py", calls, folder)
    result = {}
    for call in calls:
        run = RunDir(Path(call["run"]))
        before = {model: (weights(run, model), rows(run, model)) for model in call["models"]}
        plan = dry_run(RunConfig.load(Path(call["config"]), (RAISED,)), run)
        result[run.root.name] = {"run": run, "before": before, "plan": plan}
        call["settings"] = [RAISED]
        if run.root.name == "wsd":
            call["models"] = ["code"]
    # The same models with the raised budget from the beginning, each from the same seed LM.
    for call in list(calls):
        run = RunDir(Path(call["run"]))
        anew = RunDir(folder / f"{run.root.name}-anew")
        open_run(RunConfig.load(Path(call["config"]), (RAISED,)), run)
        copy_run(run, anew, ("seed",))
        calls.append(call | {"config": str(anew.config), "settings": [], "run": str(anew.root), "models": ["code"]})
        if run.root.name == "wsd":
            config = RunConfig.load(run.config)
            config.model_copy(update={"budget": config.budget.model_copy(update={"raised_from": ()})}).save(anew.config)
        result[run.root.name]["anew"] = anew
    run_script(TESTS / "train" / "train_models.py", calls, folder)
    return result


@pytest.mark.parametrize(("schedule", "kept"), [("linear", STEPS), ("wsd", STABLE)])
def test_the_seed_is_kept_and_the_others_train_further_without_repeating_a_step(
    schedule: str, kept: int, raised: dict[str, dict[str, Any]]
) -> None:
    run, before = raised[schedule]["run"], raised[schedule]["before"]
    assert (weights(run, "seed"), rows(run, "seed")) == before["seed"]
    config = RunConfig.load(run.config)
    for model in before.keys() - {"seed"}:
        assert [row["step"] for row in rows(run, model)] == list(range(1, STEPS + ADDED + 1))
        assert rows(run, model)[:kept] == before[model][1][:kept]
        assert weights(run, model) != before[model][0]
        card = read_expert(run.model(model))
        assert card.steps == STEPS + ADDED
        assert card.tokens == card.steps * BATCH // (1 if model == "dense" else 2)
        assert is_trained(config, run, model)


def test_the_weights_of_wsd_are_those_of_the_raised_budget_from_the_beginning(
    raised: dict[str, dict[str, Any]],
) -> None:
    run, anew = raised["wsd"]["run"], raised["wsd"]["anew"]
    assert weights(anew, "code") == weights(run, "code")
    assert [row["loss"] for row in rows(anew, "code")] == [row["loss"] for row in rows(run, "code")]


def test_an_expert_that_begins_after_the_raise_has_the_schedule_of_the_raised_budget_alone(
    raised: dict[str, dict[str, Any]],
) -> None:
    def falls(run: RunDir) -> bool:
        rates = [row["learning_rate"] for row in rows(run, "code")]
        assert len(rates) == STEPS + ADDED
        return all(later < earlier for earlier, later in itertools.pairwise(rates))

    assert falls(raised["linear"]["anew"])
    assert not falls(raised["linear"]["run"])


def test_the_rate_of_wsd_falls_only_at_the_end(raised: dict[str, dict[str, Any]]) -> None:
    rates = [row["learning_rate"] for row in rows(raised["wsd"]["run"], "code")]
    total = SEED_STEPS + STEPS + ADDED
    stable = round(total * 2 / 3) - SEED_STEPS
    assert rates[:stable] == [1e-2] * stable
    assert rates[stable:] == pytest.approx([1e-2 * (1 - k / (total / 3)) for k in range(1, total // 3 + 1)], abs=1e-9)


@pytest.mark.parametrize(("schedule", "step"), [("linear", STEPS), ("wsd", STABLE)])
def test_a_dry_run_reports_what_a_raised_budget_keeps_and_where_models_resume(
    schedule: str, step: int, raised: dict[str, dict[str, Any]]
) -> None:
    plan = raised[schedule]["plan"]
    assert plan["models"]["seed"]["done"]
    assert (plan["models"]["code"]["done"], plan["models"]["code"]["resumes_at"]) == (False, step)
    assert plan["models"]["prose"]["resumes_at"] is None
    [change] = plan["changes"]
    assert change["key"] == "budget.tokens"
    assert change["effect"].startswith("the seed LM is kept")


def test_the_text_of_the_added_steps_follows_that_of_the_first(
    raised: dict[str, dict[str, Any]], prepared: tuple[RunConfig, RunDir]
) -> None:
    config, run = RunConfig.load(raised["linear"]["run"].config), prepared[1]
    tokenizer = Tokenizer.load(run.tokenizer)
    for model in ("dense", "code"):
        job = training_job(config, model)
        mixture = DomainMixture(config, run, job, job.weights, tokenizer)
        first, last = job.first_sample, job.first_sample + job.steps * job.sequences
        samples = [mixture.read(number, 1) for number in range(first, last)]
        assert len({tuple(sample.flatten().tolist()) for sample in samples}) == len(samples)
        small = training_job(config.model_copy(update={"budget": without_raise(config)}), model)
        order = DomainMixture(config, run, small, small.weights, tokenizer)
        count = small.steps * small.sequences
        assert torch.equal(torch.cat(samples[:count]), order.read(first, count))


def without_raise(config: RunConfig) -> Any:
    return config.budget.model_copy(update={"tokens": config.budget.raised_from[0], "raised_from": ()})


def test_a_budget_cannot_be_lowered_or_raised_without_checkpoints(
    raised: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    source, run = raised["linear"]["run"], RunDir(tmp_path / "run")
    copy_run(source, run, ("seed", "code"))
    config = RunConfig.load(run.config)
    with pytest.raises(ConfigError, match=r"budget\.tokens: 3072 there, 1536 here \(a budget can be raised, not low"):
        open_run(RunConfig.load(run.config, ("budget.tokens=1536", "budget.raised_from=[]")), run)
    shutil.rmtree(run.checkpoints("code"))
    with pytest.raises(ConfigError, match=r"the checkpoints of code are gone\. The added tokens need"):
        open_run(RunConfig.load(run.config, (f"budget.tokens={config.budget.tokens * 2}",)), run)
    again = open_run(RunConfig.load(source.config, (f"budget.tokens={config.budget.tokens * 2}",)), source)
    assert again.budget.raised_from == (1536, 3072)
    assert again.budget.seed_budget == 1536
