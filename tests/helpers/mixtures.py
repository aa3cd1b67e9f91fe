"""Losses of mixtures by a known law, in place of those of averages that are merged and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from btm_scale.evaluate import mixture_runs
from btm_scale.evaluate.mixture_choice import MixtureGoal, choose
from btm_scale.evaluate.mixture_record import ChosenMixture, MeasuredMixture
from btm_scale.evaluate.mixture_runs import drawn

Losses = Callable[[Mapping[str, float], str], float]  # of a mixture on a text, nats per token


def known_loss(weights: Mapping[str, float], text: str) -> float:
    """Return a quadratic loss: 2 nats, less the text's own expert, more the squares of all weights."""
    return 2.0 - 0.8 * weights.get(text, 0.0) + 0.5 * sum(weight**2 for weight in weights.values())


class MeasuredHere:
    """Takes the place of `average_losses`; `calls` are the mixtures and texts that were measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loss: Losses = known_loss) -> None:
        self.calls: list[tuple[dict[str, float], list[str]]] = []
        self.fails_at: int | None = None
        self._loss = loss
        monkeypatch.setattr(mixture_runs, "average_losses", self._measure)

    def _measure(
        self, run: object, weights: Mapping[str, float], texts: Mapping[str, object], *_: object
    ) -> dict[str, float]:
        if self.fails_at == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append((dict(weights), list(texts)))
        return {name: self._loss(weights, name) for name in texts}


class FakeText:
    """A text that is known by its fingerprint alone."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint


def measured_mixtures(
    names: list[str], texts: list[str], runs: int, loss: Losses = known_loss, random_seed: int = 0
) -> list[MeasuredMixture]:
    """Return the mixtures that a run would measure, with losses by a known law."""
    return [
        MeasuredMixture(key=str(i), weights=weights, losses={text: loss(weights, text) for text in texts})
        for i, weights in enumerate(drawn(names, runs, random_seed))
    ]


def chosen_mixture(
    names: list[str] | None = None, keep: Mapping[str, float] | None = None, runs: int = 24, loss: Losses = known_loss
) -> ChosenMixture:
    """Return the mixture that is chosen for the mean over all domains with an expert."""
    names = names or ["math", "code", "seed"]
    domains = [name for name in names if name != "seed"]
    texts = {text: FakeText(text) for text in dict.fromkeys([*domains, *(keep or {})])}
    measured = measured_mixtures(names, list(texts), runs, loss)
    return choose(measured, texts, names, MixtureGoal(dict.fromkeys(domains, 1.0), keep or {}))  # type: ignore[arg-type]


def matrix(measured: list[MeasuredMixture], names: list[str]) -> np.ndarray:
    """Return the weights of measured mixtures [n, models]."""
    return np.array([[one.weights.get(name, 0.0) for name in names] for one in measured])
