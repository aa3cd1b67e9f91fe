"""The models behind a run's averages: which exist, their names, and the text that each is scored on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.config.run import RunConfig
from btm_scale.forest.forest import experts
from btm_scale.forest.methods import AVERAGES
from btm_scale.run_dir import AVERAGE, RunDir


def average_model(average: str, domain: str, names: Sequence[str], log_prior: np.ndarray) -> str:
    """Return the model behind an average of a domain: the most likely expert, or a merged model.

    `log_prior` [experts] is the domain's prior over the experts `names`, in nats.
    """
    return names[int(np.argmax(log_prior))] if AVERAGES[average].is_expert else made_model(average, domain)


def made_model(average: str, domain: str) -> str:
    """Return the name of the model that is merged for an average of a domain."""
    return f"{AVERAGE}{average}/{domain}" if AVERAGES[average].per_domain else f"{AVERAGE}{average}"


def averages_of(config: RunConfig, run: RunDir) -> tuple[str, ...]:
    """Return the averages of the forest: none if its experts have different shapes."""
    return config.evaluate.averages if len({_shapes(run, name) for name in experts(run)}) <= 1 else ()


def made_averages_of(config: RunConfig, run: RunDir) -> list[str]:
    """Return the averages of the forest for which a model is merged."""
    return [average for average in averages_of(config, run) if not AVERAGES[average].is_expert]


def average_texts(config: RunConfig) -> dict[str, list[tuple[str, str]]]:
    """Return every model that is merged for an average, with the (domain, split) pairs that it is scored on."""
    texts: dict[str, list[tuple[str, str]]] = {}
    for domain in config.all_domains:
        for average in config.evaluate.averages:
            if not AVERAGES[average].is_expert:
                texts.setdefault(made_model(average, domain), []).append((domain, config.evaluate.split))
    return texts


def _shapes(run: RunDir, name: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    with SafetensorsModel(run.model(name)) as model:
        return frozenset((tensor, spec.shape) for tensor, spec in model.specs().items())
