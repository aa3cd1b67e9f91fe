"""Rounding error, time and memory of the posterior over many experts and tokens.

    python benchmarks/posterior.py

Writes benchmarks/results/posterior.json.
"""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe

from btm_scale.config.evaluation import Tempering
from btm_scale.forest.posterior.mixture import mixture_log_probs

RESULT = Path(__file__).parent / "results" / "posterior.json"
EXPERTS, TOKENS, BLOCK = 64, 1_000_000, 1024


def main() -> None:
    """Measure, print and write."""
    result: dict[str, Any] = {"environment": describe(), "drift_nats": {}, "seconds": {}}
    for tokens in (2_048, 1_000_000):
        result["drift_nats"][str(tokens)] = drift(tokens)
    log_probs = np.random.default_rng(0).standard_exponential((EXPERTS, TOKENS), dtype=np.float32)
    np.negative(log_probs, out=log_probs)
    restarting, carrying_on = np.arange(0, TOKENS, BLOCK), np.zeros(1, np.int64)
    before = peak_bytes()
    for name, starts, choices in (
        ("prefix, blocks of 1024", restarting, {"mode": "prefix"}),
        ("prefix, one block", carrying_on, {"mode": "prefix"}),
        (
            "tempered, blocks of 1024",
            restarting,
            {"mode": "tempered", "tempering": Tempering(power=0.2, forgetting=0.95, share=0.1)},
        ),
    ):
        begin = time.perf_counter()
        mixture_log_probs(log_probs, starts, **choices)  # type: ignore[arg-type]
        result["seconds"][name] = time.perf_counter() - begin
    result["experts"], result["tokens"] = EXPERTS, TOKENS
    result["peak_bytes"] = peak_bytes()
    result["peak_bytes_beyond_the_scores"] = peak_bytes() - before
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2))


def drift(tokens: int) -> float:
    """Largest error in nats of the log-odds after `tokens` tokens, for experts up to 30 nats per token apart.

    The log-odds are read off the mixture's next token, which one expert calls certain and the other impossible.
    """
    random = np.random.default_rng(tokens)
    log_probs = np.concatenate([-random.uniform(0, 30, (2, tokens)), [[0.0], [-np.inf]]], axis=1)
    # Evidence that balances at the end, so that neither weight vanishes and the odds can be read.
    exact = math.fsum(log_probs[0, :-1]) - math.fsum(log_probs[1, :-1])
    prior = np.array([-exact, 0.0])
    first_weight = mixture_log_probs(log_probs, np.zeros(1, np.int64), log_prior=prior)[-1]
    odds = first_weight - math.log(-math.expm1(first_weight))
    return abs(odds)


def peak_bytes() -> int:
    """This process's largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
