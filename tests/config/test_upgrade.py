from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text, load_yaml
from btm_scale.errors import ConfigError
from btm_scale.train.jobs import training_job

DOMAINS = {name: {"text": f"{name}.jsonl"} for name in ("math", "code")}
SIZES = {"family": "llama", "layers": 2, "hidden": 32, "heads": 4, "ffn": 48}
# Eight sequences in a batch, and so four in an expert's.
BUDGET = {"tokens": 100_000, "seed_share": 0.5, "sequence_length": 64, "batch_tokens": 512}


def written_by_0_1_0(path: Path, **changes: Any) -> Path:
    """A run.yaml as version 0.1.0 wrote it, with every key."""
    experts = {"code": {"group": {"zero": 0}, "model": SIZES | {"groups": 2}}}
    current = {"domains": DOMAINS, "budget": BUDGET, "model": SIZES | {"kv_heads": 1}}
    (path / "new.yaml").write_text(dump_text(current))
    values = RunConfig.load(path / "new.yaml").model_dump(mode="json")
    values["model"]["groups"] = values["model"].pop("kv_heads")
    values |= {"group": values.pop("layout"), "seed_group": values.pop("seed_layout"), "experts": experts}
    (path / "run.yaml").write_text(dump_text({**values, **changes}))
    return path / "run.yaml"


def test_old_keys_in_a_yaml_are_reported_with_their_new_names_beside_all_other_problems(
    tmp_path: Path,
) -> None:
    values = {
        "domains": DOMAINS,
        "model": SIZES | {"groups": 2},
        "group": {"zero": 7},
        "experts": {"math": {"group": {"tensor": 2}, "model": SIZES | {"groups": 2}}},
        "optimizer": {"lr": -1},
    }
    (tmp_path / "my.yaml").write_text(dump_text(values))
    with pytest.raises(ConfigError) as raised:
        RunConfig.load(tmp_path / "my.yaml", ("seed_group.data=2",))
    for line in (
        "model.groups: this key has been renamed; use model.kv_heads",
        "group: this key has been renamed; use layout",
        "seed_group: this key has been renamed; use seed_layout",
        "experts.math.group: this key has been renamed; use experts.math.layout",
        "experts.math.model.groups: this key has been renamed; use experts.math.model.kv_heads",
        "layout.zero: 7: must be 0, 1, 2 or 3",
        "optimizer.lr: -1",
    ):
        assert f"\n  {line}" in str(raised.value)


def test_a_yaml_with_nothing_wrong_but_an_old_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_text({"domains": DOMAINS, "group": {"data": 2}}))
    with pytest.raises(ConfigError, match=r"run\.yaml:\n  group: this key has been renamed; use layout$"):
        RunConfig.load(tmp_path / "run.yaml")


def test_the_config_of_an_earlier_run_folder_is_upgraded_when_it_is_read(tmp_path: Path) -> None:
    path = written_by_0_1_0(tmp_path, seed_group={"data": 4}, group={"micro_batch": 2, "precision": "fp32"})
    config = RunConfig.load(path)
    assert (config.model.kv_heads, config.layout.micro_batch, config.layout.precision) == (1, 2, "fp32")
    assert config.shared_layout.data == 4
    assert config.expert_layout("code").zero == 0
    assert config.expert_model("code").kv_heads == 2
    config.save(tmp_path / "saved" / "run.yaml")
    saved = load_yaml(tmp_path / "saved" / "run.yaml")
    assert saved["schema"] == 2
    assert RunConfig.load(tmp_path / "saved" / "run.yaml") == config


def test_problems_in_an_earlier_config_are_reported_as_in_any_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget\.batch_tokens: must be an integer and is 'many\'"):
        RunConfig.load(written_by_0_1_0(tmp_path, budget=BUDGET | {"batch_tokens": "many"}))


def test_a_config_of_a_later_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_text({"schema": 3, "domains": DOMAINS}))
    with pytest.raises(ConfigError, match=r"has schema 3\. This version of btm-scale reads schemas 1 and 2"):
        RunConfig.load(tmp_path / "run.yaml")


@pytest.mark.parametrize(("data", "batch"), [(1, 4), (2, 4), (3, 3), (8, 8)])
def test_an_upgraded_expert_keeps_the_batch_that_version_0_1_0_rounded_to_its_data_ranks(
    data: int, batch: int, tmp_path: Path
) -> None:
    config = RunConfig.load(written_by_0_1_0(tmp_path, group={"data": data}, seed_group={"data": 1}))
    for name in DOMAINS:
        job = training_job(config, name)
        assert (job.sequences, job.layout.data) == (batch, data)
        assert job.steps == round(config.budget.branch_steps * 4 / batch)
