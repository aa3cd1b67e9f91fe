"""Locate the parts of a model directory: config.json, tokenizer files, the latest iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from btm_scale.checkpoint.formats.based import base_of, is_adapter
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

    A btm-scale training checkpoint uses the config of the run's exported model, or else of its seed. An adapter, and
    what has no config.json, use that of their base. Without any config.json, `path` itself is returned.
    """
    base = base_of(path)
    if base is not None and is_adapter(path):
        return described_in(base)
    here = iteration_folder(path.absolute())
    nearby = [here] if list(here.glob("*.safetensors")) else [here, *here.parents[:_SEARCHED_PARENTS]]
    if (here / STATE_MARKER).is_file():
        nearby += _models_of_the_run(here)
    own = next((folder for folder in nearby if (folder / "config.json").is_file()), None)
    return own or (path if base is None else described_in(base))


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
    """Return the config.json that describes a model, or an empty one. Raises `CheckpointError` if it is damaged.

    Without one, it is made from the arguments that Megatron recorded. An adapter's may differ from its base's.
    """
    folder = described_in(path)
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    if config and is_adapter(path):
        from btm_scale.checkpoint.formats.peft import config_changes  # which reads models, and so imports this file

        config |= config_changes(path)
    if not config and folder.is_dir():
        from btm_scale.checkpoint.formats.megatron_args import recorded_config  # which reads pickles

        config = recorded_config(iteration_folder(folder))
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model directory; a missing file gives an empty one.

    Raises `CheckpointError` for invalid JSON, and for a link out of the directory.
    """
    if not path.is_file():
        return {}
    return read_object(file_inside(path.parent, path.name), CheckpointError, remedy="Copy it again.")
