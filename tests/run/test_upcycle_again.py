"""What happens to the mixture that a run has when `upcycle`, or the stage of a run, makes another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.handmade_run import DOMAINS, score_dev
from helpers.upcycling import Run, files_of, unscored

from btm_scale.checkpoint.merge import workers
from btm_scale.checkpoint.merge.runner import UnitRunner
from btm_scale.cli.app import main
from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError
from btm_scale.evaluate.mixture_facts import mixture_note
from btm_scale.forest.expert import CARD, read_expert
from btm_scale.forest.scores import missing_scores
from btm_scale.run import mixture_stage
from btm_scale.run import upcycle as module
from btm_scale.run.mixture_recipe import Recipe
from btm_scale.run.upcycle import upcycle
from btm_scale.run_dir import MOE, RunDir
from btm_scale.train.jobs import is_trained, training_job

TRAINED = {"top_k": 2, "router": "fitted", "train": {"budget_share": 0.1}}
DEV = [(domain, "dev") for domain in DOMAINS]


@pytest.fixture
def run(handmade: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return unscored(handmade, tmp_path, monkeypatch)


@pytest.fixture
def in_stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the mixture of a config as the first rank of its stage does, outside of a process group."""
    monkeypatch.setattr(mixture_stage, "patient_group", lambda: None)
    monkeypatch.setattr(mixture_stage, "dist", SimpleNamespace(barrier=lambda _: None))
    group: Any = SimpleNamespace(is_first=True, device="cpu")

    def make(config: RunConfig, run: RunDir) -> None:
        mixture_stage.first_mixture(group, config, run, training_job(config, MOE))

    return make


def of_top_k(config: RunConfig, top_k: int) -> RunConfig:
    moe = {"router": "fitted", "top_k": top_k, "train": {"budget_share": 0}}
    return RunConfig.model_validate(config.model_dump() | {"moe": moe})


@pytest.mark.parametrize("maker", ["command", "stage"])
def test_another_top_k_is_scored_again_although_no_tensor_depends_on_it(maker: str, run: Run, in_stage: Any) -> None:
    config, folder = run

    def make(top_k: int) -> str:
        if maker == "command":
            main(["upcycle", str(folder.root), "--router", "fitted", "--top-k", str(top_k)])
        else:
            in_stage(of_top_k(config, top_k), folder)
            assert is_trained(of_top_k(config, top_k), folder, MOE)
        return read_expert(folder.model(MOE)).content_hash

    first = make(2)
    score_dev(config, folder, MOE)
    assert missing_scores(config, folder, MOE, DEV) == []
    assert make(1) == first
    assert missing_scores(config, folder, MOE, DEV) == DEV
    score_dev(config, folder, MOE)
    assert missing_scores(config, folder, MOE, DEV) == []


def test_a_mixture_that_was_trained_jointly_is_only_replaced_by_the_run(run: Run) -> None:
    config, folder = run
    directory = folder.model(MOE)
    upcycle(config, folder, Recipe(router="fitted"))
    read_expert(directory).model_copy(update={"layout": TRAINED, "steps": 5000}).save(directory / CARD)
    before = files_of(folder.root)
    with pytest.raises(ForestError, match=r"/moe was trained jointly for 5,000 steps, .*btm-scale run CONFIG"):
        upcycle(config, folder, Recipe(router="fitted"))
    assert files_of(folder.root) == before
    shutil.rmtree(folder.model("cpp"))
    assert mixture_note(folder, read_expert(directory)).endswith("Make it again: btm-scale run CONFIG")
    directory.rename(directory.with_name("kept"))
    assert not upcycle(config, folder, Recipe(router="fitted")).is_complete


def test_a_mixture_that_was_trained_meanwhile_is_not_replaced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = run
    upcycle(config, folder, Recipe(router="random"))
    merge = module.merge

    def training_ends(*arguments: Any, **settings: Any) -> Any:
        read_expert(folder.model(MOE)).model_copy(update={"layout": TRAINED, "steps": 9}).save(folder.model(MOE) / CARD)
        return merge(*arguments, **settings)

    monkeypatch.setattr(module, "merge", training_ends)
    with pytest.raises(ForestError, match="trained jointly for 9 steps"):
        upcycle(config, folder, Recipe(router="random", top_k=1))
    assert read_expert(folder.model(MOE)).steps == 9
    assert left_in(folder) == []


def test_the_command_and_the_stage_do_not_make_a_mixture_at_the_same_time(
    run: Run, in_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = run
    merge, refused = module.merge, []

    def meanwhile(*arguments: Any, **settings: Any) -> Any:
        for make in (lambda: in_stage(of_top_k(config, 2), folder), lambda: upcycle(config, folder, Recipe())):
            with pytest.raises(ForestError, match="is being made by") as refusal:
                make()
            refused.append(refusal)
        return merge(*arguments, **settings)

    monkeypatch.setattr(module, "merge", meanwhile)
    upcycle(config, folder, Recipe(router="hidden"))
    in_stage(of_top_k(config, 1), folder)
    assert len(refused) == 4, "by the command, and by the stage"
    assert read_expert(folder.model(MOE)).layout == {"top_k": 1, "router": "fitted"}


def left_in(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.root.glob(".*moe*"))


def interrupt(recipe: Recipe, at: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the merge that is the `at`-th of a recipe after a few tensors."""
    merge, merge_unit, done = module.merge, UnitRunner.__call__, {"merges": 0, "units": 0}

    def counted(*arguments: Any, **settings: Any) -> Any:
        done["merges"] += 1
        return merge(*arguments, **settings)

    def stopping(self: UnitRunner, unit: Any) -> Any:
        if done["merges"] == at:
            done["units"] += 1
            if done["units"] == 10:
                raise KeyboardInterrupt
        return merge_unit(self, unit)

    with monkeypatch.context() as patched:
        patched.setattr(workers, "_NOTE_EVERY", 1)
        patched.setattr(workers, "MOST", 1)
        patched.setattr(module, "merge", counted)
        patched.setattr(UnitRunner, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            upcycle(*run, recipe)


@pytest.mark.parametrize(("at", "left"), [(1, "..moe.unrouted.partial"), (2, "..moe.new.partial")])
@pytest.mark.parametrize("other", [Recipe(router="random", top_k=1), Recipe(router="random")], ids=["new", "as it is"])
def test_what_an_interrupted_upcycle_left_is_removed_by_another_recipe(
    at: int, left: str, other: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    upcycle(*run, Recipe(router="random"))
    assert left_in(run[1]) == []
    interrupt(Recipe(), at, run, monkeypatch)
    assert left in left_in(run[1])
    upcycle(*run, other)
    assert left_in(run[1]) == []


def test_the_space_of_another_recipe_is_free_before_the_next_is_merged(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(Recipe(), 2, run, monkeypatch)
    folder = run[1].root / "..moe.new.partial"
    assert folder.is_dir()
    merge = module.merge

    def checked(*arguments: Any, **settings: Any) -> Any:
        assert not folder.exists()
        return merge(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(module, "merge", checked)
        upcycle(*run, Recipe(top_k=1))
    assert left_in(run[1]) == []
