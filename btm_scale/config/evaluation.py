"""The sections of a run's YAML on evaluation: baselines, posterior, prior and averages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from btm_scale.config.changes import SCORED_AGAIN, Changes, MayChange
from btm_scale.config.section import Section

# The models are scored on other text.
_Text = Changes(effect=SCORED_AGAIN)


class BaselinesConfig(Section):
    """What the forest is compared with."""

    dense: bool = Field(default=True, description="train one model on all domains with the compute of the forest")
    dense_compute: tuple[Annotated[float, Field(gt=1)], ...] = Field(
        default=(), description="further dense baselines, with this many times the compute of the forest"
    )
    random_split: bool = Field(default=False, description="control: experts of random parts of the text")


class Tempering(Section):
    """How evidence updates the weights of the tempered posterior.

    After each token, log w <- forgetting x log w + power x log p, normalised; then the prior is mixed in with weight
    `share`. Power and forgetting 1 with share 0 give the prefix posterior, which is over-confident: the experts' errors
    on neighbouring tokens are not independent.
    """

    power: float = Field(gt=0, description="exponent of each token's likelihood")
    forgetting: float = Field(default=1.0, gt=0, le=1, description="exponent of the weights before each token")
    share: float = Field(default=0.0, ge=0, lt=1, description="weight of the prior, mixed in after each token")


class EvaluateConfig(Section):
    """What is scored, and how the experts are weighted."""

    posterior: MayChange[Literal["prefix", "token", "tempered"]] = Field(
        default="prefix",
        description="posterior of the method `ensemble`; the others have methods of their names",
    )
    tempering: MayChange[Tempering | None] = Field(
        default=None, description="parameters of the tempered posterior; default: fitted to each domain's dev text"
    )
    prior: MayChange[Literal["cached", "static", "uniform", "updating"]] = Field(
        default="cached",
        description="weights before the first token: the moving average of dev blocks' posteriors, the best fixed "
        "mixture of dev text, equal, or updated block by block",
    )
    averages: MayChange[tuple[str, ...]] = Field(
        default=("uniform", "argmax", "posterior"), description="averages to evaluate, by their names in the results"
    )
    blocks: MayChange[Literal["restart", "carry"]] = Field(
        default="restart",
        description="each block starts from the prior (restart) or from the posterior of the previous block (carry)",
    )
    top_k: MayChange[tuple[Annotated[int, Field(gt=0)], ...]] = Field(
        default=(1, 2, 4), description="ensembles of the k experts with the largest prior"
    )
    top_k_per_token: MayChange[tuple[Annotated[int, Field(gt=0)], ...]] = Field(
        default=(), description="as top_k, but selected by the posterior before each token"
    )
    split: Annotated[Literal["dev", "test"], _Text] = Field(default="test", description="text of the reported results")
    tokens_per_domain: Annotated[int, _Text] = Field(
        default=65_536, gt=0, description="largest number of tokens to evaluate on"
    )
    dev_blocks: Annotated[int, _Text] = Field(
        default=100, gt=0, description="blocks of dev text that set the cached prior"
    )
