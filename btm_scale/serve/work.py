"""What a backend is asked for, and what it answers with, whatever computes it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from btm_scale.generate.running_batch import Alternatives
from btm_scale.generate.sampling import Sampling

Method = Literal["expert", "mixture"]
FinishReason = Literal["stop", "length"]


class Busy(Exception):  # noqa: N818 (it names a state)
    """There is no room for a request now; it may be sent again after `seconds`."""

    def __init__(self, message: str = "The server's queue is full.", seconds: float = 2.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class BackendError(Exception):
    """An expert failed while it answered; the message may be shown to the client."""


class Refused(Exception):  # noqa: N818 (it names a state)
    """An expert's engine does not accept this request; the message may be shown to the client."""


@dataclass(eq=False)
class Job:
    """Continuations of one prompt."""

    prompt: list[int]  # token ids, from the start of the document
    names: tuple[str, ...]  # the models
    method: Method = "expert"  # one of the models is drawn for each continuation, or all are mixed
    copies: int = 1
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top: int | None = None  # return log-probabilities, and this many alternatives per token
    score_prompt: bool = False  # return those of the prompt too
    trace: bool = False  # return the posterior after each token of the prompt
    stream: bool = False  # each token is sent when it is known; otherwise, it may wait for the last one
    starts_document: bool = False  # the client sent the start of the document, which is added otherwise
    cancelled: bool = field(default=False, init=False)

    @property
    def sent(self) -> int:
        """Tokens of the prompt that the client sent."""
        return len(self.prompt) - (not self.starts_document)


@dataclass(frozen=True)
class Routed:
    """The posterior over a job's models after its prompt; the first event of every job."""

    weights: dict[str, float]
    left_out: tuple[str, ...] = ()  # models that are down
    prompt_scores: Sequence[Alternatives] | None = None  # of each token of the prompt but the first
    trace: Sequence[Sequence[float]] | None = None  # [tokens of the prompt, models]


@dataclass(frozen=True)
class Score:
    """A token's text and log-probability in nats, and the most likely tokens at its position.

    The first token of a text has no log-probability and no alternatives.
    """

    text: str
    log_prob: float | None = None
    others: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """The next token of a continuation, with the text that is now final, or its end."""

    copy: int
    expert: str | None  # the model that generates it; None for a mixture
    text: str
    token: int | None = None  # None if the end adds no token
    alternatives: Alternatives | None = None
    finished: FinishReason | None = None
    count: int = 0  # tokens, where they are not known one by one
    scores: tuple[Score, ...] = ()  # of the tokens in `text`


@dataclass(frozen=True)
class Failed:
    """The job ends here."""

    error: Exception


Event = Routed | Delta | Failed


class Backend(Protocol):
    """What answers jobs: models in this process, or engines elsewhere."""

    context: int  # tokens
    max_copies: int  # continuations of one request

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered; False while models are loaded."""

    def can_mix(self, names: Sequence[str]) -> str | None:
        """Return why these models cannot be mixed, as a sentence for the client, or None."""

    def stream(self, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events of jobs with their numbers; closing the iterator cancels the jobs. Raises Busy."""

    def load(self) -> dict[str, int]:
        """Return how many continuations are running and waiting."""
