"""results.json: every method's perplexity, and what explains it. Reading it needs no engine."""

from __future__ import annotations

from typing import Literal

from btm_scale.config.evaluation import Tempering
from btm_scale.errors import ForestError
from btm_scale.run_dir import RunDir
from btm_scale.util.records import Part, Record

Measure = Literal["perplexity", "bits_per_byte"]


class EvaluatedDomain(Part):
    """The text of a domain that every method was evaluated on."""

    novel: bool  # whether no model was trained on the domain
    tokens: int
    bytes: int


class MethodResult(Part):
    """One method's measures, each by domain; a domain that it was not evaluated on is absent."""

    perplexity: dict[str, float]
    bits_per_byte: dict[str, float]

    def of(self, measure: Measure) -> dict[str, float]:
        """A measure by domain."""
        return self.perplexity if measure == "perplexity" else self.bits_per_byte


class Compute(Part):
    """What was spent on the training of a method's models and their ancestors, each counted once."""

    tokens: int
    flops: float


class Results(Record):
    """results.json: every method's perplexity and bits per byte on every domain, and what explains them."""

    ERROR = ForestError
    ABSENT = "There are no results at {path}. Make them first: btm-scale evaluate RUN"
    REMEDY = "Run btm-scale evaluate again."

    name: str
    random_seed: int
    domains: dict[str, EvaluatedDomain]
    methods: dict[str, MethodResult]
    compute: dict[str, Compute] = {}  # by method
    priors: dict[str, dict[str, float]] = {}  # by domain: each expert's weight, which sum to 1
    tempering: dict[str, Tempering] = {}  # by domain
    lineage: dict[str, dict[str, float]] = {}  # by expert: the weight of each parent
    notes: tuple[str, ...] = ()


def load_results(run: RunDir) -> Results:
    """Read results.json. Raises ForestError if it is missing, damaged or of another schema."""
    return Results.load(run.results)
