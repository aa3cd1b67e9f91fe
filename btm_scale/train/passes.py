"""How often training passes over the text of each domain, and the limit `budget.max_passes`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping

from btm_scale.config.run import RunConfig
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.errors import DataError
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import training_job


def budget_tokens(config: RunConfig, domain: str) -> int:
    """Return the tokens of a domain that the seed LM and then the domain's expert train on; 0 for a novel domain.

    Replayed text, and other weights at the end of the schedule, are not counted.
    """
    if domain not in config.expert_domains:
        return 0
    length = config.budget.sequence_length
    tokens = 0.0
    if domain in config.domains:
        weights = {name: settings.weight for name, settings in config.domains.items()}
        seed_tokens = config.budget.seed_steps * config.budget.sequences * length
        tokens = seed_tokens * weights[domain] / sum(weights.values())
    job = training_job(config, domain)
    return round(tokens + job.steps * job.sequences * length)


def passes_of_run(config: RunConfig, run: RunDir) -> dict[str, float]:
    """Return the passes over the train split of each domain with an expert whose token files exist."""
    passes = {}
    for name in config.expert_domains:
        with contextlib.suppress(DataError):  # a damaged record is reported by `prepare`, and hides no status
            fingerprint = Fingerprint.of_domain(run, name)
            passes[name] = budget_tokens(config, name) / max(1, fingerprint.splits["train"].per_pass)
    return passes


def require_few_passes(config: RunConfig, passes: Mapping[str, float]) -> None:
    """Raise DataError if training passes over the text of a domain more often than `budget.max_passes`."""
    problems = [problem for name, number in passes.items() if (problem := too_many_passes(config, name, number))]
    if problems:
        raise DataError("\n".join(problems))


def too_many_passes(config: RunConfig, domain: str, passes: float) -> str:
    """Return a sentence if `budget.max_passes` is exceeded; "" if not."""
    limit = config.budget.max_passes
    if limit is None or passes <= limit:
        return ""
    return (
        f"Training passes {passes:.2f} times over the train split of domain '{domain}', and budget.max_passes is "
        f"{limit:g}. Add text, lower budget.tokens, or set budget.max_passes to {math.ceil(100 * passes) / 100:g}."
    )
