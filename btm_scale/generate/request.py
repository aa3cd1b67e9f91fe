"""Requests and results of generation, and the check of its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from btm_scale.errors import UserError, unknown_name
from btm_scale.generate.sampling import Sampling

METHODS = {
    "expert": "one expert, sampled from the prompt's posterior, generates the complete text",
    "per-token": "an expert is sampled for each token",
    "mixture": "tokens are sampled from the experts' mixture, with temperature, top-k and top-p",
}
POSTERIORS = ("prefix", "token", "tempered", "fixed")
Finished = Literal["end", "stop", "length", "context"]


@dataclass(frozen=True)
class Generation:
    """A continuation and its provenance."""

    prompt: str
    text: str
    tokens: list[int]
    finished: Finished  # by the end of the document, a stop string, max_tokens, or a full context
    posterior: dict[str, float]  # each expert's weight after the prompt
    expert: str | None  # with method `expert`, the one that generated the text


@dataclass(frozen=True)
class Piece:
    """Text added to the continuation of prompt number `prompt`; the last piece has the complete generation."""

    prompt: int
    text: str
    whole: Generation | None = None


@dataclass
class Batch:
    """Texts that are generated together."""

    prompts: Sequence[Sequence[int]]
    limits: np.ndarray  # int64 [texts], maximum number of tokens
    finished: np.ndarray = field(init=False)  # bool [texts]; the caller may finish a text between steps
    posterior: np.ndarray = field(init=False)  # [texts, experts], after the prompts; set at the first step
    drawn: np.ndarray | None = None  # int64 [texts], the expert that generates each text

    def __post_init__(self) -> None:
        self.finished = np.zeros(len(self.prompts), dtype=bool)


def check_settings(method: str, posterior: str, sampling: Sampling) -> None:
    """Raise `UserError` for an unknown method or posterior, or for incompatible settings."""
    if method not in METHODS:
        raise UserError(unknown_name("generation method", method, METHODS))
    if posterior not in POSTERIORS:
        raise UserError(unknown_name("posterior", posterior, POSTERIORS))
    if method == "expert" and posterior != "prefix":
        raise UserError(
            f"Method 'expert' does not support posterior '{posterior}'. It samples the prefix posterior's mixture: use "
            "'per-token', which samples an expert for each token, or 'mixture'."
        )
    if method != "mixture" and not sampling.is_exact:
        raise UserError(
            f"Method '{method}' supports only temperature 1, without top-k and top-p. Use 'mixture' to set them."
        )
