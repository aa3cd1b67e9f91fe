from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from btm_scale.config.run import OptimizerConfig, RunConfig
from btm_scale.configs import FOLDER
from btm_scale.errors import ConfigError
from btm_scale.model.shape import PRESETS
from btm_scale.run.pipeline import training_stages
from btm_scale.train.jobs import model_names, training_job

DOMAINS = {"math": {"text": "math.jsonl"}, "code": {"text": ["src/**/*.py"]}}


def load(tmp_path: Path, values: dict[str, object], *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return RunConfig.load(path, overrides)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_that_is_shipped_parses_and_plans_all_its_jobs(path: Path) -> None:
    config = RunConfig.load(path)
    for model in model_names(config):
        job = training_job(config, model)
        # A pretrained model may be the seed LM as it is, where the budget has no share for it.
        assert (job.steps > 0) == (model != "seed" or config.budget.seed_share > 0)
        assert job.accumulation * job.micro_batch * job.layout.data == job.sequences


def test_only_domains_must_be_given(tmp_path: Path) -> None:
    config = load(tmp_path, {"domains": DOMAINS})
    assert list(config.domains) == ["math", "code"]
    with pytest.raises(ConfigError, match="domains: must be given"):
        load(tmp_path, {})


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.waight_decay: no such key; did you mean 'weight_decay'\?"):
        load(tmp_path, {"domains": DOMAINS, "optimizer": {"waight_decay": 0.1}})
    with pytest.raises(ConfigError, match=r"domains\.math\.feild: no such key; did you mean 'field'\?"):
        load(tmp_path, {"domains": {"math": {"text": "a", "feild": "b"}}})


def test_every_problem_is_told_at_once_with_its_path(tmp_path: Path) -> None:
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
        "domains.math.text: must be given",
        "use 1024",
        "optimizer.lr: -1",
        "modle: no such key; did you mean 'model'?",
        "layout.zero",
    ):
        assert part in text


def test_an_experts_own_layout_is_checked_like_the_groups(tmp_path: Path) -> None:
    experts = {"math": {"layout": {"tensr": 2}}, "maths": {}}
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, {"domains": DOMAINS, "experts": experts})
    assert "experts.math.layout.tensr: no such key; did you mean 'tensor'?" in str(raised.value)
    assert "experts.maths: no domain has this name" in str(raised.value)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nname: b\ndomains: {}\n")
    with pytest.raises(ConfigError, match="line 2: key 'name' stands twice"):
        RunConfig.load(path)


def test_a_mapping_may_take_over_anothers_keys_and_replace_some(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "domains:\n  math: &all {text: m, field: body}\n  code: &code {<<: *all, text: c}\n"
        "  law: {<<: *code, weight: 2}\n"
    )
    domains = RunConfig.load(path).domains
    assert [domain.text for domain in domains.values()] == [("m",), ("c",), ("c",)]
    assert [domain.field for domain in domains.values()] == ["body"] * 3
    path.write_text("domains:\n  math: &all {text: m}\n  code: {<<: *all, weight: 2, weight: 3}\n")
    with pytest.raises(ConfigError, match="line 3: key 'weight' stands twice"):
        RunConfig.load(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("domains: &all\n  math: *all\n", r"line 2: '\*all' stands inside of what it stands for"),
        ("domains: {[a, b]: {text: x}}\n", "line 1: a key is a mapping or a list"),
        ("domains: {math: {text: a\0b}}\n", "is not valid YAML: .*#x0000"),
    ],
)
def test_yaml_that_no_config_can_be_is_refused_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        RunConfig.load(path)


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
def test_a_number_that_nothing_can_be_trained_with_is_refused(tmp_path: Path, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key}.*: must be "):
        load(tmp_path, {"domains": DOMAINS}, override)


@pytest.mark.parametrize("text", ["domains: [", "- a", ""])
def test_what_is_no_yaml_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        RunConfig.load(path)
    with pytest.raises(ConfigError, match="no config at"):
        RunConfig.load(tmp_path / "absent.yaml")


def test_set_changes_one_value_and_takes_numbers_as_people_write_them(tmp_path: Path) -> None:
    config = load(tmp_path, {"domains": DOMAINS}, "budget.tokens=2e6", "optimizer.lr=3e-4", "evaluate.top_k=[1, 2]")
    assert config.budget.tokens == 2_000_000
    assert config.optimizer.lr == 3e-4
    assert config.evaluate.top_k == (1, 2)
    with pytest.raises(ConfigError, match="expected key=value"):
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


def test_the_schedule_warms_up_then_falls_to_its_end() -> None:
    schedule = OptimizerConfig(lr=1.0, warmup=0.1, final=0.2)
    rates = [schedule.rate(progress) for progress in (0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.5, 1.0, 0.6, 0.2])
    assert OptimizerConfig(lr=1.0, warmup=0.0, decay="cosine").rate(0.5) == pytest.approx(0.5)


def test_every_expert_takes_the_steps_of_denses_second_half_at_its_share_of_the_batch(tmp_path: Path) -> None:
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


def test_an_experts_second_moments_average_over_as_many_tokens_as_denses() -> None:
    betas = OptimizerConfig(betas=(0.9, 0.95)).betas_at(1 / 8)
    assert betas[0] == 0.9
    assert betas[1] ** 8 == pytest.approx(0.95)
    assert OptimizerConfig(betas=(0.9, 0.95), scale_beta2=False).betas_at(1 / 8) == (0.9, 0.95)


def test_an_experts_own_tokens_and_batch_replace_its_share(tmp_path: Path) -> None:
    config = load(tmp_path, {"domains": DOMAINS, "experts": {"math": {"tokens": 512_000, "batch_tokens": 1024}}})
    job = training_job(config, "math")
    assert (job.sequences, job.steps) == (4, 500)


def test_a_dense_baseline_of_more_compute_leaves_the_seed_for_a_longer_way(tmp_path: Path) -> None:
    config = load(tmp_path, {"domains": DOMAINS, "baselines": {"dense_compute": [2.5]}})
    assert model_names(config)[:3] == ["seed", "dense", "dense-2.5x"]
    seed, dense, longer = (training_job(config, model) for model in ("seed", "dense", "dense-2.5x"))
    assert seed.steps + longer.steps == pytest.approx(2.5 * (seed.steps + dense.steps), abs=1)
    assert longer.progress == dense.progress


def test_an_expert_stands_in_the_stage_after_its_parents(tmp_path: Path) -> None:
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
    ("parents", "told"),
    [
        ({"code": 1}, "'code' comes after it"),
        ({"math": 1}, "'math' is the expert itself"),
        ({"seed": -1}, "weights must be at least 0"),
        ({}, "weights must be at least 0"),
    ],
)
def test_impossible_parents_are_refused(tmp_path: Path, parents: dict[str, float], told: str) -> None:
    experts = {"math": {"branch": {"parents": parents}}}
    values = {"domains": {"math": {"text": "m"}, "code": {"text": "c"}}, "experts": experts}
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, values)


def test_an_expert_of_its_own_size_starts_afresh_with_a_schedule_of_its_own(tmp_path: Path) -> None:
    experts: dict[str, Any] = {"math": {"model": {"preset": "llama-1m"}, "layout": {"micro_batch": 2}}}
    config = load(tmp_path, {"domains": DOMAINS, "experts": experts})
    job = training_job(config, "math")
    assert (job.branch, job.progress) == (None, (0.0, 1.0))
    assert config.expert_model("math").preset == "llama-1m"
    assert config.expert_model("code").preset == "llama-4m"
    assert "math" in training_stages(config)[1]
    experts["math"]["branch"] = {"replay": 0.1}
    with pytest.raises(ConfigError, match="it has no parents to branch from"):
        load(tmp_path, {"domains": DOMAINS, "experts": experts})


def test_a_domain_stands_in_one_place_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'math' stands in both domains and added_domains"):
        load(tmp_path, {"domains": DOMAINS, "added_domains": {"math": {"text": "m"}}})


def test_a_model_that_no_run_trains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this run trains seed, dense, math, code"):
        training_job(load(tmp_path, {"domains": DOMAINS}), "physics")


@pytest.mark.parametrize(("preset", "millions"), [("llama-1m", 1.33), ("llama-4m", 4.2), ("gpt2-125m", 124.4)])
def test_presets_have_the_sizes_of_their_names(tmp_path: Path, preset: str, millions: float) -> None:
    config = load(tmp_path, {"domains": DOMAINS, "model": {"preset": preset}})
    vocabulary = 50_257 if preset.startswith("gpt2") else 4096
    assert config.model.shape(vocabulary, 1024).parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert preset in PRESETS
