"""What a router is fitted to: means over the inputs of every MLP of an expert, on its own domains' dev text.

An expert's sums do not depend on any other expert. They are kept, so leaving an expert out of a mixture or adding it
again reads no text, and gives the bits that a forest without it would give. Kept sums are read without torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.config.run import RunConfig
from btm_scale.data.eval_text import EvaluationText
from btm_scale.forest.expert import read_expert
from btm_scale.forest.routers import texts_of_expert
from btm_scale.forest.scores import with_sorted_header
from btm_scale.run_dir import RunDir
from btm_scale.util.files import make_directory, write_file

logger = logging.getLogger(__name__)

_PIECE = 1 << 17  # elements; they stay in a core's cache


class RouterSums:
    """The sums of one expert on disk, read layer by layer. `of` is of what: the expert's weights, and the text."""

    def __init__(self, path: Path, of: Mapping[str, str]) -> None:
        self.path, self.of = path, of

    def mean(self, layer: int) -> np.ndarray:
        """Return the mean input of a layer's MLP: float64 [hidden]."""
        return self._read(f"layers.{layer}.mean")

    def add_second(self, layer: int, total: np.ndarray) -> None:
        """Add the second moment of the inputs of a layer's MLP to `total`, contiguous float64 [hidden, hidden]."""
        flat, piece = total.reshape(-1), np.empty(min(_PIECE, total.size), "<f8")
        with SafetensorsModel(self.path) as file:
            for start in range(0, flat.size, _PIECE):
                part = flat[start : start + _PIECE]
                file.read_bytes_into(f"layers.{layer}.second", start, piece[: part.size].data.cast("B"))
                part += piece[: part.size]

    @property
    def embedding(self) -> np.ndarray:
        """The mean embedding of the tokens: float64 [hidden]."""
        return self._read("embedding")

    def _read(self, name: str) -> np.ndarray:
        with SafetensorsModel(self.path) as file:
            array = np.empty(file.spec(name).shape, "<f8")
            file.read_bytes_into(name, 0, array.data.cast("B"))
            return array


def router_sums(config: RunConfig, run: RunDir, name: str, *, device: str = "cpu") -> RouterSums:
    """Return the sums of an expert, which are computed first if there are none of its weights and text.

    Raises ForestError for an expert without a domain, or whose hidden states are not numbers.
    """
    texts = texts_of_expert(config, run, name)
    of = {
        "model": read_expert(run.model(name)).content_hash,
        "texts": json.dumps({text.domain: text.fingerprint for text in texts}),
    }
    path = run.router(name)
    if _metadata(path) != of:
        logger.info("reading the hidden states of %s on its domains' dev text", name)
        arrays = _compute(run, name, texts, device)
        make_directory(path.parent)
        write_file(path, with_sorted_header(save(arrays, of)))
    return RouterSums(path, of)


def _compute(run: RunDir, name: str, texts: Sequence[EvaluationText], device: str) -> dict[str, np.ndarray]:
    """Return new sums. What reads the text is imported here: it takes longer to import than to read kept sums."""
    from btm_scale.forest.observed_inputs import observed_means

    return {key: mean.numpy() for key, mean in observed_means(run.model(name), name, texts, device).items()}


def _metadata(path: Path) -> dict[str, str] | None:
    """Return what the sums in a file are of, or None if they are missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return None
