from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_run import save_card, tiny_values, write_config

from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError, ForestError
from btm_scale.run.dry_run import dry_run
from btm_scale.run.state import open_run
from btm_scale.run_dir import RunDir
from btm_scale.util.locks import held


def begin(config: RunConfig, run: RunDir) -> None:
    """Open a run whose tokenizer exists, so that its config is fixed."""
    open_run(config, run)
    run.tokenizer.mkdir()


@pytest.mark.parametrize(
    "change",
    [
        {"evaluate": {"averages": ["uniform"], "blocks": "carry", "prior": "uniform"}},
        {"baselines": {"dense": False}},
        {"novel_domains": {"docs": {"text": "docs.jsonl"}, "law": {"text": "law.jsonl"}}},
        {"layout": {"tensor": 2, "data": 4, "zero": 3, "sequence_parallel": True, "offload": "all"}},
        {"layout": {"micro_batch": 1, "recompute": "full", "precision": "fp32"}},
        {"seed_layout": {"tensor": 2}},
        {"experts": {"python": {"layout": {"zero": 0, "data": 2}}}},
        {"data": {"workers": 1}},
        {"evaluate": {"split": "dev", "tokens_per_domain": 500, "dev_blocks": 5}},
        {"deepspeed": {"csv_monitor": {"enabled": True}, "zero_optimization": {"reduce_bucket_size": 1000}}},
    ],
)
def test_settings_that_affect_no_model_may_change_between_calls(tmp_path: Path, change: dict[str, object]) -> None:
    values, run = tiny_values(tmp_path), RunDir(tmp_path / "run")
    begin(write_config(tmp_path / "a.yaml", values), run)
    kept = {key: values.get(key, {}) | part for key, part in change.items()}  # type: ignore[operator]
    other = write_config(tmp_path / "b.yaml", values | kept)
    open_run(other, run)
    assert RunConfig.load(run.config).model_dump() == other.model_dump()


@pytest.mark.parametrize(
    "change",
    [
        {"budget": {"tokens": 20 * 1024}},
        {"budget": {"batch_tokens": 512}},
        {"random_seed": 4},
        {"deepspeed": {"zero_optimization": {"zero_quantized_gradients": True}}},
        {"deepspeed": {"gradient_clipping": 0.5}},
    ],
)
def test_settings_that_affect_a_model_may_not_change(tmp_path: Path, change: dict[str, object]) -> None:
    values, run = tiny_values(tmp_path), RunDir(tmp_path / "run")
    begin(write_config(tmp_path / "a.yaml", values), run)
    before = run.config.read_bytes()
    kept = {key: values.get(key, {}) | part if isinstance(part, dict) else part for key, part in change.items()}
    with pytest.raises(ConfigError, match=r"holds a run with a different config\. The differences are:\n  "):
        open_run(write_config(tmp_path / "b.yaml", values | kept), run)
    assert run.config.read_bytes() == before


def test_a_dry_run_rejects_the_changes_that_the_run_would_reject(real_text: Path, tmp_path: Path) -> None:
    values, run = tiny_values(real_text), RunDir(tmp_path / "run")
    begin(write_config(tmp_path / "a.yaml", values), run)
    changed = write_config(tmp_path / "b.yaml", values | {"random_seed": 4, "name": "other"})
    with pytest.raises(ConfigError, match=r"The differences are:\n  random_seed: \d+ there, 4 here\n") as raised:
        dry_run(changed, run)
    allowed = "These may change:\n  name: tiny there, other here: no model is trained or scored again\n"
    assert allowed in str(raised.value)


def test_adding_a_domain_allows_no_change_to_one_with_the_same_prefix(tmp_path: Path) -> None:
    values, run = tiny_values(tmp_path), RunDir(tmp_path / "run")
    added = {"law2": {"text": "law2.jsonl"}}
    begin(write_config(tmp_path / "a.yaml", values | {"added_domains": added}), run)
    joined = values | {"added_domains": added | {"law": {"text": "law.jsonl"}}}
    changed = joined | {"experts": {"law2": {"tokens": 5000}}}
    with pytest.raises(ConfigError, match=r"The differences are:\n  experts\.law2\.tokens: None there, 5000 here"):
        open_run(write_config(tmp_path / "b.yaml", changed), run)
    open_run(write_config(tmp_path / "c.yaml", joined), run)


LOCAL = {"data": 2, "sync_every": 4}


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        (
            {"layout": {"precision": "fp16"}},
            {"layout": {"precision": "bf16"}},
            "layout.precision: fp16 there, bf16 here (fp16 scales",
        ),
        (
            {"layout": {"precision": "bf16"}},
            {"layout": {"precision": "fp16"}},
            "layout.precision: bf16 there, fp16 here (fp16 scales",
        ),
        ({"layout": {"data": 2}}, {"layout": LOCAL}, "layout.sync_every: 1 there, 4 here (local and outer steps"),
        ({"layout": LOCAL}, {"layout": LOCAL | {"outer_lr": 0.5}}, "layout.outer_lr: 0.7 there, 0.5 here (local and"),
        (
            {"layout": LOCAL},
            {"layout": LOCAL | {"data": 4}},
            "layout.data: 2 there, 4 here (with local steps each data rank",
        ),
        (
            {"seed_layout": LOCAL},
            {"seed_layout": LOCAL | {"data": 4}},
            "seed_layout.data: 2 there, 4 here (with local steps",
        ),
        (
            {"experts": {"python": {"layout": LOCAL}}},
            {"experts": {}},
            "experts.python.layout.sync_every: 4 there, 1 here (local and outer steps",
        ),
    ],
)
def test_a_layout_that_trains_another_model_is_rejected_with_the_reason(
    before: dict[str, object], after: dict[str, object], difference: str, tmp_path: Path
) -> None:
    values, run = tiny_values(tmp_path), RunDir(tmp_path / "run")
    begin(write_config(tmp_path / "a.yaml", values | before), run)
    with pytest.raises(ConfigError) as raised:
        open_run(write_config(tmp_path / "b.yaml", values | after), run)
    assert f"\n  {difference}" in str(raised.value)


def test_every_difference_is_listed_once_without_allowed_changes(tmp_path: Path) -> None:
    values, run = tiny_values(tmp_path), RunDir(tmp_path / "run")
    layout = {"data": 2, "sync_every": 2}
    first = values | {"layout": layout, "seed_layout": {"zero": 0}, "experts": {"python": {"layout": {"zero": 2}}}}
    begin(write_config(tmp_path / "a.yaml", first), run)
    second = first | {"layout": layout | {"sync_every": 4, "zero": 3}, "random_seed": 8, "checkpoint": {"every": 1}}
    second["optimizer"] = {"lr": 2e-2}
    with pytest.raises(ConfigError) as raised:
        open_run(write_config(tmp_path / "b.yaml", second), run)
    lines = [line.strip().split(":")[0] for line in str(raised.value).splitlines() if " there, " in line]
    assert lines == ["random_seed", "optimizer.lr", "layout.sync_every"]


def test_a_key_that_repeats_an_inherited_value_is_not_a_change(tmp_path: Path) -> None:
    values, run = tiny_values(tmp_path), RunDir(tmp_path / "run")
    first = values | {"layout": LOCAL, "seed_layout": {"sync_every": 4}}
    begin(write_config(tmp_path / "a.yaml", first), run)
    open_run(write_config(tmp_path / "b.yaml", values | {"layout": LOCAL}), run)


def test_a_named_parent_that_does_not_exist_is_reported_before_anything_is_written(
    real_text: Path, tmp_path: Path
) -> None:
    experts = {"licences": {"branch": {"parents": {"python": 0.5, "law": 0.5}}}}
    config, run = write_config(tmp_path / "a.yaml", tiny_values(real_text, experts=experts)), RunDir(tmp_path / "run")
    for command in (open_run, dry_run):
        with pytest.raises(ForestError, match=r"parents: Unknown model 'law'\. Choose one of seed, dense, python\."):
            command(config, run)
    assert not run.root.exists()
    save_card(run.model("law"), "law")
    open_run(config, run)
    assert dry_run(config, run)["models"]["licences"]["parents"] == {"python": 0.5, "law": 0.5}


def test_a_removed_parent_does_not_block_an_expert_in_training(tmp_path: Path) -> None:
    experts = {"licences": {"branch": {"parents": {"law": 1.0}}}}
    config, run = write_config(tmp_path / "a.yaml", tiny_values(tmp_path, experts=experts)), RunDir(tmp_path / "run")
    (run.checkpoints("licences") / "step-00000005").mkdir(parents=True)
    open_run(config, run)
    assert run.config.is_file()


def test_a_corrected_config_replaces_that_of_an_attempt_that_failed_before_any_result(
    real_text: Path, tmp_path: Path
) -> None:
    values, run = tiny_values(real_text), RunDir(tmp_path / "run")
    open_run(write_config(tmp_path / "a.yaml", values), run)
    run.data.mkdir()
    run.log("seed").parent.mkdir(parents=True)
    run.log("seed").write_text("it failed")
    corrected = write_config(tmp_path / "b.yaml", values | {"random_seed": 4})
    assert "python" in dry_run(corrected, run)["models"]
    open_run(corrected, run)
    assert RunConfig.load(run.config).random_seed == 4


@pytest.mark.parametrize(
    "result",
    [
        "tokenizer/tokenizer.json",
        "data/python/fingerprint.json",
        "train/random/0/branch.json",
        "train/seed/metrics.jsonl",
        "train/seed/checkpoints/step-00000005/model.safetensors",
        "seed/expert.json",
        "experts/python/expert.json",
    ],
)
def test_any_result_that_depends_on_the_config_fixes_it(result: str, tmp_path: Path) -> None:
    values, run = tiny_values(tmp_path), RunDir(tmp_path / "run")
    open_run(write_config(tmp_path / "a.yaml", values), run)
    (run.root / result).parent.mkdir(parents=True)
    (run.root / result).touch()
    with pytest.raises(ConfigError, match="holds a run with a different config"):
        open_run(write_config(tmp_path / "b.yaml", values | {"random_seed": 4}), run)


def test_the_config_cannot_change_while_a_process_prepares_the_run(tmp_path: Path) -> None:
    values, run = tiny_values(tmp_path), RunDir(tmp_path / "run")
    open_run(write_config(tmp_path / "a.yaml", values), run)
    changed = write_config(tmp_path / "b.yaml", values | {"random_seed": 4})
    with held(run.prepare_lock), pytest.raises(ConfigError, match="holds a run with a different config"):
        open_run(changed, run)
    open_run(changed, run)


def test_a_run_without_a_name_keeps_the_one_that_its_folder_recorded(tmp_path: Path) -> None:
    values, run = tiny_values(tmp_path), RunDir(tmp_path / "run")
    begin(write_config(tmp_path / "old.yaml", values | {"name": "run"}), run)
    del values["name"]
    config = write_config(tmp_path / "my.yaml", values)
    assert config.name == "my"
    assert open_run(config, run).name == "run"
    assert RunConfig.load(run.config).name == "run"
    assert open_run(write_config(tmp_path / "my.yaml", values | {"name": "other"}), run).name == "other"


def test_the_folder_of_the_text_may_move(tmp_path: Path) -> None:
    values, run = tiny_values(tmp_path / "a"), RunDir(tmp_path / "run")
    begin(write_config(tmp_path / "a.yaml", values), run)
    moved = write_config(tmp_path / "b.yaml", values | {"text_root": str(tmp_path / "b")})
    assert open_run(moved, run).text_root == tmp_path / "b"
