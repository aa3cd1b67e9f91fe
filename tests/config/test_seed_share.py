"""Settings that need a trained seed LM, or steps after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_run import tiny_values, write_config

from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError
from btm_scale.train.jobs import model_names, training_job


def load(tmp_path: Path, share: float, **changes: Any) -> RunConfig:
    values = tiny_values(tmp_path, **changes)
    return write_config(tmp_path / "run.yaml", values | {"budget": values["budget"] | {"seed_share": share}})


@pytest.mark.parametrize(("share", "seed", "branch"), [(0, 0, 24), (1, 24, 0)])
def test_at_either_end_all_steps_are_of_the_seed_lm_or_of_its_branches(
    share: float, seed: int, branch: int, tmp_path: Path
) -> None:
    config = load(tmp_path, share)
    jobs = {model: training_job(config, model) for model in model_names(config)}
    assert {model: job.steps for model, job in jobs.items()} == {"seed": seed} | dict.fromkeys(
        jobs.keys() - {"seed"}, branch
    )
    assert jobs["seed"].progress == (0.0, float(share))
    assert jobs["python"].progress == (float(share), 1.0)


def test_a_share_that_leaves_less_than_a_step_names_the_ends_as_remedy(tmp_path: Path) -> None:
    for share in (0.01, 0.99):
        with pytest.raises(ConfigError, match=r"less than one step to seed or experts.*0 leaves all steps to the exp"):
            load(tmp_path, share)


@pytest.mark.parametrize("parents", ["seed", {"seed": 0.5, "python": 0.5}])
def test_an_expert_that_keeps_tensors_of_an_untrained_seed_is_refused(parents: object, tmp_path: Path) -> None:
    experts = {"licences": {"train": "mlp", "branch": {"parents": parents}}}
    with pytest.raises(ConfigError, match=r"experts\.licences: has train: mlp, .*frozen tensors would never be"):
        load(tmp_path, 0, experts=experts)
    assert training_job(load(tmp_path, 0.5, experts=experts), "licences").trains == "mlp"


def test_an_expert_of_an_untrained_seed_may_keep_tensors_that_another_expert_trained(tmp_path: Path) -> None:
    experts = {"licences": {"train": "mlp", "branch": {"parents": {"python": 1.0}}}}
    assert training_job(load(tmp_path, 0, experts=experts), "licences").trains == "mlp"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": {"dense_compute": [1.5]}}, r"baselines\.dense_compute: .*remove dense_compute"),
        ({"experts": {"python": {"tokens": 4096}}}, r"experts\.python\.tokens: .*schedule to restarted"),
        ({"optimizer": {"decay": "wsd"}}, r"decay_share 0\.2 begins before .* at 1\.00 .*lower budget\.seed_share"),
    ],
)
def test_what_continues_a_schedule_that_the_seed_lm_completes_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, 1, **changes)
    load(tmp_path, 0.5, **changes)
