"""Where a model is in a directory: its config.json, its tokenizer's files, the newest iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from btm_scale.errors import CheckpointError
from btm_scale.run_dir import SEED, RunDir
from btm_scale.util.records import read_object

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "spiece.model",
)
STATE_MARKER = "state.json"  # of a training state
_SEARCHED_PARENTS = 3


def described_in(path: Path) -> Path:
    """The folder that holds a model's config.json: its own, or for training checkpoints one not far above.

    A training state of ours is described by what its run has made of it, or else by the run's seed.
    """
    here = iteration_folder(path.absolute())
    nearby = [here] if list(here.glob("*.safetensors")) else [here, *here.parents[:_SEARCHED_PARENTS]]
    if (here / STATE_MARKER).is_file():
        nearby += _models_of_the_run(here)
    return next((folder for folder in nearby if (folder / "config.json").is_file()), path)


def iteration_folder(path: Path) -> Path:
    """The checkpoint itself: `path`, or the one in it that Megatron noted as its latest."""
    latest = path / "latest_checkpointed_iteration.txt"
    if not latest.is_file():
        return path
    named = latest.read_text().strip()
    return path / (f"iter_{int(named):07d}" if named.isdecimal() else named)


def _models_of_the_run(state: Path) -> list[Path]:
    """The finished model of a state in RUN/train/NAME/checkpoints, and the run's seed."""
    train = next((folder for folder in state.parents if folder.name == "train"), None)
    if train is None:
        return []
    run, name = RunDir(train.parent), state.parent.parent.relative_to(train).as_posix()
    return [run.model(name), run.model(SEED)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or an empty one if there is no such file; raises `CheckpointError`."""
    return read_object(path, CheckpointError, remedy="Copy it again.") if path.is_file() else {}
