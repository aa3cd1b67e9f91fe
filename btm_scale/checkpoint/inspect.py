"""What a checkpoint is, from its headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from btm_scale.checkpoint.compatibility import described_in, read_json
from btm_scale.checkpoint.convert import WRITERS
from btm_scale.checkpoint.deepspeed import checkpoint_folder, training_step
from btm_scale.checkpoint.formats import format_of, open_model
from btm_scale.checkpoint.tensors import dtype_name
from btm_scale.errors import CheckpointError
from btm_scale.model.huggingface import shape_from_config

_SUFFIXES = {"safetensors": "*.safetensors", "bin": "*.bin", "torch_dist": "*.distcp", "deepspeed": "*.pt"}


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's description; `parameters` counts elements and `dtypes` gives them by dtype."""

    path: Path
    format: str
    family: str | None
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    files: dict[str, int]  # sizes in bytes by name
    step: int | None
    converts_to: tuple[str, ...]


def inspect(path: Path) -> Inspection:
    """Describe a checkpoint of any readable format; raises `CheckpointError` for others and for torn ones."""
    path = Path(path)
    kind = format_of(path)
    folder = (checkpoint_folder(path) if kind == "deepspeed" else path) or path
    files = [folder] if folder.is_file() else sorted(folder.rglob(_SUFFIXES[kind]))
    config = read_json(described_in(path) / "config.json")
    with open_model(path) as model:
        specs = model.specs().values()
    dtypes: Counter[str] = Counter()
    for spec in specs:
        dtypes[dtype_name(spec.dtype)] += spec.elements
    return Inspection(
        path=path,
        format=kind,
        family=config.get("model_type"),
        tensors=len(specs),
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes),
        files={str(file.relative_to(folder.parent)): file.stat().st_size for file in files},
        step=training_step(path) if kind == "deepspeed" else None,
        converts_to=("huggingface", *(WRITERS if _is_ours(config, path) else ())),
    )


def _is_ours(config: dict[str, object], path: Path) -> bool:
    """Whether the names of this model's tensors are known on both sides."""
    try:
        shape_from_config(config, path)
    except (CheckpointError, KeyError, ValueError):
        return False
    return True
