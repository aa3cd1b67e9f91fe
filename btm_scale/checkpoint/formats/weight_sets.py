"""Which of several sets of weights in a Hugging Face folder is read: the one that transformers would load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
# In the order in which transformers looks for them.
_SETS = (
    "model.safetensors",
    "model.safetensors.index.json",
    BIN,
    BIN_INDEX,
)
_OTHERS = (
    "model.*.safetensors",
    "consolidated*.safetensors",
    "pytorch_model.*.bin",
    "consolidated*.pth",
    "*.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
)


@dataclass(frozen=True)
class WeightSets:
    """The file from which the weights of a folder are read, or that lists their shards, and the files of other sets."""

    read: str
    not_read: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.read}, and not {', '.join(self.not_read)}" if self.not_read else self.read


def weight_sets(path: Path) -> WeightSets | None:
    """Return the set that is read from a Hugging Face folder; None for any other path."""
    present = [name for name in _SETS if (path / name).is_file()] if path.is_dir() else []
    if not present:
        return None
    others = [file.name for pattern in _OTHERS for file in sorted(path.glob(pattern))]
    return WeightSets(present[0], tuple(dict.fromkeys([*present[1:], *(name for name in others if name not in _SETS)])))
