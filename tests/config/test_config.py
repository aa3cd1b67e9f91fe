from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from btm_scale.config.data import SplitUnit
from btm_scale.config.launch import DeepSpeedConfig, LaunchConfig
from btm_scale.config.run import RunConfig
from btm_scale.config.section import explain
from btm_scale.config.training import OptimizerConfig
from btm_scale.config.yaml import dump_text
from btm_scale.configs import FOLDER
from btm_scale.errors import ConfigError
from btm_scale.model.shape import PRESETS
from btm_scale.run.dry_run import dry_run
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import model_names, training_job, training_stages

DOMAINS = {"math": {"text": "math.jsonl"}, "code": {"text": ["src/**/*.py"]}}


def load(tmp_path: Path, values: dict[str, object], *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(dump_text(values))
    return RunConfig.load(path, overrides)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_each_shipped_config_parses_and_plans_all_its_jobs(path: Path) -> None:
    config = RunConfig.load(path)
    for model in model_names(config):
        job = training_job(config, model)
        # With seed_share 0, a pretrained model is the seed LM without training.
        assert (job.steps > 0) == (model != "seed" or config.budget.seed_share > 0)
        assert job.accumulation * job.micro_batch * job.layout.data == job.sequences


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_each_shipped_config_dry_runs_on_its_text(path: Path, tmp_path: Path) -> None:
    config = RunConfig.load(path, [f"text_root={tmp_path}"])
    for domain in config.all_domains.values():
        keys = [domain.field, *([domain.split_by.field] if isinstance(domain.split_by, SplitUnit) else [])]
        rows = "".join(json.dumps(dict.fromkeys(keys, f"document {i} " * 8)) + "\n" for i in range(12_000)).encode()
        for file in (tmp_path / pattern.replace("*", "part-0") for pattern in domain.text):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(gzip.compress(rows, 1) if file.suffix == ".gz" else rows)
    run = RunDir(tmp_path / "run")
    planned = dry_run(config, run)
    assert set(planned["models"]) == set(model_names(config))
    assert set(planned["text"]) == set(config.all_domains)
    assert not run.root.exists()


def test_only_domains_are_required(tmp_path: Path) -> None:
    config = load(tmp_path, {"domains": DOMAINS})
    assert list(config.domains) == ["math", "code"]
    with pytest.raises(ConfigError, match="domains: missing"):
        load(tmp_path, {})


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.waight_decay: unknown key; did you mean 'weight_decay'\?"):
        load(tmp_path, {"domains": DOMAINS, "optimizer": {"waight_decay": 0.1}})
    with pytest.raises(ConfigError, match=r"domains\.math\.feild: unknown key; did you mean 'field'\?"):
        load(tmp_path, {"domains": {"math": {"text": "a", "feild": "b"}}})


def test_all_problems_are_reported_at_once_with_their_paths(tmp_path: Path) -> None:
    values = {
        "domains": {"a/b": {"text": "x"}, "math": {}},
        "budget": {"batch_tokens": 1000},
        "optimizer": {"lr": -1},
        "modle": {},
        "layout": {"zero": 7},
    }
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, values)
    text = str(raised.value)
    for part in (
        "'a/b' cannot name a domain",
        "domains.math: has neither text nor token_files",
        "use 1024",
        "optimizer.lr: -1",
        "modle: unknown key; did you mean 'model'?",
        "layout.zero",
    ):
        assert part in text


def test_the_seeds_layout_is_checked_against_the_seed_even_where_an_expert_has_its_name(tmp_path: Path) -> None:
    small = {"family": "llama", "layers": 1, "hidden": 64, "heads": 1, "ffn": 64}
    config = load(
        tmp_path,
        {
            "domains": {"seed_layout": {"text": "a.txt"}},
            "model": {"preset": "llama-1m"},
            "seed_layout": {"tensor": 2},
            "experts": {"seed_layout": {"model": small}},
        },
    )
    assert config.shared_layout.tensor == 2


def test_an_experts_own_layout_is_checked_like_the_groups(tmp_path: Path) -> None:
    experts = {"math": {"layout": {"tensr": 2}}, "maths": {}}
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, {"domains": DOMAINS, "experts": experts})
    assert "experts.math.layout.tensr: unknown key; did you mean 'tensor'?" in str(raised.value)
    assert "experts.maths: Unknown domain 'maths'. Did you mean 'math'?" in str(raised.value)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=.inf",
        "optimizer.betas=[0.9, 1]",
        "domains.math.weight=.inf",
        "baselines.dense_compute=[1e400]",
        "experts.math.branch.parents.seed=.nan",
    ],
)
def test_infinite_and_out_of_range_numbers_are_refused(tmp_path: Path, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key}.*: must be "):
        load(tmp_path, {"domains": DOMAINS}, override)


def test_set_changes_one_value_and_parses_scientific_notation(tmp_path: Path) -> None:
    config = load(tmp_path, {"domains": DOMAINS}, "budget.tokens=2e6", "optimizer.lr=3e-4", "evaluate.top_k=[1, 2]")
    assert config.budget.tokens == 2_000_000
    assert config.optimizer.lr == 3e-4
    assert config.evaluate.top_k == (1, 2)
    with pytest.raises(ConfigError, match="Write key=value"):
        load(tmp_path, {"domains": DOMAINS}, "budget.tokens")


def test_paths_are_relative_to_the_yaml_but_to_the_working_folder_in_an_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(tmp_path, {"domains": DOMAINS, "text_root": "t"}).text_root == tmp_path / "t"
    assert load(tmp_path, {"domains": DOMAINS}, "text_root=t").text_root == tmp_path / "elsewhere" / "t"


def test_the_resolved_config_loads_to_an_equal_one(tmp_path: Path) -> None:
    config = load(tmp_path, {"domains": DOMAINS, "experts": {"math": {"layout": {"tensor": 2}, "tokens": 1000}}})
    config.save(tmp_path / "saved" / "run.yaml")
    assert RunConfig.load(tmp_path / "saved" / "run.yaml") == config


def test_the_schedule_warms_up_then_decays_to_its_final_rate() -> None:
    schedule = OptimizerConfig(lr=1.0, warmup=0.1, final=0.2)
    rates = [schedule.rate(progress) for progress in (0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.5, 1.0, 0.6, 0.2])
    assert OptimizerConfig(lr=1.0, warmup=0.0, decay="cosine").rate(0.5) == pytest.approx(0.5)


def test_wsd_keeps_the_rate_until_its_decay() -> None:
    schedule = OptimizerConfig(lr=1.0, warmup=0.1, final=0.2, decay="wsd", decay_share=0.2)
    rates = [schedule.rate(progress) for progress in (0.05, 0.1, 0.5, 0.8, 0.9, 1.0)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.6, 0.2])
    assert schedule.rate(0.05, warmup_scale=0.5) == 1.0


def test_a_wsd_that_decays_before_the_branches_is_refused(tmp_path: Path) -> None:
    values = {"domains": DOMAINS, "optimizer": {"decay": "wsd", "decay_share": 0.6}}
    with pytest.raises(ConfigError, match=r"decay_share 0\.6 begins before the seed LM ends, at 0\.50 of .*use 0\.5"):
        load(tmp_path, values)


def test_an_expert_takes_the_steps_of_dense_after_the_seed_with_a_fraction_of_the_batch(tmp_path: Path) -> None:
    budget = {"tokens": 6_000_000, "seed_share": 0.5, "sequence_length": 256, "batch_tokens": 16_384}
    config = load(tmp_path, {"domains": {name: {"text": name} for name in "abcdefgh"}, "budget": budget})
    seed, dense, expert = (training_job(config, model) for model in ("seed", "dense", "a"))
    assert expert.steps == dense.steps
    assert expert.sequences * 8 == dense.sequences
    assert (dense.batch_share, expert.batch_share) == (1.0, 1 / 8)
    assert dense.first_sample == seed.steps * seed.sequences
    assert seed.samples == dense.samples
    assert seed.progress[1] == dense.progress[0] == expert.progress[0]
    assert dense.progress_at(dense.steps) == expert.progress_at(expert.steps) == 1.0


def test_second_moments_have_the_same_half_life_in_tokens_for_experts_and_dense() -> None:
    betas = OptimizerConfig(betas=(0.9, 0.95)).betas_at(1 / 8)
    assert betas[0] == 0.9
    assert betas[1] ** 8 == pytest.approx(0.95)
    assert OptimizerConfig(betas=(0.9, 0.95), scale_beta2=False).betas_at(1 / 8) == (0.9, 0.95)


def test_an_experts_own_tokens_and_batch_replace_the_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, {"domains": DOMAINS, "experts": {"math": {"tokens": 512_000, "batch_tokens": 1024}}})
    job = training_job(config, "math")
    assert (job.sequences, job.steps) == (4, 500)


def test_batches_and_steps_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    values = {"domains": {name: {"text": name} for name in "abcdefgh"}, "baselines": {"random_split": True}}
    budget = {"tokens": 6_000_000, "sequence_length": 256, "batch_tokens": 16_384}
    jobs = {}
    for data in (1, 2, 8):
        config = load(tmp_path, values | {"budget": budget, "layout": {"data": data}})
        jobs[data] = {name: training_job(config, name) for name in model_names(config)}
    for name, job in jobs[1].items():
        for data in (2, 8):
            other = jobs[data][name]
            assert (other.steps, other.sequences, other.samples) == (job.steps, job.sequences, job.samples)
            assert other.accumulation * other.micro_batch * data == other.sequences


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"budget": {"batch_tokens": 300}}, "budget"),
        ({"experts": {"math": {"batch_tokens": 300}}}, "experts.math"),
        ({"moe": {"train": {"batch_tokens": 300}}}, "moe.train"),
    ],
)
def test_a_batch_of_incomplete_sequences_is_refused_with_the_nearest(
    changes: dict[str, Any], place: str, tmp_path: Path
) -> None:
    budget = {"sequence_length": 256, "batch_tokens": 4096, "tokens": 100_000} | changes.pop("budget", {})
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, {"domains": DOMAINS, "budget": budget, **changes})
    problem = f"{place}: batch_tokens 300 is not a multiple of sequence_length 256. A batch has complete sequences: use"
    assert f"{problem} 256." in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"layout": {"data": 3}}, ["layout: Cannot share a batch of 8 sequences among data=3 ranks. data must divide"]),
        (
            {"layout": {"data": 3}},
            ["the batch: use 1, 2, 4 or 8.", "seed_layout: Cannot share a batch of 16"],
        ),
        ({"seed_layout": {"data": 5}}, ["seed_layout: Cannot share", "use 1, 2, 4, 8 or 16."]),
        ({"experts": {"math": {"layout": {"data": 16}}}}, ["experts.math.layout: Cannot share a batch of 8"]),
        (
            {"experts": {"math": {"batch_tokens": 256}}, "layout": {"data": 2}},
            ["experts.math.layout: Cannot share a batch of 1 sequence among data=2 ranks", "use 1."],
        ),
    ],
)
def test_data_ranks_that_do_not_divide_a_batch_are_refused_with_those_that_do(
    changes: dict[str, Any], messages: list[str], tmp_path: Path
) -> None:
    budget = {"sequence_length": 256, "batch_tokens": 4096}
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, {"domains": DOMAINS, "budget": budget, **changes})
    for part in messages:
        assert part in str(raised.value)


def test_a_dense_baseline_with_more_compute_trains_longer_from_the_seed(tmp_path: Path) -> None:
    config = load(tmp_path, {"domains": DOMAINS, "baselines": {"dense_compute": [2.5]}})
    assert model_names(config)[:3] == ["seed", "dense", "dense-2.5x"]
    seed, dense, longer = (training_job(config, model) for model in ("seed", "dense", "dense-2.5x"))
    assert seed.steps + longer.steps == pytest.approx(2.5 * (seed.steps + dense.steps), abs=1)
    assert longer.progress == dense.progress


def test_an_expert_is_in_the_stage_after_its_parents(tmp_path: Path) -> None:
    values = {
        "domains": {"math": {"text": "m"}, "code": {"text": "c"}},
        "added_domains": {"law": {"text": "l"}, "news": {"text": "n"}, "wiki": {"text": "w"}},
        "experts": {
            "law": {"branch": {"parents": {"math": 1, "seed": 1}}},
            "news": {"branch": {"parents": "nearest"}},
        },
    }
    stages = training_stages(load(tmp_path, values))
    assert [sorted(stage) for stage in stages] == [
        ["seed"],
        ["code", "dense", "math", "wiki"],
        ["law"],
        ["news"],
    ]


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ({"code": 1}, "'code' comes after it"),
        ({"math": 1}, "'math' is the expert itself"),
        ({"seed": -1}, "Weights must be non-negative and not all zero"),
        ({}, "Weights must be non-negative and not all zero"),
    ],
)
def test_invalid_parents_are_refused(tmp_path: Path, parents: dict[str, float], message: str) -> None:
    experts = {"math": {"branch": {"parents": parents}}}
    values = {"domains": {"math": {"text": "m"}, "code": {"text": "c"}}, "experts": experts}
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, values)


def test_an_expert_with_its_own_size_starts_at_random_with_its_own_schedule(tmp_path: Path) -> None:
    experts: dict[str, Any] = {"math": {"model": {"preset": "llama-1m"}, "layout": {"micro_batch": 2}}}
    config = load(tmp_path, {"domains": DOMAINS, "experts": experts})
    job = training_job(config, "math")
    assert (job.branch, job.progress) == (None, (0.0, 1.0))
    assert config.expert_model("math").preset == "llama-1m"
    assert config.expert_model("code").preset == "llama-4m"
    assert "math" in training_stages(config)[1]
    experts["math"]["branch"] = {"replay": 0.1}
    with pytest.raises(ConfigError, match="has both model and branch"):
        load(tmp_path, {"domains": DOMAINS, "experts": experts})


def test_a_domain_listed_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'math' appears in both domains and added_domains"):
        load(tmp_path, {"domains": DOMAINS, "added_domains": {"math": {"text": "m"}}})


def test_a_model_that_the_run_does_not_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Choose one of seed, dense, math, code"):
        training_job(load(tmp_path, {"domains": DOMAINS}), "physics")


@pytest.mark.parametrize(("preset", "millions"), [("llama-1m", 1.33), ("llama-4m", 4.2), ("gpt2-125m", 124.4)])
def test_presets_have_the_sizes_in_their_names(tmp_path: Path, preset: str, millions: float) -> None:
    config = load(tmp_path, {"domains": DOMAINS, "model": {"preset": preset}})
    vocabulary = 50_257 if preset.startswith("gpt2") else 4096
    assert config.model.shape(vocabulary, 1024).parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert preset in PRESETS


@pytest.mark.parametrize(
    "launch",
    [
        {"deepspeed": {"environment": {"HF_TOKEN": "canary"}}},
        {"deepspeed": {"environment": {"wandb_api_key": "canary"}}},
        {"slurm": {"setup": ["export AWS_SECRET_ACCESS_KEY=canary"]}},
        {"slurm": {"setup": ["PASSWORD=canary source env.sh"]}},
        {"slurm": {"options": ["--export=ALL,HF_TOKEN=canary"]}},
        {"deepspeed": {"connect": ["ssh", "{host}", "env", "HF_TOKEN=canary"]}},
        {"mpi": {"command": ["mpirun", "-x", "HF_TOKEN=canary"]}},
    ],
)
def test_a_secret_in_the_launch_section_is_refused_and_not_repeated(launch: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        LaunchConfig.model_validate(launch)
    message = explain(raised.value, LaunchConfig)
    assert "looks like a secret" in message
    assert "canary" not in message


def test_variables_that_only_resemble_secrets_are_allowed() -> None:
    variables = {"TOKENIZERS_PARALLELISM": "false", "NCCL_IB_PKEY": "1", "KEYBOARD": "x"}
    assert DeepSpeedConfig(environment=variables).environment == variables
