"""How much dense compute a method is worth: read off the dense baselines of several sizes of compute."""

from __future__ import annotations

import math
from itertools import pairwise

from btm_scale.evaluate.results import Results
from btm_scale.report.summary import mean, training_domains
from btm_scale.run_dir import DENSE, LONGER_DENSE

# arXiv 2208.03306, section 5: 64 domains, 350M parameters.
PAPERS = "The paper's forest of 64 domains was worth 2.5 times its compute."


def dense_equivalent(results: Results, method: str) -> tuple[float, str] | None:
    """How many times the dense baseline's compute reaches a method's mean perplexity over the training domains, and
    `=`, or `<` or `>` where no dense baseline was so weak or so strong.

    Between two baselines, log perplexity is a line in log compute. None without two dense baselines, or the method.
    """
    domains = training_domains(results)
    ours = mean(results, method, domains)
    found = [
        (name, mean(results, name, domains))
        for name in results.methods
        if name in results.compute and (name == DENSE or name.startswith(LONGER_DENSE))
    ]
    points = sorted((results.compute[name].flops, one.value) for name, one in found if one is not None)
    base = results.compute[DENSE].flops if DENSE in results.compute else None
    if ours is None or ours.partial or len(points) < 2 or not base:
        return None
    if ours.value > points[0][1]:
        return points[0][0] / base, "<"
    for (less, worse), (more, better) in pairwise(points):
        if better <= ours.value <= worse and better < worse:
            share = math.log(worse / ours.value) / math.log(worse / better)
            return less * (more / less) ** share / base, "="
    return points[-1][0] / base, ">"


def equivalence_sentence(results: Results, method: str, name: str) -> str:
    """What the page says of it; empty where there is nothing to say."""
    found = dense_equivalent(results, method)
    if found is None:
        return ""
    times, sign = found
    words = {
        "=": f"as good as {times:.2f} times",
        "<": f"worth less than {times:.2f} times",
        ">": f"worth more than {times:.2f} times",
    }[sign]
    return f"{name} is {words} the dense baseline's compute on the training domains. {PAPERS}"
