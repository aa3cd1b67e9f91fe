"""Scores of prompts by local weights, for experts whose engine returns no prompt log-probabilities."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from btm_scale.generate.model_cache import Shelf
from btm_scale.generate.sampling import refuse_nan
from btm_scale.model.hf_decoder import usable_device


class LocalScores:
    """Models that score prompts and generate nothing."""

    def __init__(self, models: Mapping[str, Path], *, vocabulary: int, max_bytes: float | None = None) -> None:
        """Check that the models can be read; they are loaded when they first score.

        Raises UserError if a model does not fit into `max_bytes`, CheckpointError or ForestError if it cannot be read.
        """
        self.names = frozenset(models)
        self._lock = threading.Lock()
        if models:
            device = usable_device(None)
            self._shelf = Shelf(models, vocabulary=vocabulary, max_bytes=max_bytes, device=device)

    def score(self, name: str, prompt: Sequence[int]) -> np.ndarray:
        """Return the log-probability in nats of each token of a prompt but the first, float64 [tokens - 1].

        May be called from any thread. Raises FloatingPointError if one is NaN.
        """
        with self._lock:
            log_probs: np.ndarray = self._shelf.take(name).score([prompt])[0].double().cpu().numpy()
        refuse_nan(log_probs)
        return log_probs
