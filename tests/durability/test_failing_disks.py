"""A full or broken disk ends every verb with one sentence; existing files stay, and the same command then completes.

Writes fail in the kernel, and so in the libraries of C++ and Rust too.
"""

from __future__ import annotations

import errno
import os
import random
import zlib
from pathlib import Path

import pytest
from helpers.broken_disk import FAULTS, most_events
from helpers.cuts import cut
from helpers.verb_cases import VERBS, Stages, files_of, is_log, is_temporary, repeat_of
from helpers.warm import Done, Warm

from btm_scale.checkpoint.formats.kept_hashes import NAME as HASHES

_TIMES = 3
_WRITING = [name for name in VERBS if name != "forest remove"]
_CASES = [
    (name, fault, time) for name in _WRITING for fault in FAULTS for time in range(_TIMES if VERBS[name].quick else 1)
]


def _is_quick(case: tuple[str, str, int]) -> bool:
    """One time per verb and fault, but not of every format, nor of the verbs that take seconds."""
    name, fault, time = case
    slow = ("train", "evaluate", "forest add")
    if time or not VERBS[name].quick:
        return False
    return (name not in slow or fault == "write") and name not in ("convert to huggingface", "upcycle")


@pytest.mark.parametrize("case", cut(_CASES, _is_quick, lambda case: "-".join(map(str, case))))
def test_a_failing_disk_ends_a_verb_with_one_sentence_and_no_leftovers(
    case: tuple[str, str, int], warm: Warm, stages: Stages, tmp_path: Path
) -> None:
    name, fault, _ = case
    run, words = stages.begin(VERBS[name], tmp_path)
    log = tmp_path / "events"
    warm.check(*words, wrap=("helpers.broken_disk:counted", str(run), str(log)))
    expected = files_of(run)
    count = most_events(log, fault)
    chance = random.Random(zlib.crc32("-".join(map(str, case)).encode()))
    number, error = chance.randrange(count), chance.choice((errno.ENOSPC, errno.EIO))
    stages.begin(VERBS[name], tmp_path)
    before, names_before = files_of(run), _temporary(run)
    failed = warm.run(*words, wrap=("helpers.broken_disk:failing", str(run), fault, number, error))
    assert failed.code == 1, f"event {number}: {failed.stdout}\n{failed.stderr}"
    _require_sentence(failed, run, error)
    for path, content in files_of(run).items():  # a stage that was complete is kept
        # Two grow by every result, of others only the newest are kept, and `stages` has the failure for `status`.
        grows = path in ("evaluation/ablation.json", "evaluation/mixture.json")
        varies = grows or "/checkpoints/" in path or path.startswith("stages")
        if not varies:
            assert content in (before.get(path, 0), expected.get(path, 0)), path
    assert before.keys() <= files_of(run).keys()
    assert _temporary(run) == names_before
    repeat_of(warm, words)
    assert files_of(run) == expected


def _require_sentence(failed: Done, run: Path, error: int) -> None:
    """The message is one sentence with the reason and a path; for a group, the end of its log may follow."""
    log, begin, message = failed.stderr.partition("btm-scale: ")
    assert begin, failed.stderr
    assert os.strerror(error) in message, message
    assert str(run) in message, message
    assert "Traceback" not in log + message.partition("the end of ")[0], failed.stderr


def _temporary(run: Path) -> set[str]:
    """Return the temporary names below a folder, but for caches, hashes, the run's locks and its note of a trial."""
    names = {path.relative_to(run) for path in run.rglob("*")}
    return {
        str(name)
        for name in names
        if is_temporary(name) and not is_log(name) and not {".index", ".locks", HASHES} & set(name.parts)
        if not name.name.startswith(".tokenizer-passed")
    }
