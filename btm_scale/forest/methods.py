"""Every method of a run: its name, label, meaning and kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.config.run import RunConfig
from btm_scale.forest.forest import experts
from btm_scale.run_dir import AVERAGE, DENSE, LONGER_DENSE, SEED, RunDir

UNIFORM, ARGMAX, POSTERIOR, TEMPERED, GREEDY = "uniform", "argmax", "posterior", "tempered", "greedy"


def average_model(kind: str, domain: str, names: Sequence[str], log_prior: np.ndarray) -> str:
    """The model that serves a domain as its average of a kind; of kind argmax it is the likeliest expert itself.

    `log_prior` [experts] is the domain's, nats, over the experts `names`.
    """
    return names[int(np.argmax(log_prior))] if kind == ARGMAX else _merged(kind, domain)


def _merged(kind: str, domain: str) -> str:
    return f"{AVERAGE}{UNIFORM}" if kind == UNIFORM else f"{AVERAGE}{kind}/{domain}"


def averages_of(config: RunConfig, run: RunDir) -> tuple[str, ...]:
    """The kinds of averages that are made of the forest: none, if its experts are of different shapes."""
    return config.evaluate.averages if len({_shapes(run, name) for name in experts(run)}) <= 1 else ()


def average_texts(config: RunConfig) -> dict[str, list[tuple[str, str]]]:
    """Every average that is a model of its own, and the (domain, split) that each is scored on."""
    texts: dict[str, list[tuple[str, str]]] = {}
    for domain in config.all_domains:
        for kind in config.evaluate.averages:
            if kind != ARGMAX:
                texts.setdefault(_merged(kind, domain), []).append((domain, config.evaluate.split))
    return texts


def _shapes(run: RunDir, name: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    with SafetensorsModel(run.model(name)) as model:
        return frozenset((tensor, spec.shape) for tensor, spec in model.specs().items())


ENSEMBLE = "ensemble"


POSTERIOR_AVERAGE = "average:posterior"


EXPERT = "expert:"


# Reading order of the kinds of method, and their headings.
KINDS = {
    "baseline": "Baselines",
    "ensemble": "Ensembles of all experts",
    "average": "One model made of the experts",
    "other": "Other methods",
    "expert": "Each expert alone",
}


_BASELINES = (SEED, DENSE, "random-split")


_LABELS = {
    SEED: "Seed LM",
    DENSE: "Dense baseline",
    "random-split": "Random split",
    ENSEMBLE: "Ensemble",
    "ensemble:tempered": "Tempered posterior",
    "ensemble:uniform-prior": "Uniform prior",
    "ensemble:token": "One-token posterior",
    "ensemble:routed": "Routed by cluster",
    "ensemble:equal": "Equal weights",
    "average:uniform": "Uniform average",
    "average:argmax": "Argmax average",
    "average:tempered": "Tempered average",
    "average:greedy": "Greedy soup",
    POSTERIOR_AVERAGE: "Posterior average",
}


_MEANINGS = {
    SEED: "The model that every expert branched from, before any branching.",
    DENSE: "One model that goes on from the seed LM on all domains together.",
    "random-split": "The control: as many experts, each trained on a random part of all text.",
    ENSEMBLE: "The experts' probabilities, weighed by how well each predicted the text so far.",
    "ensemble:tempered": "The ensemble with weakened evidence that is forgotten; its numbers are fitted to dev text.",
    "ensemble:uniform-prior": "The ensemble without knowledge of the domain before the first token.",
    "ensemble:routed": "The experts of found domains, weighed by the nearness of the text so far to their clusters.",
    "ensemble:token": "The ensemble weighed by the one previous token only.",
    "ensemble:equal": "The experts' probabilities mixed in equal parts, whatever the text.",
    "average:uniform": "The plain mean of the experts' parameters.",
    "average:tempered": "For each domain the mean of the experts' parameters, weighed by the tempered posterior.",
    "average:greedy": "For each domain the mean of those experts whose mean predicts its dev text best.",
    "average:argmax": "For each domain the parameters of its likeliest expert.",
    POSTERIOR_AVERAGE: "For each domain the mean of the experts' parameters, weighed by that domain's prior.",
}


def kind(method: str) -> str:
    """The key in `KINDS` of a method."""
    if method in _BASELINES or method.startswith(LONGER_DENSE):
        return "baseline"
    head = method.partition(":")[0]
    return head if head in KINDS else "other"


def label(method: str) -> str:
    """A method's name for people."""
    if method.startswith(EXPERT):
        return method.removeprefix(EXPERT)
    routed = method.removeprefix("ensemble:routed:top")
    if routed != method and routed.isdecimal():
        return f"Routed, top {routed}"
    top = method.removeprefix("ensemble:top")
    if top.endswith("-per-token"):
        return f"Top {top.removesuffix('-per-token')} at each token"
    if top != method and top.isdecimal():
        return f"Top {top} expert{'s' if top != '1' else ''}"
    if method.startswith(LONGER_DENSE):
        return f"Dense, {method.removeprefix(LONGER_DENSE).removesuffix('x')}x compute"
    return _LABELS.get(method, method)


def meaning(method: str) -> str:
    """One sentence on what a method is; empty if it isn't one of ours."""
    if method.endswith("-per-token"):
        return "The ensemble with only so many experts before each token, those of the largest weight then."
    if method.startswith("ensemble:top"):
        return "The ensemble with only so many experts, the likeliest by the domain's prior."
    if method.startswith(LONGER_DENSE):
        return "The dense baseline, trained for so many times the forest's compute."
    return _MEANINGS.get(method, "")
