"""Commands on one run that wait for each other, refuse to start, or run at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from helpers.tiny_run import save_card
from safetensors.torch import save_file
from torch import ones

from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError
from btm_scale.forest import membership
from btm_scale.forest.expert import is_finished
from btm_scale.forest.forest import experts
from btm_scale.forest.membership import add_expert, adding
from btm_scale.forest.turns import changing_config, evaluating, removing, scoring, using
from btm_scale.run.grow import remove_from_forest
from btm_scale.run_dir import RunDir
from btm_scale.util.locks import ModelLock

_SHORTLY = 0.2  # seconds in which a thread that need not wait has ended


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with the cards of two experts."""
    run = RunDir(tmp_path / "run")
    for name in ("law", "math"):
        save_card(run.model(name), name)
    return run


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.model_validate({"domains": {"math": {"text": "math"}, "law": {"text": "law"}}})


def friend_in(folder: Path) -> Path:
    """Write a model that may be added."""
    (folder / "friend").mkdir()
    (folder / "friend/config.json").write_text("{}")
    save_file({"weight": ones(4)}, folder / "friend/model.safetensors")
    return folder / "friend"


def started(job: Callable[[], object]) -> threading.Thread:
    """Start a job, and give it the time that it takes if nothing holds it up."""
    thread = threading.Thread(target=job)
    thread.start()
    thread.join(_SHORTLY)
    return thread


def test_an_expert_is_not_removed_while_a_command_uses_the_forest(run: RunDir, config: RunConfig) -> None:
    message = rf"Cannot remove 'law' from {run.root}: .* is using its experts\. .* Wait until it ends, or stop it"
    with using(run), using(run), pytest.raises(ForestError, match=message):
        remove_from_forest(config, run, "law")
    with ModelLock(run.train("math")):
        with pytest.raises(ForestError, match=r"the group that trains 'math' is using its experts"):
            remove_from_forest(config, run, "law")
        with pytest.raises(ForestError, match=r"'math' is being trained"):
            remove_from_forest(config, run, "math")
    assert list(experts(run)) == ["law", "math"]
    remove_from_forest(config, run, "law")
    assert list(experts(run)) == ["math"]


@pytest.mark.parametrize("turn", [evaluating, scoring, changing_config])
def test_a_removal_waits_for_commands_that_read_the_forest_for_a_while(
    turn: Callable[[RunDir], AbstractContextManager[None]], run: RunDir, config: RunConfig
) -> None:
    with turn(run):
        removal = started(lambda: remove_from_forest(config, run, "law"))
        assert list(experts(run)) == ["law", "math"]
    removal.join(10)
    assert list(experts(run)) == ["math"]


def test_an_added_expert_appears_after_an_evaluation_and_is_scored_before_the_next(
    run: RunDir, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btm_scale.forest.membership._require_fit", lambda config, run, source: None)
    source = friend_in(tmp_path)
    order, scored = list[str](), threading.Event()

    def add() -> None:
        with adding(config, run, source, "friend"):
            order.append("added")
            scored.wait(10)
            order.append("scored")

    def evaluate() -> None:
        with evaluating(run):
            order.append("evaluated")

    with evaluating(run):
        addition = started(add)
        assert list(run.experts.glob(".friend.*.partial/model.safetensors"))  # copied already
        assert not is_finished(run.model("friend"))
    while not is_finished(run.model("friend")):
        addition.join(_SHORTLY)
    beside = started(lambda: scoring(run).__enter__())
    assert not beside.is_alive()
    evaluation = started(evaluate)
    assert order == ["added"]
    scored.set()
    for thread in (addition, evaluation):
        thread.join(10)
    assert order == ["added", "scored", "evaluated"]


def test_a_removal_that_fails_ends_its_turn(run: RunDir, config: RunConfig) -> None:
    with pytest.raises(ForestError, match="Unknown expert 'physics'"):
        remove_from_forest(config, run, "physics")
    with removing(run, "law"):
        pass


def test_an_addition_that_finds_the_model_added_meanwhile_never_holds_its_turn_twice(
    run: RunDir, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that waits to be alone between the two would wait for the first, and the second for that command."""
    monkeypatch.setattr(membership, "_require_fit", lambda config, run, source: None)
    source, holders, most = friend_in(tmp_path), [0], [0]
    add_expert(config, run, source, "friend")
    answers = iter([False, False])  # not there yet when it is looked for
    is_there, share = membership.is_finished, membership.scoring

    def is_finished_late(directory: Path) -> bool:
        return is_there(directory) and next(answers, True)

    @contextmanager
    def counted(run: RunDir) -> Iterator[None]:
        holders[0] += 1
        most[0] = max(most[0], holders[0])
        with share(run):
            yield
        holders[0] -= 1

    monkeypatch.setattr(membership, "is_finished", is_finished_late)
    monkeypatch.setattr(membership, "scoring", counted)
    with adding(config, run, source, "friend") as added:
        assert added.is_complete
    assert (holders, most) == ([0], [1])
