from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_run import save_card

from btm_scale.config.run import RunConfig
from btm_scale.config.training import BranchConfig
from btm_scale.errors import ForestError
from btm_scale.forest.branch import Branch, parents_of, settle
from btm_scale.forest.expert import Parent, read_expert
from btm_scale.forest.scores import Scores
from btm_scale.run_dir import SEED, RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Three experts: `b` has the lowest loss on the new domain's dev text, `c` by far the highest."""
    run = RunDir(tmp_path)
    random = np.random.default_rng(0)
    text = -random.gamma(1.0, 1.0, 400)
    for name, penalty in {"a": 0.02, "b": 0.0, "c": 3.0}.items():
        save_card(run.model(name), name, domains={name: 1.0}, content_hash=name)
        scores = Scores((text - penalty).astype(np.float32), np.arange(0, 400, 4), name, "text")
        scores.save(run.scores(name, "new", "dev"))
    save_card(run.model(SEED), SEED, domains={"a": 1.0})
    return run


def parents(run: RunDir, choice: object) -> dict[str, float]:
    branch = BranchConfig.model_validate({"parents": choice})
    return {parent.name: parent.weight for parent in parents_of(run, "new", branch)}


def test_a_branch_starts_from_the_seed_the_nearest_or_named_models(run: RunDir) -> None:
    assert parents(run, "seed") == {SEED: 1.0}
    assert parents(run, "nearest") == {"b": 1.0}
    assert parents(run, {"a": 1, "seed": 3}) == {"a": 0.25, "seed": 0.75}


def test_the_posterior_weights_parents_by_dev_text_and_drops_negligible_ones(run: RunDir) -> None:
    weights = parents(run, "posterior")
    assert list(weights) == ["a", "b"]
    assert weights["b"] > weights["a"] > 0.01
    assert sum(weights.values()) == pytest.approx(1.0)


def test_a_removed_parent_is_an_error_that_lists_the_choices(run: RunDir) -> None:
    (run.model("a") / "expert.json").unlink()
    with pytest.raises(
        ForestError, match=r"cannot branch from 'a', which is not a finished .* Use one of seed, b, c\."
    ):
        parents(run, {"a": 1.0})


def test_a_parent_without_scores_is_an_error_with_the_remedy(run: RunDir) -> None:
    run.scores("c", "new", "dev").unlink()
    with pytest.raises(ForestError, match="Score this model first"):
        parents(run, "nearest")


def test_parents_are_settled_once_and_kept_when_the_forest_changes(run: RunDir) -> None:
    config = RunConfig.model_validate({"domains": {name: {"text": name} for name in ("a", "b", "new")}})
    first = settle(config, run, "new", BranchConfig(), {"new": 2.0})
    own = {SEED: read_expert(run.model(SEED)).content_hash}
    assert first == Branch(parents=(Parent(SEED, 1.0),), domains={"new": 1.0}, parent_hashes=own)
    assert settle(config, run, "new", BranchConfig(parents={"a": 1.0}), {"new": 1.0}) == first
    assert json.loads(run.branch("new").read_text())["schema"] == 1


def test_the_parents_weights_are_recorded_until_the_first_checkpoint(run: RunDir) -> None:
    config = RunConfig.model_validate({"domains": {name: {"text": name} for name in ("a", "b", "new")}})

    def recorded(content_hash: str) -> dict[str, str]:
        card = read_expert(run.model(SEED)).model_copy(update={"content_hash": content_hash})
        card.save(run.model(SEED) / "expert.json")
        assert settle(config, run, "new", BranchConfig(), {"new": 1.0}) == Branch.load(run.branch("new"))
        return Branch.load(run.branch("new")).parent_hashes

    assert [recorded("first"), recorded("second")] == [{SEED: "first"}, {SEED: "second"}]
    (run.checkpoints("new") / "step-1").mkdir(parents=True)
    assert recorded("trained further") == {SEED: "second"}


def test_replayed_text_comes_from_the_parents_by_weight(run: RunDir) -> None:
    config = RunConfig.model_validate({"domains": {name: {"text": name} for name in ("a", "b", "new")}})
    branch = settle(config, run, "new", BranchConfig(replay=0.2), {"new": 1.0})
    assert branch.domains == pytest.approx({"new": 0.8, "a": 0.2})


def test_a_record_from_before_schema_numbers_is_read(run: RunDir) -> None:
    run.train("new").mkdir(parents=True)
    old = {"parents": [{"name": "a", "weight": 0.25}, {"name": "seed", "weight": 0.75}], "domains": {"new": 1.0}}
    run.branch("new").write_text(json.dumps(old, indent=2) + "\n")
    assert Branch.load(run.branch("new")).parents == (Parent("a", 0.25), Parent("seed", 0.75))


def test_a_damaged_record_is_an_error_with_the_remedy(run: RunDir) -> None:
    run.train("new").mkdir(parents=True)
    run.branch("new").write_text('{"parents": [], "domains": {"new": "all"}}')
    with pytest.raises(ForestError, match=r"branch\.json .*'domains\.new' .* Delete .*decided again"):
        Branch.load(run.branch("new"))


def test_branching_from_the_nearest_expert_needs_an_expert(tmp_path: Path) -> None:
    with pytest.raises(ForestError, match=r"there is no expert in .* branch from the seed LM"):
        parents(RunDir(tmp_path), "nearest")
