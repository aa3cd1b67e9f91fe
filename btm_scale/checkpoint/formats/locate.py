"""Locate the parts of a model directory: config.json, tokenizer files, the latest iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from btm_scale.checkpoint.formats.unreadable import absent
from btm_scale.errors import CheckpointError, first_few
from btm_scale.model.hf_config import read_config
from btm_scale.run_dir import SEED, RunDir
from btm_scale.util.bounded_json import read_bounded, shown
from btm_scale.util.inside import file_inside
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
STATE_MARKER = "state.json"  # of a btm-scale training checkpoint
_SEARCHED_PARENTS = 3
_LONGEST_NAME = 255  # bytes


def described_in(path: Path) -> Path:
    """Return the folder with a model's config.json: `path`, or for training checkpoints one of its nearest parents.

    A btm-scale training checkpoint uses the config of the run's exported model, or else of its seed. Without any
    config.json, `path` itself is returned.
    """
    here = iteration_folder(path.absolute())
    nearby = [here] if list(here.glob("*.safetensors")) else [here, *here.parents[:_SEARCHED_PARENTS]]
    if (here / STATE_MARKER).is_file():
        nearby += _models_of_the_run(here)
    return next((folder for folder in nearby if (folder / "config.json").is_file()), path)


def require_path(path: Path) -> None:
    """Raise `CheckpointError` if the path of a model does not exist."""
    if not path.exists():
        raise absent(path)


def require_no_run(path: Path) -> None:
    """Raise `CheckpointError`, with the paths of the experts, if `path` is a run's folder or its folder of experts."""
    run = RunDir(path.parent if path.name == "experts" else path)
    if not run.config.is_file():
        return
    experts = sorted(file.parent for file in run.experts.glob("*/config.json") if file.parent.name[0] != ".")
    remedy = (
        f"Give the folder of a model: {first_few(list(map(str, experts)), 'experts', most=8)}."
        if experts
        else "It has no experts yet: train them with btm-scale run."
    )
    what = "a run folder" if run.root == path else "the folder of a run's experts"
    raise CheckpointError(f"{path} is {what}, not a model. {remedy}")


def iteration_folder(path: Path) -> Path:
    """Return the checkpoint's folder: `path`, or the latest iteration in it that Megatron recorded."""
    latest = path / "latest_checkpointed_iteration.txt"
    if not latest.is_file():
        return path
    iteration = read_name(latest)
    return file_inside(path, f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration)


def read_name(file: Path) -> str:
    """Return the name in a marker such as `latest`. Raises `CheckpointError` if it holds anything else."""
    try:
        name = read_bounded(file, _LONGEST_NAME).decode("utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as a name: {error}. Copy it again.") from None
    if not name or not name.isprintable():
        raise CheckpointError(f"{file} must hold the name of a folder and holds {shown(name)}. Copy it again.")
    return name


def _models_of_the_run(state: Path) -> list[Path]:
    """Return the folders of the exported model of RUN/train/NAME/checkpoints, and of the run's seed."""
    train = next((folder for folder in state.parents if folder.name == "train"), None)
    if train is None:
        return []
    run, name = RunDir(train.parent), state.parent.parent.relative_to(train).as_posix()
    return [run.model(name), run.model(SEED)]


def described_config(path: Path) -> dict[str, Any]:
    """Return the config.json that describes a model, or an empty one. Raises `CheckpointError` if it is damaged."""
    folder = described_in(path)
    return read_config(folder) if (folder / "config.json").is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model directory; a missing file gives an empty one.

    Raises `CheckpointError` for invalid JSON, and for a link out of the directory.
    """
    if not path.is_file():
        return {}
    return read_object(file_inside(path.parent, path.name), CheckpointError, remedy="Copy it again.")
