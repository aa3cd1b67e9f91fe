"""The stage that trains the experts of a run jointly, as one mixture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.worlds import run_script
from pydantic import ValidationError
from safetensors.torch import load_file

from btm_scale.config.run import RunConfig
from btm_scale.evaluate.mixture_facts import mixture_note, routing_by_domain, routing_entropy_by_domain
from btm_scale.forest.expert import read_expert
from btm_scale.forest.scores import Scores
from btm_scale.launch.memory import rank_memory
from btm_scale.run.slurm_jobs import jobs
from btm_scale.run.state import is_done
from btm_scale.run_dir import MOE, RunDir
from btm_scale.train.jobs import is_trained, optimizer_of, shape_of, training_job, training_stages
from btm_scale.train.metrics import read_metrics

DOMAINS = ["cpp", "docs", "licences", "python"]
TRAIN = {"budget_share": 0.5, "batch_tokens": 1024, "balance": 0.01, "lr_scale": 0.1, "router_lr_scale": 0.3}
Run = tuple[RunConfig, RunDir]


def with_mixture(config: RunConfig, **moe: Any) -> RunConfig:
    return RunConfig.model_validate(config.model_dump() | {"moe": moe})


@pytest.fixture(scope="module")
def trained(handmade: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunDir, RunDir]:
    """A run whose mixture was trained, and one whose training was killed and resumed."""
    config, made = handmade
    config = with_mixture(config, train=TRAIN)
    folder = tmp_path_factory.mktemp("mixture")
    runs = [RunDir(folder / name) for name in ("complete", "killed")]
    for run in runs:
        shutil.copytree(made.root, run.root, symlinks=True)
        config.save(run.config)
    run_script(
        Path(__file__).with_name("train_mixture.py"), [[str(runs[0].root), None], [str(runs[1].root), 9]], folder
    )
    return (config, *runs)


def test_a_mixture_whose_training_was_killed_ends_in_the_same_bits(trained: tuple[RunConfig, RunDir, RunDir]) -> None:
    config, complete, killed = trained
    ours, theirs = (load_file(run.model(MOE) / "model.safetensors") for run in (complete, killed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [row["step"] for row in read_metrics(killed.metrics(MOE))] == list(range(1, 13))
    assert is_done(config, killed, MOE)


def test_joint_training_changes_the_mixture_and_records_where_it_came_from(
    trained: tuple[RunConfig, RunDir, RunDir],
) -> None:
    config, run, _ = trained
    card, first = read_expert(run.model(MOE)), read_expert(run.mixture_start)
    assert [parent.name for parent in card.parents] == DOMAINS
    assert card.domains == dict.fromkeys(DOMAINS, 0.25)
    assert (card.steps, card.tokens, first.steps) == (12, 12 * 1024, 0)
    assert card.data_fingerprint == {name: read_expert(run.model(name)).content_hash for name in DOMAINS}
    assert json.loads((run.model(MOE) / "config.json").read_text())["expert_names"] == DOMAINS
    rows = read_metrics(run.metrics(MOE))
    before, after = (load_file(path / "model.safetensors") for path in (run.mixture_start, run.model(MOE)))
    matrices = [name for name, tensor in before.items() if tensor.dim() > 1]
    assert not any(torch.equal(before[name].float(), after[name].float()) for name in matrices)
    for row in rows:
        assert sum(row[f"expert_load/{name}"] for name in DOMAINS) == pytest.approx(1.0)
        assert 0 < row["router_entropy"] < np.log(4)
    assert [row["step"] for row in rows if "routing" in row] == [1, 10, 12]
    routing = rows[-1]["routing"]
    layers = config.model.shape(1, 64).layers
    for domain, by_expert in routing["load"].items():
        assert domain in DOMAINS
        assert list(by_expert) == DOMAINS
        np.testing.assert_allclose(np.sum(list(by_expert.values()), axis=0), np.ones(layers), atol=1e-3)
        assert len(routing["entropy"][domain]) == layers
    assert np.mean([by_expert[domain] for domain, by_expert in routing["load"].items()]) > 0.25, "its own expert"
    assert [row["learning_rate"] for row in rows[-1:]] == [0.0]
    assert "router fitted" in mixture_note(run, card)


def test_the_scores_have_the_routing_of_every_layer(trained: tuple[RunConfig, RunDir, RunDir]) -> None:
    config, run, _ = trained
    routing = routing_by_domain(config, run, read_expert(run.model(MOE)))
    assert list(routing) == list(config.all_domains)
    assert np.mean([routing[name][name] for name in DOMAINS]) > 0.25, "domains prefer their own experts"
    scores = Scores.load(run.scores(MOE, "docs", "dev"))
    assert scores.routing is not None
    assert scores.routing.shape == (config.model.shape(1, 64).layers, 4)
    np.testing.assert_allclose(scores.routing.sum(axis=1), 1.0)
    assert scores.routing_entropy is not None
    assert ((scores.routing_entropy > 0) & (scores.routing_entropy < np.log(4))).all()
    assert list(routing_entropy_by_domain(config, run)) == list(config.all_domains)


@pytest.mark.parametrize(
    "moe",
    [
        {"train": {"budget_share": 0.5}},
        {"train": TRAIN, "top_k": 1},
        {"train": TRAIN, "experts": ["cpp", "docs"]},
    ],
)
def test_a_mixture_of_other_settings_is_trained_again(
    moe: dict[str, Any], trained: tuple[RunConfig, RunDir, RunDir]
) -> None:
    config, run, _ = trained
    assert is_trained(config, run, MOE)
    assert not is_trained(with_mixture(config, **moe), run, MOE)
    same = {"train": TRAIN, "layout": {"zero": 3}}
    assert is_trained(with_mixture(config, **same), run, MOE), "a layout changes no weights"


def run_config(**changes: Any) -> RunConfig:
    values = {
        "domains": {name: {"text": f"{name}.jsonl"} for name in DOMAINS},
        "model": {"preset": "llama-1m"},
        "layout": {"precision": "bf16"},
        "moe": {},
    }
    return RunConfig.model_validate(values | changes)


def test_the_mixture_is_the_last_stage_and_absent_without_its_section() -> None:
    config = run_config()
    assert training_stages(config)[-1] == [MOE]
    assert [job.name for job in jobs(config)] == ["prepare", "seed", "dense", "experts", "moe", "evaluate"]
    assert jobs(config)[-2].after == ("dense", "experts")
    without = run_config(moe=None)
    assert not any(MOE in stage for stage in training_stages(without))


def test_the_mixture_trains_on_a_part_of_the_budget_with_its_own_schedule() -> None:
    config = run_config(moe={"train": {"budget_share": 0.2, "lr_scale": 0.5, "router_lr_scale": 2.0}})
    job, optimizer = training_job(config, MOE), optimizer_of(config, MOE)
    assert job.sequences == config.budget.sequences // 4, "the batch of an expert"
    assert job.steps == round(0.2 * config.budget.tokens / (config.budget.batch_tokens / 4))
    assert job.router_rate == 4.0
    rates = [job.rate_at(step, optimizer) for step in range(1, job.steps + 1)]
    assert max(rates) == pytest.approx(0.5 * config.optimizer.lr, rel=0.02)
    assert rates.index(max(rates)) == pytest.approx(0.1 * job.steps, abs=1)
    assert rates[-1] == 0.0


def test_the_batch_of_joint_training_may_be_chosen() -> None:
    config = run_config(moe={"train": {"budget_share": 0.2, "batch_tokens": 4096}})
    job = training_job(config, MOE)
    assert job.sequences == 4096 // config.budget.sequence_length
    assert job.steps == round(0.2 * config.budget.tokens / 4096)
    assert job.batch_share == pytest.approx(4096 / config.budget.batch_tokens)


def test_a_plan_counts_the_memory_of_all_experts_and_the_operations_of_the_active_ones() -> None:
    config = run_config()
    shape, dense = shape_of(config, MOE, 2048), shape_of(config, "cpp", 2048)
    layout = training_job(config, MOE).layout
    memory = [rank_memory(one, layout, micro_batch=1, length=256, accumulation=1) for one in (shape, dense)]
    assert memory[0].states / memory[1].states == pytest.approx(shape.parameters / dense.parameters)
    assert shape.parameters > 2 * dense.parameters
    mlp = dense.layers * dense.hidden * (dense.up_width + dense.ffn)
    router = shape.layers * shape.hidden * 4
    assert shape.flops_per_token(256) - dense.flops_per_token(256) == pytest.approx(6 * (mlp + router))


def test_several_tensor_ranks_shard_the_sequence() -> None:
    config = run_config(moe={"layout": {"tensor": 2}})
    assert training_job(config, MOE).layout.sequence_parallel
    assert not training_job(config, "cpp").layout.sequence_parallel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {"top_k": 5}}, r"moe\.top_k is 5, and there are 4 experts"),
        ({"moe": {"experts": ["cpp"]}}, r"moe\.experts: cpp are not at least two different experts"),
        ({"moe": {"experts": ["cpp", "pithon"]}}, r"moe\.experts: Unknown domain 'pithon'.*'python'"),
        ({"moe": {"router": "fited"}}, r"moe\.router"),
        ({"model": {"preset": "gpt2-1m"}}, r"moe: gpt2 layers have no mixture-of-experts class"),
        ({"experts": {"cpp": {"model": {"preset": "llama-4m"}}}}, r"moe: 'cpp' has its own model"),
        ({"moe": {"top_k": 1, "train": {"parameters": "router"}}}, r"routers of top_k 1 learn nothing"),
        ({"moe": {"layout": {"tensor": 3}}}, r"moe\.layout: Cannot shard the model over tensor=3"),
        ({"moe": {"layout": {"data": 7}}}, r"moe\.layout: Cannot share a batch"),
        ({"seed_layout": {"data": 32}, "moe": {}}, r"batch of 16 sequences.*Or set moe\.train\.batch_tokens"),
        ({"moe": {"layout": {"zeroo": 1}}}, r"moe\.layout\.zeroo: unknown key"),
        ({"novel_domains": {"moe": {"text": "moe.jsonl"}}}, r"a domain is called 'moe'"),
    ],
)
def test_what_makes_no_mixture_is_refused_with_the_config(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run_config(**changes)


@pytest.mark.parametrize("tensor", ["two", None, [2], 1.5, 0])
def test_a_layout_with_a_wrong_degree_is_refused_as_that_of_the_seed_is(tensor: Any) -> None:
    messages = []
    for place, section in (
        ("moe.", {"moe": {"layout": {"tensor": tensor}}}),
        ("seed_", {"seed_layout": {"tensor": tensor}}),
    ):
        with pytest.raises(ValidationError) as refused:
            run_config(**section)
        [error] = refused.value.errors()
        messages.append(error["msg"].replace(f"{place}layout", "layout"))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0].strip(), "once"


def test_a_degree_in_quotes_is_a_number() -> None:
    assert training_job(run_config(moe={"layout": {"tensor": "2"}}), MOE).layout.tensor == 2
