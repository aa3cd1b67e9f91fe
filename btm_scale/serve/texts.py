"""Continuations on their way through the engine: waiting parts of jobs, and texts that are generated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from btm_scale.generate.detokenizer import Transcript
from btm_scale.serve.work import Job


@dataclass(frozen=True)
class Part:
    """Continuations of a job under the same models."""

    job: Job
    names: tuple[str, ...]
    copies: tuple[int, ...]
    randoms: tuple[torch.Generator | None, ...]  # by copy
    routed: bool = False  # the client has its posterior

    @property
    def kind(self) -> tuple[object, ...]:
        """Parts of one kind are read together."""
        return self.names, self.job.method if len(self.names) > 1 else "", self.job.score_prompt or self.job.trace


@dataclass
class Text:
    """A continuation that is being generated."""

    job: Job
    copy: int
    expert: str | None
    limit: int
    transcript: Transcript
