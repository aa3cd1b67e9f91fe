"""What results.json says, in means, ratios and one sentence; used by tables and page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from btm_scale.evaluate.results import Measure, Results
from btm_scale.forest.methods import ENSEMBLE, EXPERT, label, place
from btm_scale.run_dir import DENSE, MOE, SEED

NOTHING = "\u2013"  # written where there is no number


@dataclass(frozen=True)
class Mean:
    """A mean over some domains; `partial` when a domain that was asked for has no value."""

    value: float
    domains: int
    partial: bool


def training_domains(results: Results) -> list[str]:
    """Domains that experts were trained on, in the results' order."""
    return [name for name, domain in results.domains.items() if not domain.novel]


def novel_domains(results: Results) -> list[str]:
    """Domains that no expert was trained on, in the results' order."""
    return [name for name, domain in results.domains.items() if domain.novel]


def ordered_methods(results: Results) -> list[str]:
    """Every method, by kind, each kind in the results' order; the baselines and the plain ensemble first."""
    return sorted(results.methods, key=place)


def experts(results: Results) -> list[str]:
    """Names of the experts that have results, in the results' order."""
    return [method.removeprefix(EXPERT) for method in ordered_methods(results) if method.startswith(EXPERT)]


def value(results: Results, method: str, domain: str, measure: Measure = "perplexity") -> float | None:
    """A method's measure on a domain, or None where it was not taken."""
    found = results.methods.get(method)
    return None if found is None else found.of(measure).get(domain)


def mean(results: Results, method: str, domains: Sequence[str], measure: Measure = "perplexity") -> Mean | None:
    """Arithmetic mean of a method's measure over those of `domains` that it has; None if it has none."""
    values = [number for domain in domains if (number := value(results, method, domain, measure)) is not None]
    if not values:
        return None
    return Mean(math.fsum(values) / len(values), len(values), partial=len(values) < len(domains))


def reference(results: Results) -> str | None:
    """What the others are measured against: dense, without it the seed, without either nothing."""
    return next((method for method in (DENSE, SEED) if method in results.methods), None)


def ratio(
    results: Results, method: str, to: str, domains: Sequence[str], measure: Measure = "perplexity"
) -> Mean | None:
    """Ratio of two methods' means over those of `domains` that both have; None if they share none."""
    shared = [d for d in domains if None not in (value(results, method, d, measure), value(results, to, d, measure))]
    above, below = mean(results, method, shared, measure), mean(results, to, shared, measure)
    if above is None or below is None or below.value == 0:
        return None
    return Mean(above.value / below.value, len(shared), partial=len(shared) < len(domains))


def lowest(values: Mapping[str, float | None]) -> set[str]:
    """Return the keys with the smallest of the finite values; more than one if they are printed alike."""
    finite = {key: number for key, number in values.items() if number is not None and math.isfinite(number)}
    smallest = perplexity(min(finite.values(), default=0.0))
    return {key for key, number in finite.items() if perplexity(number) == smallest}


def lowest_means(results: Results, domains: Sequence[str], measure: Measure = "perplexity") -> set[str]:
    """The methods with the smallest mean, among those that have every one of `domains`."""
    means = {method: mean(results, method, domains, measure) for method in results.methods}
    return lowest({method: m.value for method, m in means.items() if m is not None and not m.partial})


def headline(results: Results) -> str:
    """What came of the run, in one or two plain sentences: better, equal or worse."""
    domains = training_domains(results)
    ours = mean(results, ENSEMBLE, domains)
    if ours is None:
        return _headline_without_ensemble(results, domains)
    sentence = f"The ensemble's mean perplexity over {count(ours.domains, 'domain')} is {perplexity(ours.value)}"
    to = reference(results)
    against = ratio(results, ENSEMBLE, to, domains) if to else None
    if to is None or against is None:
        return f"{sentence}; this run has nothing to compare it with."
    if to == SEED:
        sentence += f", {_times(against.value)} the seed LM's"
        return f"{sentence}; this run has no dense baseline to compare it with."
    sentence += f", {_times(against.value)} the dense baseline's{_at_what_compute(results)}"
    sentence += ": worse than one dense model." if against.value > 1 and not is_same(against.value) else "."
    return sentence + _headline_on_novel(results)


def moe_sentence(results: Results) -> str:
    """Return a sentence on whether the mixture of experts or the ensemble has the lower mean perplexity.

    '' unless both were evaluated.
    """
    against = ratio(results, MOE, ENSEMBLE, training_domains(results))
    if against is None:
        return ""
    verdict = "routing by the posterior" if against.value > 1 else "routing each token"
    verdict = "neither is better" if is_same(against.value) else f"{verdict} wins"
    return (
        f"The mean perplexity of the mixture of experts over {count(against.domains, 'domain')} is "
        f"{_times(against.value)} the ensemble's: {verdict}."
    )


def _headline_without_ensemble(results: Results, domains: Sequence[str]) -> str:
    best = lowest_means(results, domains)
    if not best:
        return "No method has a mean perplexity over these domains yet."
    method = next(name for name in ordered_methods(results) if name in best)
    found = mean(results, method, domains)
    assert found is not None
    return (
        f"The lowest mean perplexity over {count(found.domains, 'domain')} is {perplexity(found.value)}, "
        f"by {label(method)}; this run has no ensemble."
    )


def _headline_on_novel(results: Results) -> str:
    domains = novel_domains(results)
    ours, against = mean(results, ENSEMBLE, domains), ratio(results, ENSEMBLE, DENSE, domains)
    if ours is None or against is None:
        return ""
    return (
        f" On {count(ours.domains, 'novel domain')}, never trained on, it is {perplexity(ours.value)}, "
        f"{_times(against.value)} dense's."
    )


def _at_what_compute(results: Results) -> str:
    ours, dense = results.compute.get(ENSEMBLE), results.compute.get(DENSE)
    if ours is None or dense is None or not dense.flops:
        return ""
    share = ours.flops / dense.flops
    return " at equal training compute" if 0.98 < share < 1.02 else f" with {_times(share)} its training compute"


def is_same(share: float) -> bool:
    """Return whether a ratio is printed as 1."""
    return abs(share - 1) < 0.0005


def _times(share: float) -> str:
    if is_same(share):
        return "the same as"
    return f"{share_text(share)} times"


def count(number: int, noun: str) -> str:
    """A number with its noun, which takes a plain plural."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def perplexity(number: float) -> str:
    """Four digits or so of a perplexity or a bits-per-byte figure."""
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else "∞"
    if number >= 1e6:
        return f"{number:.1e}".replace("e+0", "e").replace("e+", "e")
    if number >= 1000:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 100 else f"{number:.2f}" if number >= 10 else f"{number:.3f}"


def share_text(number: float) -> str:
    """A ratio; near 1 to three decimals, because there a percent matters."""
    if not math.isfinite(number):
        return perplexity(number)
    return f"{number:.3f}" if number < 10 else f"{number:.2f}" if number < 100 else perplexity(number)


def flops_text(flops: float) -> str:
    """Operations in the largest unit that keeps them above 1."""
    for power, unit in ((21, "ZFLOP"), (18, "EFLOP"), (15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP")):
        if flops >= 10.0**power:
            return f"{flops / 10.0**power:.3g} {unit}"
    return f"{flops:.3g} FLOP"


def tokens_text(tokens: float) -> str:
    """Tokens in thousands, millions or billions."""
    for power, unit in ((12, "\u00a0T"), (9, "\u00a0B"), (6, "\u00a0M"), (3, "\u00a0K")):
        if tokens >= 10.0**power:
            return f"{tokens / 10.0**power:.3g}{unit}"
    return f"{tokens:.0f}"


def weight_text(weight: float) -> str:
    """A weight to two decimals; what would be written as 0 but isn't is a dot."""
    return "\u00b7" if 0 < weight < 0.005 else f"{weight:.2f}"


def shorten(words: str, length: int) -> str:
    """Words of at most `length` characters, with an ellipsis for the middle: names often differ at their ends."""
    if len(words) <= length:
        return words
    head = length // 2
    return f"{words[:head]}\u2026{words[len(words) - (length - 1 - head) :] if length - 1 > head else ''}"
