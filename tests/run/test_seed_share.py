"""The ends of the seed share: a seed LM that takes every step, and one that takes none."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_run import share_text, tiny_values, write_config
from helpers.warm import Warm

from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError, ForestError
from btm_scale.evaluate.replayed_runs import replayed_runs
from btm_scale.evaluate.results import load_results
from btm_scale.forest.branch import Branch
from btm_scale.forest.expert import read_expert
from btm_scale.launch.gpus import GPUS
from btm_scale.launch.plan import Cluster
from btm_scale.report.figures.curves import schedule_curves
from btm_scale.run import grow
from btm_scale.run.dry_run import dry_run
from btm_scale.run.plan import make_plan
from btm_scale.run.state import open_run
from btm_scale.run.status import run_status
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import is_trained, training_job

STEPS, BATCH = 6, 256
BRANCHES = ("dense", "python", "licences")
RAISED = f"budget.tokens={2 * STEPS * BATCH}"


def values(text: Path, share: float, **changes: Any) -> dict[str, Any]:
    return tiny_values(
        text,
        model={"family": "llama", "layers": 1, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 48},
        novel_domains={},
        budget={"tokens": STEPS * BATCH, "seed_share": share, "sequence_length": 32, "batch_tokens": BATCH},
        layout={"precision": "fp32"},
        evaluate={"tokens_per_domain": 500, "dev_blocks": 4, "averages": ["uniform", "posterior"]},
        **{"baselines": {}} | changes,
    )


def weights(run: RunDir, model: str) -> bytes:
    return (run.model(model) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def all_seed(real_text: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunDir]:
    """The YAML of a run with seed share 1, and the finished run."""
    folder = tmp_path_factory.mktemp("all-seed")
    write_config(folder / "run.yaml", values(real_text, 1))
    warm.check("run", folder / "run.yaml", "--out", folder / "run")
    return folder / "run.yaml", RunDir(folder / "run")


@pytest.fixture(scope="module")
def no_seed(
    real_text: Path, warm: Warm, all_seed: tuple[Path, RunDir], tmp_path_factory: pytest.TempPathFactory
) -> RunDir:
    """A finished run with seed share 0."""
    folder = tmp_path_factory.mktemp("no-seed")
    run = RunDir(folder / "run")
    share_text(run, all_seed[1])
    write_config(folder / "run.yaml", values(real_text, 0))
    warm.check("run", folder / "run.yaml", "--out", run.root)
    return run


@pytest.mark.slow
def test_with_seed_share_1_dense_and_experts_are_the_seed_lm_bit_for_bit(all_seed: tuple[Path, RunDir]) -> None:
    _, run = all_seed
    assert read_expert(run.model("seed")).steps == STEPS
    for model in BRANCHES:
        assert weights(run, model) == weights(run, "seed")
        assert (read_expert(run.model(model)).steps, read_expert(run.model(model)).tokens) == (0, 0)


@pytest.mark.slow
def test_with_seed_share_1_every_method_has_the_perplexity_of_the_seed_lm(all_seed: tuple[Path, RunDir]) -> None:
    _, run = all_seed
    methods = load_results(run).methods
    seed = methods["seed"].of("perplexity")
    assert methods.keys() >= {"seed", "dense", "ensemble", "expert:python", "average:uniform", "average:posterior"}
    for method, measured in methods.items():
        assert measured.of("perplexity") == pytest.approx(seed, rel=1e-5), method
    page = run.report.read_text()
    assert "2 experts branched from the seed LM without a training step, as copies of it." in page
    assert "The seed LM takes every step of the schedule." in page
    assert "The ensemble is better than dense on 0 of 2 domains." in page
    assert "In 0 of 2 domains the domain&#39;s own expert is the best single model, and in 2 another" in page


@pytest.mark.slow
def test_with_seed_share_1_models_without_steps_are_done_and_shown_as_done(all_seed: tuple[Path, RunDir]) -> None:
    path, run = all_seed
    config = RunConfig.load(path)
    rows = {row.model: (row.state, row.step, row.steps) for row in run_status(config, run)}
    assert rows == {"seed": ("done", STEPS, STEPS)} | dict.fromkeys(BRANCHES, ("done", 0, 0))
    assert all(model["done"] for model in dry_run(config, run)["models"].values())


@pytest.mark.slow
def test_a_budget_raised_from_seed_share_1_is_trained_by_dense_and_the_experts(
    all_seed: tuple[Path, RunDir], warm: Warm, tmp_path: Path
) -> None:
    path, run = all_seed[0], RunDir(tmp_path / "run")
    shutil.copytree(all_seed[1].root, run.root)
    before = {model: weights(run, model) for model in ("seed", *BRANCHES)}
    assert dry_run(RunConfig.load(path, (RAISED,)), run)["models"]["python"]["resumes_at"] == 0
    raised = open_run(RunConfig.load(path, (RAISED,)), run)
    assert is_trained(raised, run, "seed")
    assert not any(is_trained(raised, run, model) for model in BRANCHES)
    for model in ("dense", "python"):
        warm.check("train", run.config, "--model", model, "--out", run.root)
        assert is_trained(raised, run, model)
        assert read_expert(run.model(model)).steps == STEPS
        assert weights(run, model) != before[model]
        rates = [json.loads(line)["learning_rate"] for line in run.metrics(model).read_text().splitlines()]
        # The second half of the schedule of both budgets.
        assert rates == pytest.approx([1e-2 * (1 - n / 12) / (1 - 0.04) for n in range(7, 13)])
    assert weights(run, "seed") == before["seed"]


@pytest.mark.slow
def test_with_seed_share_0_everything_trains_from_one_random_initialization(
    no_seed: RunDir, warm: Warm, real_text: Path, tmp_path: Path
) -> None:
    seed = read_expert(no_seed.model("seed"))
    assert (seed.steps, seed.tokens) == (0, 0)
    for model in BRANCHES:
        rows = [json.loads(line) for line in no_seed.metrics(model).read_text().splitlines()]
        assert len(rows) == read_expert(no_seed.model(model)).steps == STEPS
        assert rows[0]["loss"] == pytest.approx(math.log(512), abs=0.3)
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert [parent.name for parent in read_expert(no_seed.model(model)).parents] == ["seed"]
    assert len({weights(no_seed, model) for model in ("seed", *BRANCHES)}) == 4
    page = no_seed.report.read_text()
    assert "The seed LM took none of these tokens: it is a random initialization." in page
    # The initialization depends on random_seed alone.
    again = RunDir(tmp_path / "again")
    share_text(again, no_seed)
    write_config(tmp_path / "run.yaml", values(real_text, 0, baselines={"dense": False}, optimizer={"lr": 1e-3}))
    warm.check("train", tmp_path / "run.yaml", "--model", "seed", "--out", again.root)
    assert weights(again, "seed") == weights(no_seed, "seed")


@pytest.mark.slow
def test_dense_has_the_same_bits_at_either_end(no_seed: RunDir, all_seed: tuple[Path, RunDir]) -> None:
    assert weights(no_seed, "dense") == weights(all_seed[1], "seed")


@pytest.mark.slow
def test_an_expert_without_a_step_is_refused_by_the_laws_of_replay(all_seed: tuple[Path, RunDir]) -> None:
    with pytest.raises(ForestError, match=r"'licences' of .* took no training step.*Leave this run out"):
        replayed_runs([all_seed[1]], ["python"], "licences", "dev")


def test_a_plan_has_no_group_for_models_without_a_step(tmp_path: Path) -> None:
    cluster = Cluster(GPUS["h100"], 1, 8)
    for share, trained in ((1, {"seed"}), (0, {"dense", "python", "licences"})):
        config = write_config(tmp_path / "run.yaml", values(tmp_path, share))
        plan = make_plan(config, cluster)
        assert {model for stage in plan["stages"] for row in stage["groups"] for model in row["models"]} == trained
        between = plan["between_groups"]
        assert between["data_parallel_bytes"] == between["data_parallel_bytes_a_step"] * config.budget.branch_steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"added_domains": {"law": {"text": "law.jsonl"}}}, r"added_domains\.law: .* leaves its expert no tokens"),
        ({"experts": {"python": {"model": {"preset": "llama-1m"}}}}, r"experts\.python: .* starts at random"),
    ],
)
def test_with_seed_share_1_an_expert_that_would_not_be_the_seed_lm_needs_its_own_tokens(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        open_run(write_config(tmp_path / "run.yaml", values(tmp_path, 1, **changes)), run)
    assert not run.root.exists()
    (name,) = next(iter(changes.values()))
    own = changes.get("experts", {}).get(name, {"branch": {"schedule": "restarted"}})
    with_tokens = values(tmp_path, 1, **changes | {"experts": {name: own | {"tokens": 4 * BATCH}}})
    job = training_job(write_config(tmp_path / "run.yaml", with_tokens), name)
    assert (job.steps, job.progress, job.warmup_scale) == (8, (0.0, 1.0), 1.0)


def test_a_domain_is_added_to_a_run_of_seed_share_1_once_its_budget_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    path = tmp_path / "run.yaml"
    open_run(write_config(path, values(tmp_path, 1, baselines={"dense": False})), run)
    text = [tmp_path / "law.jsonl"]
    with pytest.raises(ConfigError, match=r"added_domains\.law: .*raise budget\.tokens"):
        grow.branch_expert(RunConfig.load(run.config), run, "law", "seed", text=text)
    (run.checkpoints("seed") / f"step-{STEPS:08d}").mkdir(parents=True)
    open_run(RunConfig.load(path, (RAISED,)), run)
    monkeypatch.setattr(grow, "prepare", lambda config, run: None)
    monkeypatch.setattr(grow, "decide", lambda config, run, name, branch, weights: Branch(parents=(), domains={}))
    grow.branch_expert(RunConfig.load(run.config), run, "law", "seed", text=text)
    job = training_job(RunConfig.load(run.config), "law")
    assert (job.steps, job.progress) == (STEPS, (0.5, 1.0))


def test_an_expert_with_its_own_tokens_is_drawn_on_its_own_schedule_beside_the_seed_lms(tmp_path: Path) -> None:
    experts = {"python": {"tokens": 4 * BATCH, "branch": {"schedule": "restarted"}}}
    config = write_config(tmp_path / "run.yaml", values(tmp_path, 1, experts=experts))
    steps = [{"step": step, "loss": 5.0} for step in range(1, 9)]
    seed, python = schedule_curves(config, {"seed": steps, "python": steps})
    assert list(seed.share) == list(python.share) == [step / 8 for step in range(1, 9)]
