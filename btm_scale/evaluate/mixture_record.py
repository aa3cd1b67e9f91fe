"""mixture.json: every measured mixture of experts, the last chosen one, and the critical share of other text."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from btm_scale.errors import ForestError
from btm_scale.evaluate.results import MAX_LOSS
from btm_scale.util.records import Finite, Part, Record, is_empty

Loss = Annotated[float, Field(ge=0, le=MAX_LOSS)]  # nats per token
# With room for rounding.
Perplexity = Annotated[float, Field(ge=0.999, le=1.001 * math.exp(MAX_LOSS))]
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # of perplexities
Weight = Annotated[float, Field(ge=0, le=1.001)]


def perplexities(losses: np.ndarray) -> np.ndarray:
    """Return the perplexities of losses in nats; a law may predict losses that no model has."""
    return np.minimum(np.exp(np.clip(losses, 0.0, MAX_LOSS)), math.exp(MAX_LOSS))


class MeasuredMixture(Part):
    """The losses of one weighted average of models."""

    key: str  # digest of the models' contents and their weights
    weights: dict[str, Weight]  # of the models with a positive weight; they sum to 1
    losses: dict[str, Loss]  # by the fingerprint of the text


class Predicted(Part):
    """The predicted perplexity of the chosen mixture on a text."""

    predicted: Perplexity  # of the average
    interval: tuple[Perplexity, Perplexity]  # 95%, of the average
    seed: Perplexity | None = None  # measured, of the seed LM
    uniform: Perplexity  # measured, of the uniform average
    # Predicted, of models trained on the chosen mixture and on the uniform one; absent without a seed LM.
    trained: Perplexity | None = None
    trained_uniform: Perplexity | None = None


class LawFit(Part):
    """How well a law predicts mixtures that were left out of its fit."""

    error: Finite  # nats per token: root mean square over the measured mixtures of several models, each left out once
    r2: Finite


class TextFit(LawFit):
    """The law that was chosen for a text, and the errors of every law that was fitted."""

    law: str
    laws: dict[str, LawFit]


class MixturePerplexity(Part):
    """A measured mixture, with what the chosen laws predict for it when it is left out."""

    weights: dict[str, Weight]
    mean: Perplexity  # over the targets, by their weights
    perplexity: dict[str, Perplexity]  # by text
    predicted: dict[str, Perplexity]  # by text


class ChosenMixture(Part):
    """The result of `btm-scale mixture`."""

    random_seed: int
    targets: dict[str, Weight]  # weight of each text's perplexity in the mean; they sum to 1
    keep: dict[str, Finite]  # by domain: the largest allowed ratio of its perplexity to the seed LM's
    weights: dict[str, Weight]  # of the experts and the seed LM; they sum to 1
    domains: dict[str, dict[str, Weight]]  # by domain: its `weight` in the text of the mixture
    outside: dict[str, Weight]  # weights of models that were trained on text of no domain of this run
    mean: Predicted  # the mean perplexity over the targets
    perplexity: dict[str, Predicted]  # by text
    fit: dict[str, TextFit]  # by text
    measured: tuple[MixturePerplexity, ...]  # the lowest mean first
    nearest: Weight  # total variation distance from the chosen mixture to the nearest measured one
    extrapolated: tuple[str, ...]  # texts whose law is less certain there than at any measured mixture
    # Models that were trained on the text of a single domain; empty where trained models are predicted.
    unreplayed: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _same_texts(self) -> ChosenMixture:
        texts = self.perplexity.keys()
        if any(other.keys() != texts for one in self.measured for other in (one.perplexity, one.predicted)) or (
            self.fit.keys() != texts
        ):
            raise ValueError("must have the same texts in perplexity, fit and measured")
        if any(one.keys() != {"weight"} for one in self.domains.values()):
            raise ValueError("must have one weight per domain")
        return self


class ReplayedRun(Part):
    """A run's expert, with what the laws predict for it when it is left out, or at the first and last share with it."""

    run: str
    share: Weight  # of other domains' text in the expert's
    replay: Weight  # branch.replay, which gives this share with the parents of this run
    tokens: Annotated[int, Field(ge=0)]  # that the expert was trained on
    perplexity: dict[str, Ratio]  # by text: over the seed LM's
    predicted: dict[str, Ratio]  # the same, predicted


class CriticalReplay(Part):
    """The result of `btm-scale mixture --replay`."""

    target: str  # the expert, and its domain
    keep: dict[str, Finite]  # by domain: the largest allowed ratio of its perplexity to the seed LM's
    tokens: Annotated[int, Field(ge=0)]  # that the expert is trained on
    share: Weight  # of other domains' text: the smallest that is predicted to meet `keep`
    replay: Weight  # branch.replay, which gives this share with the parents in the run that is named first
    ratio: Weight  # the critical mixture ratio: the rest, which is the expert's own text
    range: tuple[Weight, Weight]  # of the smallest share, by the fits that leave out one run each
    perplexity: dict[str, Ratio]  # by text: predicted at `share`, over the seed LM's
    fit: dict[str, TextFit]  # by text
    measured: tuple[ReplayedRun, ...]  # the smallest share first
    is_smallest: bool  # whether `share` is the smallest of the runs, so that less might do
    extrapolated: bool  # whether `tokens` is outside of those of the runs


class MixtureRecord(Record):
    """mixture.json."""

    ERROR = ForestError
    REMEDY = "Delete it; its mixtures are then measured again."

    measured: tuple[MeasuredMixture, ...] = ()
    chosen: ChosenMixture | None = None
    replay: CriticalReplay | None = Field(default=None, exclude_if=is_empty)
