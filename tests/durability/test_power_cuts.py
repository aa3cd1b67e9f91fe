"""After a power cut at any moment of any verb, what has its final name is complete, and the same command does the rest.

The states of the disk are recorded at every sync and at every change of a name, in the real command.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.cuts import cut, full
from helpers.power_cuts import Image, Moment, moments
from helpers.verb_cases import CONFIG, VERBS, Stages, files_of, is_log, is_temporary, repeat_of
from helpers.warm import Warm

_QUICK = ("prepare", "train", "evaluate", "forest add", "forest remove", "merge", "convert to deepspeed", "report")


@dataclass(frozen=True)
class Recording:
    """A command's folder before and after, and the states in between."""

    before: Image
    moments: list[Moment]
    after: Image


def record(name: str, warm: Warm, stages: Stages, place: Path) -> Recording:
    run, words = stages.begin(VERBS[name], place)
    before = files_of(run)
    warm.check(*words, wrap=("helpers.recorded_disk:recorded", str(run), str(place / "recording")))
    return Recording(before, moments(place / "recording"), files_of(run))


@pytest.mark.parametrize("name", cut(VERBS, lambda name: name in _QUICK))
def test_what_has_its_final_name_is_complete_after_a_power_cut_at_any_moment(
    name: str, warm: Warm, stages: Stages, tmp_path: Path
) -> None:
    recording = record(name, warm, stages, tmp_path)
    contents = _Contents(recording, tmp_path / "run")
    chance = random.Random(name)
    problems = [
        f"{kind} before moment {number}, {moment.event} of {moment.path}: {problem}"
        for number, moment in enumerate(recording.moments)
        for kind, image in _images(moment, chance)
        for problem in contents.problems(image)
    ]
    assert not problems, f"{len(problems)} problems:\n" + "\n".join(problems[:20])
    # The command has said that it is done.
    durable = _named(recording.moments[-1].least())
    assert {path: durable.get(path, 0) for path in recording.after} == recording.after
    removed = recording.before.keys() - recording.after.keys()
    assert not [path for path in durable.keys() & removed if path.endswith("expert.json")]


@pytest.mark.parametrize(
    ("name", "cuts"),
    [case for name, verb in VERBS.items() for case in ([(name, 2), full(name, 12)] if verb.quick else [full(name, 3)])],
)
def test_the_same_command_completes_what_a_power_cut_left(
    name: str, cuts: int, warm: Warm, stages: Stages, tmp_path: Path
) -> None:
    recording = record(name, warm, stages, tmp_path)
    run, words = tmp_path / "run", list(VERBS[name].words(stages.inputs, tmp_path / "run"))
    seen = {path for moment in recording.moments for path in moment.live()}
    chance = random.Random(f"{name} {cuts}")
    for number in range(cuts):
        moment = chance.choice(recording.moments)
        image = [moment.least, moment.names_only, lambda at=moment: at.mixed(chance)][number % 3]()  # type: ignore[misc]
        shutil.rmtree(run)
        _materialize(image, run)
        repeat_of(warm, words)
        files = files_of(run)
        assert {path: files.get(path, 0) for path in recording.after} == recording.after
        # Names that were removed may return, as long as nothing mistakes them for results.
        assert files.keys() - recording.after.keys() <= seen


def test_the_journal_of_a_merge_names_only_what_is_on_the_disk(warm: Warm, stages: Stages, tmp_path: Path) -> None:
    """Headers before the journal begins, and the bytes of a unit before it is noted."""
    headers = units = 0
    for moment in record("merge", warm, stages, tmp_path).moments:
        live, synced = moment.live(), moment.synced()
        for path, content in live.items():
            if not path.endswith(".safetensors.partial") or f"{Path(path).parent}/plan.fingerprint" not in live:
                continue
            assert content is not None
            on_disk = synced[path] or b""
            begin = 8 + int.from_bytes(content[:8], "little")
            assert on_disk[:begin] == content[:begin], f"{path} before {moment.event} of {moment.path}"
            headers += 1
            for name, start, stop in _noted(live, str(Path(path).parent)):
                tensor = json.loads(content[8:begin]).get(name)
                if tensor is None:  # of another shard
                    continue
                first, last = (begin + place for place in tensor["data_offsets"])
                size = (last - first) // math.prod(tensor["shape"])
                part = slice(first + start * size, first + stop * size)
                assert on_disk[part] == content[part], f"{name} before {moment.event} of {moment.path}"
                units += 1
    assert headers
    assert units


def _noted(image: Image, folder: str) -> Iterator[tuple[str, int, int]]:
    for path, content in image.items():
        if path.startswith(f"{folder}/done-"):
            for line in (content or b"").splitlines():
                if line:
                    name, start, stop, *_ = json.loads(line)
                    yield name, start, stop


@pytest.mark.parametrize("words", [("status", "RUN"), ("plan", "CONFIG", "--nodes", "1"), ("forest", "list", "RUN")])
def test_verbs_that_only_look_write_nothing(words: tuple[str, ...], warm: Warm, stages: Stages, tmp_path: Path) -> None:
    run, _ = stages.begin(VERBS["report"], tmp_path)
    places = {"RUN": run, "CONFIG": stages.inputs / CONFIG}
    recorder = ("helpers.recorded_disk:recorded", str(run), str(tmp_path / "recording"))
    warm.check(*(places.get(word, word) for word in words), wrap=recorder)
    assert [moment.event for moment in moments(tmp_path / "recording")] == ["begin", "end"]


def _images(moment: Moment, chance: random.Random) -> Iterator[tuple[str, Image]]:
    yield "what was synced", moment.least()
    yield "all names", moment.names_only()
    for _ in range(3):
        yield "a random part", moment.mixed(chance)


class _Contents:
    """The contents that a name may have: those from before the command, and those that were renamed to it."""

    def __init__(self, recording: Recording, run: Path) -> None:
        self._after = recording.after
        self._contents: dict[str, list[bytes | None]] = {path: [file] for path, file in recording.before.items()}
        self._folders: dict[str, list[frozenset[str]]] = {}  # what was in a folder when it got its name
        for folder in {str(Path(path).parent) for path in recording.before if path.endswith("expert.json")}:
            self._folders[folder] = [frozenset(path for path in recording.before if path.startswith(f"{folder}/"))]
        for moment in recording.moments:
            if moment.event == "os.rename":
                self._add(moment.live(), *(str(Path(path).relative_to(run)) for path in moment.path.split("\n")))

    def _add(self, image: Mapping[str, bytes | None], source: str, target: str) -> None:
        if is_temporary(Path(target)):
            return
        moved = {
            target + path[len(source) :]: file
            for path, file in image.items()
            if path == source or (path.startswith(f"{source}/") and not is_temporary(Path(path[len(source) + 1 :])))
        }
        for path, file in moved.items():
            self._contents.setdefault(path, []).append(file)
        if moved[target] is None:
            self._folders.setdefault(target, []).append(frozenset(moved))

    def problems(self, image: Image) -> Iterator[str]:
        """Yield what is wrong after a power cut."""
        named = _named(image)
        for path, file in named.items():
            if file is not None and file not in self._contents.get(path, ()):
                yield f"{path} is torn"
        for folder, versions in self._folders.items():
            # A folder that is being removed lost its marker first; a checkpoint's marker has the digest of the rest.
            there = f"{folder}/expert.json" in named if folder not in self._after else folder in named
            if there and not any(version <= named.keys() for version in versions):
                yield f"{folder} lacks {sorted(versions[-1] - named.keys())}"


def _named(image: Image) -> Image:
    names = {path: Path(path) for path in image}
    return {path: image[path] for path, name in names.items() if not is_temporary(name) and not is_log(name)}


def _materialize(image: Image, place: Path) -> None:
    place.mkdir()
    for path, content in image.items():
        if content is None:
            (place / path).mkdir(parents=True, exist_ok=True)
        else:
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(content)
