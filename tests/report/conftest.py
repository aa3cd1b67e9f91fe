from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from btm_scale.config.run import RunConfig
from btm_scale.evaluate.results import Results

MakeResults = Callable[..., Results]


@pytest.fixture
def make_results() -> MakeResults:
    """Results with exact figures: dense has 10, 20, 30, ... on the domains, other methods a share of it."""

    def make(
        training: Sequence[str] = ("math", "code"),
        novel: Sequence[str] = ("poems",),
        shares: dict[str, float] | None = None,
        dense: bool = True,
    ) -> Results:
        shares = {"seed": 1.2, "dense": 1.0, "ensemble": 0.9} if shares is None else dict(shares)
        if not dense:
            shares.pop("dense", None)
        domains = [*training, *novel]
        base = {domain: 10.0 * (i + 1) for i, domain in enumerate(domains)}
        methods = {
            method: {
                "perplexity": {domain: share * base[domain] for domain in domains},
                "bits_per_byte": {domain: share * base[domain] / 16 for domain in domains},
            }
            for method, share in shares.items()
        }
        for name in training:
            methods[f"expert:{name}"] = {
                "perplexity": {d: base[d] * (0.92 if d == name else 1.7) for d in domains},
                "bits_per_byte": {d: base[d] / 16 for d in domains},
            }
        tokens = {"seed": 500, "ensemble": 1000} | ({"dense": 1000} if dense else {})
        values = {
            "name": "a run",
            "random_seed": 3,
            "domains": {d: {"novel": d in novel, "tokens": 4096, "bytes": 16000} for d in domains},
            "methods": methods,
            "compute": {method: {"tokens": n, "flops": 6e9 * n} for method, n in tokens.items()},
            "priors": {d: {name: 1 / len(training) for name in training} for d in domains},
        }
        return Results.model_validate(values)

    return make


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.model_validate({"name": "a run", "domains": {"math": {"text": "m"}, "code": {"text": "c"}}})
