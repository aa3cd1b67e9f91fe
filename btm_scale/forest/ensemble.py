"""The ensemble's variants by name: which posterior, which prior, how many experts."""

from __future__ import annotations

import numpy as np

from btm_scale.config.run import EvaluateConfig
from btm_scale.forest.posterior.evidence import Mode, Tempering
from btm_scale.forest.posterior.mixture import mixture_log_probs
from btm_scale.forest.posterior.prior import updating_mixture_log_probs
from btm_scale.forest.scores import Stack


def ensemble_methods(
    forest: Stack, cached: np.ndarray, tempering: Tempering, settings: EvaluateConfig
) -> dict[str, np.ndarray]:
    """Log-probabilities [tokens] of every variant, from the experts' [experts, tokens].

    `ensemble` has the config's posterior and prior; every other name says what it changes.
    `cached`: log prior [experts] of dev text; `tempering`: for the tempered posterior.
    """

    starts = forest.block_starts if settings.blocks == "restart" else np.zeros(1, np.int64)

    def mixture(
        log_prior: np.ndarray | None = cached,
        mode: Mode = "prefix",
        top_k: int | None = None,
        top_k_per_token: int | None = None,
    ) -> np.ndarray:
        return mixture_log_probs(
            forest.log_probs,
            starts,
            log_prior=log_prior,
            mode=mode,
            top_k=top_k,
            top_k_per_token=top_k_per_token,
            tempering=tempering if mode == "tempered" else None,
        )

    if settings.prior == "updating":
        main = updating_mixture_log_probs(
            forest.log_probs,
            forest.block_starts,
            log_prior=cached,
            mode=settings.posterior,
            tempering=tempering if settings.posterior == "tempered" else None,
        )
    else:
        main = mixture(cached if settings.prior == "cached" else None, mode=settings.posterior)
    methods = {
        "ensemble": main,
        "ensemble:tempered": mixture(mode="tempered"),
        "ensemble:uniform-prior": mixture(None),
        "ensemble:token": mixture(mode="token"),
        "ensemble:equal": mixture(None, mode="fixed"),
    }
    for k in settings.top_k:
        if k <= len(forest.log_probs):
            methods[f"ensemble:top{k}"] = mixture(top_k=k)
    for k in settings.top_k_per_token:
        if k <= len(forest.log_probs):
            methods[f"ensemble:top{k}-per-token"] = mixture(top_k_per_token=k)
    return methods
