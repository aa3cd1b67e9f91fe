"""The ensemble's variants by name: which posterior, which prior, how many experts."""

from __future__ import annotations

import numpy as np

from btm_scale.config import EvaluateConfig
from btm_scale.forest.posterior import mixture_log_probs, updating_mixture_log_probs


def ensemble_methods(
    log_probs: np.ndarray, block_starts: np.ndarray, cached: np.ndarray, settings: EvaluateConfig
) -> dict[str, np.ndarray]:
    """Log-probabilities [tokens] of every variant, from the experts' [experts, tokens].

    `ensemble` has the config's posterior and prior; every other name says what it changes.
    `cached`: log prior [experts] of dev text.
    """

    def mixture(log_prior: np.ndarray | None = cached, **choices: object) -> np.ndarray:
        return mixture_log_probs(log_probs, block_starts, log_prior=log_prior, **choices)  # type: ignore[arg-type]

    if settings.prior == "updating":
        main = updating_mixture_log_probs(log_probs, block_starts, log_prior=cached)
    else:
        main = mixture(cached if settings.prior == "cached" else None, mode=settings.posterior)
    methods = {
        "ensemble": main,
        "ensemble:uniform-prior": mixture(None),
        "ensemble:token": mixture(mode="token"),
        "ensemble:equal": mixture(None, mode="fixed"),
    }
    for k in settings.top_k:
        if k <= len(log_probs):
            methods[f"ensemble:top{k}"] = mixture(top_k=k)
    return methods
