"""results.json: every method's perplexity, with priors, compute and lineage. Reading it needs no engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from btm_scale.config.evaluation import Tempering
from btm_scale.errors import ForestError
from btm_scale.forest.posterior.gate import Gate
from btm_scale.run_dir import RunDir
from btm_scale.util.records import Part, Record, is_empty

MAX_LOSS = 700.0  # nats per token; a model with a larger loss has diverged, and exp(loss) overflows
Measure = Literal["perplexity", "bits_per_byte"]
Natural = Annotated[int, Field(ge=0, lt=1 << 62)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class EvaluatedDomain(Part):
    """The text of a domain on which every method was evaluated."""

    novel: bool  # whether no model was trained on the domain
    tokens: Natural
    bytes: Natural


class MethodResult(Part):
    """The measures of one method by domain; domains on which it was not evaluated are absent."""

    perplexity: dict[str, Positive]
    bits_per_byte: dict[str, NonNegative]

    def of(self, measure: Measure) -> dict[str, float]:
        """Return a measure by domain."""
        return self.perplexity if measure == "perplexity" else self.bits_per_byte


class ByPosition(Part):
    """Perplexity by the position of the predicted token in its sequence."""

    ends: tuple[Natural, ...]  # of ranges of positions; the first begins at 0, and an end belongs to the next
    perplexity: dict[str, dict[str, tuple[Positive | None, ...]]]  # by method and domain; None without tokens


class RanOn(Part):
    """The devices that trained and scored a model, and the kernels that scored it; empty where not recorded."""

    trained: str = ""
    scored: str = ""
    kernels: str = ""  # triton or reference


class Compute(Part):
    """The training compute of a method's models and their ancestors, each counted once."""

    tokens: Natural
    flops: NonNegative


class Parameters(Part):
    """The size of a model that computes a token with only some of its parameters."""

    total: Natural
    active: Natural


class Results(Record):
    """results.json: every method's perplexity and bits per byte on every domain, with priors, compute and lineage."""

    ERROR = ForestError
    ABSENT = "There are no results at {path}. Create them first: btm-scale evaluate RUN"
    REMEDY = "Run btm-scale evaluate again."

    name: str
    random_seed: int
    domains: dict[str, EvaluatedDomain]
    methods: dict[str, MethodResult]
    positions: ByPosition | None = Field(default=None, exclude_if=is_empty)  # of sequences above 128 tokens
    compute: dict[str, Compute] = {}  # by method
    parameters: dict[str, Parameters] = Field(default={}, exclude_if=is_empty)  # of the method moe
    # By domain and expert of the mixture: its fraction of the uses, by layer.
    routing: dict[str, dict[str, tuple[NonNegative, ...]]] = Field(default={}, exclude_if=is_empty)
    # By domain: the mean entropy of the mixture's routers in nats, by layer.
    routing_entropy: dict[str, tuple[NonNegative, ...]] = Field(default={}, exclude_if=is_empty)
    priors: dict[str, dict[str, NonNegative]] = {}  # by domain: each expert's weight, which sum to 1
    tempering: dict[str, Tempering] = {}  # by domain
    # The same of the method ensemble:static; empty in files of earlier versions.
    static_priors: dict[str, dict[str, NonNegative]] = Field(default={}, exclude_if=is_empty)
    static_tempering: dict[str, Tempering] = Field(default={}, exclude_if=is_empty)
    gates: dict[str, Gate] = Field(default={}, exclude_if=is_empty)  # by domain: of the method ensemble:gated
    lineage: dict[str, dict[str, NonNegative]] = {}  # by expert: the weight of each parent
    devices: dict[str, RanOn] = Field(default={}, exclude_if=is_empty)  # by model
    notes: tuple[str, ...] = ()


def load_results(run: RunDir) -> Results:
    """Load results.json. Raises ForestError if it is missing, damaged or of another schema."""
    return Results.load(run.results)
