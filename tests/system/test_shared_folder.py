"""Two users share a folder: links planted by one cannot make the other empty, read or publish other files."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.handmade_run import DOMAINS, score_dev
from helpers.two_users import WHY_NOT, User, give, two_users

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.cli.app import main
from btm_scale.config.run import RunConfig
from btm_scale.forest.membership import add_expert
from btm_scale.run_dir import SEED, RunDir

PRECIOUS = "precious-2b9d\n"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "both users can be created"),
]
MODELS = ("docs", "cpp")


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest closes its own to others when another session starts."""
    with tempfile.TemporaryDirectory(prefix="btm-users-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def users() -> Iterator[tuple[User, User]]:
    with open_folder() as folder, two_users(folder) as pair:
        yield pair


@pytest.fixture(scope="module")
def evaluable(handmade: tuple[RunConfig, RunDir], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that is evaluated without starting a group: what is compared has been scored."""
    config, original = handmade
    run = RunDir(tmp_path_factory.mktemp("evaluable") / "run")
    shutil.copytree(original.root, run.root)
    evaluate = config.evaluate.model_copy(update={"split": "dev", "averages": ()})
    baselines = config.baselines.model_copy(update={"dense": False})
    config = config.model_copy(update={"evaluate": evaluate, "baselines": baselines})
    config.save(run.config)
    for name in (SEED, *DOMAINS):  # the dev text of `split: dev` is longer
        score_dev(config, run, name)
    main(["evaluate", str(run.root)])
    return run


class Shared:
    """A run that the first user shares, and the first user's own file."""

    def __init__(self, first: User, second: User, original: RunDir, folder: Path) -> None:
        self.first, self.second = first, second
        self.folder = folder / "shared"
        self.run = RunDir(self.folder / "run")
        shutil.copytree(original.root, self.run.root)
        give(self.folder, first)
        self.work = first.home / "work"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        self.notes = self.work / "notes.txt"
        self.notes.write_text(PRECIOUS)
        self.notes.chmod(0o600)
        for path in (self.work, self.notes):
            os.chown(path, first.uid, first.gid)

    def commands(self) -> dict[str, list[str]]:
        root, models = str(self.run.root), [str(self.run.model(name)) for name in MODELS]
        return {
            "evaluate": ["evaluate", root],
            "report": ["report", root],
            "prepare": ["prepare", str(self.run.config), "--out", root],
            "ablate": ["ablate", root, "--expert", "docs", "--expert", "cpp", "--text", __file__, "--device", "cpu"],
            "forest add": ["forest", "add", root, models[0], "--name", "newcomer"],
            "forest remove": ["forest", "remove", root, "docs"],
            "upcycle": ["upcycle", root, "--device", "cpu"],
            "merge": ["merge", str(self.folder / "out"), *models],
            "convert": ["convert", models[0], str(self.folder / "out"), "--to", "megatron"],
        }

    def plant(self, path: Path, target: Path) -> None:
        """Put a link in place of a file or folder, with the rights of the second user."""

        def put() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink() or path.exists():
                path.rename(path.with_name(f".{path.name}.aside"))
            path.symlink_to(target)

        assert self.second.does(put) == 0

    def verb(self, verb: str) -> tuple[int, str]:
        """Call a verb as the first user; returns its exit code and what it printed."""
        output = self.folder.parent / "output"
        code = self.first.does(lambda: main(self.commands()[verb]), output)
        return code, output.read_text()

    def require_unharmed(self) -> None:
        assert self.notes.read_text() == PRECIOUS
        assert self.notes.stat().st_mode & 0o777 == 0o600
        assert sorted(path.name for path in self.work.rglob("*")) == ["notes.txt"]
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert PRECIOUS.strip().encode() not in path.read_bytes(), path


@pytest.fixture
def shared(users: tuple[User, User], evaluable: RunDir) -> Iterator[Shared]:
    with open_folder() as folder:
        yield Shared(*users, evaluable, folder)


def names_written(shared: Shared, verb: str) -> set[Path]:
    """The paths in the shared folder that a verb opens, makes or replaces by a name that can be known before."""
    written: set[Path] = set()
    listening = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not listening:
            return
        paths: tuple[Any, ...] = ()
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            paths = (arguments[0],)
        elif event in ("os.mkdir", "os.rename", "shutil.copyfile", "os.truncate", "os.remove", "shutil.rmtree"):
            paths = arguments[:2]
        written.update(Path(os.fsdecode(path)) for path in paths if isinstance(path, str | bytes | os.PathLike))

    sys.addaudithook(hook)
    try:
        main(shared.commands()[verb])
    finally:
        listening = False
    own = {path for path in written if shared.folder in path.parents and path != shared.run.root}
    return {path for path in own if not re.search("[0-9a-f]{8}", path.name)}


SHORT = ["evaluate", "report", "merge"]
LONG = ["prepare", "ablate", "forest add", "forest remove", "convert", "upcycle"]
VERBS = [*SHORT, *(pytest.param(verb, marks=pytest.mark.full) for verb in LONG)]


@pytest.mark.parametrize("verb", VERBS)
def test_a_link_at_any_name_that_a_verb_writes_is_not_followed(
    verb: str, users: tuple[User, User], evaluable: RunDir, shared: Shared, tmp_path: Path
) -> None:
    """Every name is recorded first, in a copy; then a link of the second user is put at each."""
    copy = Shared(*users, evaluable, tmp_path)
    for one in (copy, shared):  # else there is nothing to write
        remove_outcome(one, verb)
    names = {path.relative_to(copy.folder) for path in names_written(copy, verb)}
    assert names, "the recorder saw nothing"
    for name in sorted(names):
        path = shared.folder / name
        if not path.parent.is_dir():  # in a folder that only exists in the meantime
            continue
        shared.plant(path, shared.notes)
        code, shown = shared.verb(verb)
        shared.require_unharmed()
        assert code in (0, 1, 2), shown
        assert "Traceback" not in shown, f"{name}: {shown}"
        shared.second.does(lambda path=path: path.unlink(missing_ok=True))
        restore(path)
        reset(shared, verb)


def remove_outcome(shared: Shared, verb: str) -> None:
    if verb in ("evaluate", "ablate"):
        shutil.rmtree(shared.run.results.parent, ignore_errors=True)
    shared.run.report.unlink(missing_ok=True)


def restore(path: Path) -> None:
    aside = path.with_name(f".{path.name}.aside")
    if aside.exists() and not path.exists():
        aside.rename(path)


def reset(shared: Shared, verb: str) -> None:
    """Let the verb have something to do again."""
    shutil.rmtree(shared.folder / "out", ignore_errors=True)
    for model in ("newcomer", "moe"):
        shutil.rmtree(shared.run.model(model), ignore_errors=True)
    remove_outcome(shared, verb)


FOLDERS = [
    "evaluation",
    "experts/docs",
    "scores",
    "scores/docs",
    "data",
    "data/docs",
    "tokenizer",
    "train",
    "train/docs",
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_link_in_place_of_a_folder_is_not_followed(folder: str, shared: Shared) -> None:
    shared.plant(shared.run.root / folder, shared.work)
    for verb in ("evaluate", "report", "prepare", "ablate", "forest add", "forest remove"):
        code, shown = shared.verb(verb)
        assert code == 2, shown
        assert "another user made" in shown, shown
        shared.require_unharmed()


@pytest.mark.parametrize("verb", ["merge", "convert"])
def test_a_link_in_place_of_a_sidecar_is_not_published(verb: str, shared: Shared) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        shared.plant(shared.run.model("docs") / name, shared.notes)
        code, shown = shared.verb(verb)
        shared.require_unharmed()
        assert code == 2, f"{name}: {shown}"
        assert not (shared.folder / "out").exists()


def append_to_log(run: RunDir) -> None:
    from btm_scale.util.files import open_to_append

    with open_to_append(run.log("docs")) as file:
        file.write(b"more")


def lock_for_training(run: RunDir) -> None:
    from btm_scale.util.locks import ModelLock

    with ModelLock(run.train("docs")):
        pass


@pytest.mark.parametrize(("name", "do"), [("log", append_to_log), ("lock", lock_for_training)])
def test_a_link_in_place_of_a_log_or_a_lock_is_refused(name: str, do: Callable[[RunDir], None], shared: Shared) -> None:
    shared.plant(shared.run.train("docs") / name, shared.notes)
    output = shared.folder.parent / "output"
    assert shared.first.does(lambda: do(shared.run), output) == 99
    assert "is a link or not a file" in output.read_text()
    shared.require_unharmed()


def test_what_is_written_is_readable_by_no_more_users_than_its_source(shared: Shared) -> None:
    for model in MODELS:
        for path in shared.run.model(model).iterdir():
            path.chmod(0o600)
    config = RunConfig.load(shared.run.config)
    writers = {
        "out": lambda: merge(shared.folder / "out", [(shared.run.model(name), 1.0) for name in MODELS]),
        "converted": lambda: convert(shared.run.model("docs"), shared.folder / "converted", to="megatron"),
        "run/experts/newcomer": lambda: add_expert(config, shared.run, shared.run.model("docs"), "newcomer"),
    }
    for out, write in writers.items():
        assert shared.first.does(write) == 0
        for path in (shared.folder / out).rglob("*"):
            if path.is_file() and path.name not in ("README.md", "expert.json"):
                assert path.stat().st_mode & 0o077 == 0, path
