"""A command that is killed at any moment and given again has the same result as one that was not disturbed."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest
from helpers.cuts import full
from helpers.verb_cases import VERBS, Stages, files_of, repeat_of
from helpers.warm import Warm

CASES = [
    case
    for name, verb in VERBS.items()
    for case in ([(name, 2), full(name, 20)] if verb.quick else [full(name, 4)])
    if name != "forest remove"  # a second removal is an error
]


@pytest.mark.parametrize(("name", "kills"), CASES)
def test_a_killed_command_that_is_given_again_has_the_same_result(
    name: str, kills: int, warm: Warm, stages: Stages, tmp_path: Path
) -> None:
    run, words = stages.begin(VERBS[name], tmp_path)
    events = tmp_path / "events"
    undisturbed = warm.check(*words, wrap=("helpers.broken_disk:counted", str(run), str(events)))
    expected = files_of(run)
    count = len(events.read_text().splitlines())
    chance = random.Random(zlib.crc32(f"{name} {kills}".encode()))
    for number in range(kills):
        stages.begin(VERBS[name], tmp_path)
        if number % 2:  # while it computes, or between two writes
            killed = warm.run(*words, kill_after=chance.random() * undisturbed.seconds)
        else:  # the moments at which files change are few, and matter most
            killed = warm.run(*words, wrap=("helpers.broken_disk:killed_at", str(run), chance.randrange(count)))
        assert killed.code in (-9, 0, 1), killed.stderr
        repeat_of(warm, words)
        assert files_of(run) == expected, f"kill {number}"
