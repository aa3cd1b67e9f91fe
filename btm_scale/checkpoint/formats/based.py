"""Weights that a base model completes: an adapter, or a checkpoint that was saved without its frozen weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PosixPath

from btm_scale.checkpoint.formats.hub_cache import local_model
from btm_scale.errors import CheckpointError
from btm_scale.util.bounded_json import shown
from btm_scale.util.inside import file_inside
from btm_scale.util.records import read_object

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


class BasedPath(PosixPath):
    """A path with the path of the base model that the user gave for it.

    Readers, configs and sidecars are looked up by path, so the base travels with it, also into worker processes. Paths
    derived from it have no base.
    """

    base: Path | None = None

    def __reduce__(self) -> tuple[Callable[..., Path], tuple[object, ...]]:
        """Keep the base in a copy and in other processes."""
        return with_base, (Path(str(self)), self.base)


def with_base(path: Path, base: Path | None) -> Path:
    """Return `path` with its base model; without a base, `path` itself, which may have one."""
    if base is None:
        return path if isinstance(path, Path) else Path(path)
    based = BasedPath(path)
    based.base = Path(base)
    return based


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (path / ADAPTER_CONFIG).is_file() and any((path / name).is_file() for name in ADAPTER_FILES)


def is_completed(path: Path) -> bool:
    """Whether a base model is read together with a path: with an adapter, or with a DeepSpeed checkpoint if given."""
    if is_adapter(path):
        return True
    given = getattr(path, "base", None) is not None
    return given and (any(path.glob("latest*")) or any(path.glob("*_model_states.pt")))


def require_completed(path: Path, base: Path | None) -> None:
    """Raise `CheckpointError` if a base was given for a model that is complete without one."""
    if base is not None and not is_completed(path):
        raise CheckpointError(
            f"{path} is not an adapter or a DeepSpeed checkpoint, so it takes no base. Leave {base} out."
        )


def adapter_config(path: Path) -> dict[str, object]:
    """Return the adapter_config.json of a folder. Raises `CheckpointError` if it is damaged."""
    return read_object(file_inside(path, ADAPTER_CONFIG), CheckpointError, remedy="Copy it again.")


def lacks_base(path: Path) -> bool:
    """Whether a path is an adapter whose base was not given and is not here."""
    if getattr(path, "base", None) is not None or not is_adapter(path):
        return False
    return _folder_named(adapter_config(path).get("base_model_name_or_path")) is None


def _folder_named(name: object) -> Path | None:
    """Return the folder, or snapshot in the Hugging Face cache, that an adapter names as its base, if it is here."""
    if not isinstance(name, str) or not name or "\0" in name or len(name) > 4096:
        return None
    try:
        folder = local_model(Path(name))
    except CheckpointError:
        return None
    return folder if folder.is_dir() else None


def base_of(path: Path) -> Path | None:
    """Return the base model of a path: the one the user gave, or the one that an adapter names.

    Returns None for a path that has neither. Raises `CheckpointError` for an adapter whose base is not here.
    """
    given = getattr(path, "base", None)
    if given is None and not is_adapter(path):
        return None
    if given is None:
        name = adapter_config(path).get("base_model_name_or_path")
        given = _folder_named(name)
        if given is None:
            raise CheckpointError(
                f"{path} is an adapter of {shown(name, 200)}, which is neither a folder here nor in the Hugging Face "
                "cache. An adapter is read together with its base model: give its folder (--base DIR; `base` in "
                "Python; `adapter_base` in a recipe)."
            )
    if is_adapter(given):
        raise CheckpointError(
            f"{given} is an adapter, and the base of {path}. A base must be a complete model: merge that adapter into "
            "its base first."
        )
    return Path(given)
