"""Claims that the families of configs/claims answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from claims import seed_share
from claims.claim import Claim, Evidence, Figure

_BTM = "Branch-Train-Merge, arXiv 2208.03306"


def _of(
    family: str,
    size: str,
    title: str,
    text: str,
    source: str,
    read: Callable[[Evidence], Sequence[Figure]],
    reason: str = "",
) -> Claim:
    """Return a claim that one family answers."""
    command = f"    make claims NAME={family} CORPORA=FOLDER"
    return Claim(title, text, source, size, command, (f"claims/{family}",), read, reason)


_SHARES = (
    "4 domains of 8 MB (mathematics, law, medicine, Python), llama-1m, 2 million training tokens, of which the seed LM "
    "gets a fraction of 0, 0.25, 0.5, 0.75 or all"
)

CLAIMS = (
    _of(
        "seed-share",
        _SHARES,
        "Seed share",
        "Half of the compute for the seed LM is better than none and better than all.",
        f"{_BTM}, section 4: of 0 to 100%, 40 to 60% is best for the ensemble",
        seed_share.optimum,
    ),
    _of(
        "seed-share",
        _SHARES,
        "Averages and the seed share",
        "An average of the experts' parameters is best with a longer seed phase than the ensemble.",
        f"{_BTM}, section 4: 60 to 70% is best for averages",
        seed_share.average_wants_more,
    ),
    _of(
        "seed-share",
        _SHARES,
        "Averages without a seed LM",
        "Experts that share no trained seed LM cannot be averaged: the average has a perplexity of at least ten times "
        "that of dense.",
        f"{_BTM}, section 4: perplexity in the thousands. Here experts without a seed phase begin with the same random "
        "weights",
        seed_share.no_seed_no_average,
    ),
)
