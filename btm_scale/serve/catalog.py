"""The models that a client may name, and how each is answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from btm_scale.errors import near_match
from btm_scale.generate.sampling import Sampling
from btm_scale.serve.api_errors import ApiError
from btm_scale.serve.work import Backend, Method

FOREST = "forest"
MIXTURE = "forest:mixture"


@dataclass(frozen=True)
class Catalog:
    """The names of a server's models."""

    experts: tuple[str, ...]
    others: tuple[str, ...] = ()  # seed, dense, averages
    method: Method = "expert"  # of the model `forest`
    created: int = 0  # seconds since 1970

    @property
    def names(self) -> list[str]:
        """Every model that a client may name."""
        return [FOREST, MIXTURE, *self.experts, *self.others]

    def card(self, name: str) -> dict[str, Any]:
        """Return a model in OpenAI's form. Raises ApiError for an unknown model."""
        self._require(name)
        kind = name if name in (FOREST, MIXTURE) else "expert" if name in self.experts else "model"
        return {"id": name, "object": "model", "created": self.created, "owned_by": "btm-scale", "btm": {"kind": kind}}

    def choose(
        self, name: str, sampling: Sampling, backend: Backend, *, mixed: bool = False
    ) -> tuple[tuple[str, ...], Method]:
        """Return the models that answer, and how.

        Drawing one expert samples the forest exactly at temperature 1 without top_k and top_p; any other setting needs
        the mixture, and so do log-probabilities of the prompt (`mixed`). Raises ApiError for an unknown model,
        and if the mixture is needed and does not fit into memory.
        """
        self._require(name)
        if name not in (FOREST, MIXTURE):
            return (name,), "expert"
        if len(self.experts) == 1:
            return self.experts, "expert"
        method: Method = "mixture" if name == MIXTURE or not sampling.is_exact or mixed else self.method
        reason = backend.can_mix(self.experts) if method == "mixture" else None
        if reason is not None:
            raise ApiError(
                400,
                f"{reason} Use model '{FOREST}' at temperature 1 without top_p, top_k and echoed logprobs: it draws "
                "one expert, which samples the mixture exactly.",
                code="mixture_unavailable",
            )
        return self.experts, method

    def _require(self, name: str) -> None:
        if name not in self.names:
            near = near_match(name[:200], self.names)
            raise ApiError(
                404,
                f"The model '{name:.200}' does not exist.{near} GET /v1/models lists the models.",
                param="model",
                code="model_not_found",
            )


def catalog_of(experts: Sequence[str], finished: Sequence[str], method: Method, created: int) -> Catalog:
    """Return the catalog of a run: its experts, and its other finished models."""
    return Catalog(tuple(experts), tuple(name for name in finished if name not in experts), method, created)
