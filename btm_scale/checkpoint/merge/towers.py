"""Models of several modalities: their language model is merged, and the rest is copied from the first input."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from btm_scale.checkpoint.formats.locate import described_config

_PARTS = ("vision_config", "visual_config", "audio_config", "speech_config")
_REST = re.compile(
    r"(?:model\.)?\w*(?:vision|visual|image|video|audio|speech|multi_modal|projector|connector|resampler|aligner|"
    r"perceiver)\w*(?:\..*)?"
)


def other_towers(path: Path, names: Iterable[str]) -> frozenset[str]:
    """Return the names of the tensors outside the language model; none for a model of text alone."""
    config = described_config(path)
    if not any(isinstance(config.get(part), dict) for part in _PARTS):
        return frozenset()
    return frozenset(name for name in names if _REST.fullmatch(name) and "language_model." not in name)
