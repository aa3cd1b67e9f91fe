"""Adding experts to a run and removing them, without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from btm_scale.config.run import RunConfig
from btm_scale.data.prepare import prepare
from btm_scale.errors import ConfigError, DataError, ForestError
from btm_scale.forest.branch import Branch
from btm_scale.forest.expert import CARD, Parent, read_expert
from btm_scale.forest.forest import experts
from btm_scale.forest.membership import add_expert, remove_expert
from btm_scale.forest.removed import note_removal
from btm_scale.run import grow
from btm_scale.run.grow import branch_expert, remove_from_forest
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import training_job
from btm_scale.util.locks import ModelLock


@pytest.fixture
def run(handmade: tuple[RunConfig, RunDir], tmp_path: Path) -> RunDir:
    """A copy of a run with four experts."""
    run = RunDir(tmp_path / "run")
    shutil.copytree(handmade[1].root, run.root)
    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Text of a domain that is new to the run."""
    path = tmp_path / "recipes.jsonl"
    lines = (json.dumps({"text": f"recipe {number}: take {number} eggs and stir. " * 40}) for number in range(100))
    path.write_text("\n".join(lines))
    return path


def branch(run: RunDir, name: str, parents: str | dict[str, float], *text: Path) -> tuple[Branch, Branch | None]:
    return branch_expert(RunConfig.load(run.config), run, name, parents, text=text)


def files(run: RunDir) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for path in sorted(run.root.rglob("*")) if path.is_file() and ".locks" not in path.parts
    }


def weights(branch_record: Branch) -> dict[str, float]:
    return {parent.name: parent.weight for parent in branch_record.parents}


def test_branching_records_the_parents_and_writes_no_weights(run: RunDir, text: Path) -> None:
    before = files(run)
    settled, former = branch(run, "recipes", {"python": 1, "docs": 3}, text)
    assert former is None
    assert weights(settled) == {"python": 0.25, "docs": 0.75}
    assert Branch.load(run.branch("recipes")) == settled
    config = RunConfig.load(run.config)
    assert list(config.added_domains) == ["recipes"]
    assert config.experts["recipes"].branch.parents == {"python": 1, "docs": 3}
    added = {path.relative_to(run.root).parts[0] for path in files(run).keys() - before.keys()}
    assert added == {"data", "train"}
    assert not list(run.train("recipes").rglob("*.safetensors"))


def test_a_branch_can_train_its_mlps_alone_and_keeps_that_until_it_is_changed(run: RunDir, text: Path) -> None:
    def trained_part(**settings: object) -> str:
        config = RunConfig.load(run.config)
        branch_expert(config, run, "recipes", "seed", text=[text], settings=settings)
        return training_job(RunConfig.load(run.config), "recipes").trains

    assert trained_part() == "all"
    assert trained_part(train="mlp") == "mlp"
    assert trained_part(replay=0.1) == "mlp"
    assert trained_part(train="all") == "all"


def test_the_same_branch_again_changes_nothing(run: RunDir, text: Path) -> None:
    first = branch(run, "recipes", {"python": 1, "docs": 3}, text)
    before = files(run)
    assert branch(run, "recipes", {"python": 1, "docs": 3}, text) == first
    assert branch(run, "recipes", {"python": 1, "docs": 3}) == first
    assert files(run) == before


def test_other_parents_replace_those_of_an_untrained_expert(run: RunDir, text: Path) -> None:
    first, _ = branch(run, "recipes", "seed", text)
    second, former = branch(run, "recipes", {"cpp": 1.0})
    assert former == first
    assert weights(second) == {"cpp": 1.0}
    assert Branch.load(run.branch("recipes")) == second
    assert RunConfig.load(run.config).experts["recipes"].branch.parents == {"cpp": 1.0}


def test_parents_that_left_the_forest_can_be_replaced(run: RunDir, text: Path) -> None:
    branch(run, "recipes", {"cpp": 1.0}, text)
    remove_expert(run, "cpp")
    with pytest.raises(ForestError, match="cannot branch from 'cpp'"):
        branch(run, "recipes", {"cpp": 1.0})
    settled, former = branch(run, "recipes", "seed")
    assert former is not None
    assert weights(settled) == {"seed": 1.0}


def test_an_untrained_expert_of_the_configs_domains_can_be_branched(run: RunDir) -> None:
    remove_expert(run, "cpp")
    settled, _ = branch(run, "cpp", {"python": 1.0})
    assert weights(settled) == {"python": 1.0}
    config = RunConfig.load(run.config)
    assert not config.added_domains
    assert config.experts["cpp"].branch.parents == {"python": 1.0}


def test_an_expert_that_is_trained_or_in_training_keeps_its_parents(run: RunDir, text: Path) -> None:
    with pytest.raises(ForestError, match=r"'cpp' is already an expert of"):
        branch(run, "cpp", {"python": 1.0})
    first, _ = branch(run, "recipes", "seed", text)
    before = files(run)
    with ModelLock(run.train("recipes")):
        with pytest.raises(ForestError, match="'recipes' has begun to train"):
            branch(run, "recipes", {"python": 1.0})
        with pytest.raises(ForestError, match="'recipes' is being trained"):
            remove_from_forest(RunConfig.load(run.config), run, "recipes")
    (run.train("recipes") / "lock").unlink()
    (run.checkpoints("recipes") / "step-00000005").mkdir(parents=True)
    with pytest.raises(ForestError, match="'recipes' has begun to train"):
        branch(run, "recipes", {"python": 1.0})
    assert branch(run, "recipes", "seed") == (first, None)  # a batch job that is given again
    assert files(run) == before


def test_a_new_domain_is_in_the_config_once_its_text_is_prepared(
    run: RunDir, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group that starts meanwhile would score it too."""
    domains = list[int]()

    def prepare_later(*arguments: Any) -> None:
        domains.append(len(RunConfig.load(run.config).added_domains))
        prepare(*arguments)

    monkeypatch.setattr(grow, "prepare", prepare_later)
    branch(run, "recipes", "seed", text)
    assert domains == [0]
    assert list(RunConfig.load(run.config).added_domains) == ["recipes"]


def test_a_failed_branch_leaves_the_run_unchanged(run: RunDir, text: Path, tmp_path: Path) -> None:
    branch(run, "recipes", "seed", text)
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "one"}))
    wide = json.loads((run.model("docs") / "config.json").read_text()) | {"intermediate_size": 48}
    (run.model("docs") / "config.json").write_text(json.dumps(wide))
    before = files(run)
    with pytest.raises(ForestError, match=r"'law', which is not a finished model .* Use one of seed, cpp, docs"):
        branch(run, "recipes", {"law": 1.0})
    with pytest.raises(ForestError, match="recipes cannot branch from 'docs': ffn is 48 there and 96 here"):
        branch(run, "recipes", {"python": 0.5, "docs": 0.5})
    with pytest.raises(ConfigError, match=r"Domain 'recipes' already has text: .*recipes\.jsonl"):
        branch(run, "recipes", "seed", short)
    with pytest.raises(DataError):
        branch(run, "short", "seed", short)
    text.unlink()
    with pytest.raises(DataError):
        branch(run, "recipes", {"python": 1.0})
    assert files(run) == before


def test_removing_an_untrained_branch_removes_it_from_the_config(run: RunDir, text: Path) -> None:
    before = run.config.read_bytes()
    branch(run, "recipes", "seed", text)
    remove_from_forest(RunConfig.load(run.config), run, "recipes")
    assert run.config.read_bytes() == before
    assert not run.train("recipes").exists()
    assert list(experts(run)) == ["cpp", "docs", "licences", "python"]


def test_a_removal_that_is_given_again_changes_nothing(run: RunDir) -> None:
    config = RunConfig.load(run.config)
    assert remove_from_forest(config, run, "docs")
    before = files(run)
    assert not remove_from_forest(config, run, "docs")
    assert files(run) == before


def test_the_removal_of_a_branch_that_is_given_again_changes_nothing(run: RunDir, text: Path) -> None:
    branch(run, "recipes", "seed", text)
    assert remove_from_forest(RunConfig.load(run.config), run, "recipes")
    before = files(run)
    assert not remove_from_forest(RunConfig.load(run.config), run, "recipes")
    assert files(run) == before


def test_a_removal_by_an_earlier_version_is_known_from_the_experts_that_descend_from_it(run: RunDir) -> None:
    card = read_expert(run.model("cpp"))
    card.model_copy(update={"parents": (Parent("gone", 1.0),)}).save(run.model("cpp") / CARD)
    assert not remove_from_forest(RunConfig.load(run.config), run, "gone")
    with pytest.raises(ForestError, match="Unknown expert 'seed'"):
        remove_from_forest(RunConfig.load(run.config), run, "seed")


def test_an_expert_that_returned_is_removed_again(run: RunDir, tmp_path: Path) -> None:
    config = RunConfig.load(run.config)
    shutil.copytree(run.model("docs"), tmp_path / "docs")
    remove_from_forest(config, run, "docs")
    shutil.copytree(tmp_path / "docs", run.model("docs"))
    assert remove_from_forest(config, run, "docs")
    assert "docs" not in experts(run)


def test_an_interrupted_removal_is_completed(run: RunDir) -> None:
    """By a power cut, the expert may have its temporary name and the scores their own."""
    config = RunConfig.load(run.config)
    add_expert(config, run, run.model("docs"), "copy")
    run.model_scores("copy").mkdir()
    run.train("copy").mkdir(parents=True)
    note_removal(run, "copy")
    run.model("copy").rename(run.experts / ".copy.01234567.removed")
    assert not remove_from_forest(config, run, "copy")
    assert not run.model_scores("copy").exists()
    assert not run.train("copy").exists()


@pytest.mark.parametrize("name", ["physics", "../seed", "average/uniform", ""])
def test_a_refused_removal_leaves_no_lock(name: str, run: RunDir) -> None:
    shutil.rmtree(run.root / ".locks", ignore_errors=True)
    with pytest.raises(ForestError, match="Unknown expert"):
        remove_from_forest(RunConfig.load(run.config), run, name)
    assert not (run.root / ".locks").exists()
