"""Models by their name on the Hugging Face Hub: snapshots in the local cache, never the network."""

from __future__ import annotations

import os
import re
from pathlib import Path

from btm_scale.errors import CheckpointError

_NAME = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*")


def cache_folder() -> Path:
    """Return the folder of the cache: `HF_HUB_CACHE`, `HF_HOME/hub`, or the default in the user's home."""
    if hub := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(hub).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser() / "hub"


def local_model(path: Path) -> Path:
    """Return `path` if it exists, or the snapshot in the cache of the model with this name (`org/name@revision`).

    Raises `CheckpointError` for a name of the form `org/name` that is neither. Any other path is returned as it is.
    """
    name, _, revision = str(path).partition("@")
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long
        raise CheckpointError(f"{str(path)[:100]} is not a path: {error.strerror}. Give a model directory.") from None
    if exists or not _NAME.fullmatch(name) or not re.fullmatch(r"[\w.-]*", revision) or ".." in str(path):
        return path
    repository = cache_folder() / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit
    if commit and ".." not in commit and "/" not in commit and snapshot.is_dir():
        return snapshot
    if "/" not in name:
        return path
    at = f" --revision {revision}" if revision else ""
    raise CheckpointError(
        f"{path} does not exist, and is not in the Hugging Face cache {cache_folder()}. Models are read from disk "
        f"only. Give the path of an existing model directory, or download it first: hf download {name}{at}"
    )
