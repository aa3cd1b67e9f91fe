"""What may be asked of a generation, what it gives, and which settings go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from btm_scale.errors import UserError
from btm_scale.generate.sampling import Sampling

METHODS = {
    "expert": "one expert, drawn by the posterior of the prompt, writes the text alone",
    "per-token": "an expert is drawn for each token",
    "mixture": "tokens come from the experts' mixture: greedy, temperature, top-k, top-p",
}
POSTERIORS = ("prefix", "token", "tempered", "fixed")
Finished = Literal["end", "stop", "length", "context"]


@dataclass(frozen=True)
class Generation:
    """A continuation, and where it came from."""

    prompt: str
    text: str
    tokens: list[int]
    finished: Finished  # by the end of the document, a stop string, max_tokens, or the experts' longest text
    posterior: dict[str, float]  # of the prompt: each expert's weight before the first token
    expert: str | None  # that wrote it, where one did


@dataclass(frozen=True)
class Piece:
    """What was just added to the continuation of prompt number `prompt`; the last piece brings the whole."""

    prompt: int
    text: str
    whole: Generation | None = None


@dataclass
class Batch:
    """Texts that are written side by side."""

    prompts: Sequence[Sequence[int]]
    limits: np.ndarray  # int64 [texts]: tokens to write at the most
    finished: np.ndarray = field(init=False)  # bool [texts]; whoever takes the steps may finish a text
    posterior: np.ndarray = field(init=False)  # [texts, experts], of the prompts; known at the first step
    drawn: np.ndarray | None = None  # int64 [texts]: the expert that writes each

    def __post_init__(self) -> None:
        self.finished = np.zeros(len(self.prompts), dtype=bool)


def check_settings(method: str, posterior: str, sampling: Sampling) -> None:
    """Raise UserError for a method or posterior that there isn't, or that doesn't go with the rest."""
    if method not in METHODS:
        told = "; ".join(f"'{name}': {what}" for name, what in METHODS.items())
        raise UserError(f"no generation method is called '{method}'. Choose one of: {told}")
    if posterior not in POSTERIORS:
        raise UserError(f"no posterior is called '{posterior}'; choose one of {', '.join(POSTERIORS)}")
    if method == "expert" and posterior != "prefix":
        raise UserError(
            f"the method 'expert' samples the prefix posterior's mixture, not '{posterior}'; use 'per-token', which "
            "draws an expert for each token, or 'mixture'"
        )
    if method != "mixture" and not sampling.is_exact:
        raise UserError(
            f"the method '{method}' draws from the mixture as it is: temperature 1, no top-k, no top-p; use "
            "'mixture' for these"
        )
