"""Every method of a run in one table, and the names that no domain may have.

The methods are computed elsewhere: the weights of averages in `evaluate/average_weights.py`, ensembles that are more
than a posterior and a prior in `evaluate/ensemble.py`. Report, evaluation and lm-eval read this table.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from btm_scale.config.experts import require_name
from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError, unknown_name
from btm_scale.run_dir import DENSE, LONGER_DENSE, SEED

if TYPE_CHECKING:
    from btm_scale.forest.posterior.evidence import Mode

# The kinds of methods in reading order, with their headings.
KINDS = {
    "baseline": "Baselines",
    "ensemble": "Ensembles of all experts",
    "average": "One model merged from the experts",
    "moe": "One mixture-of-experts model",
    "other": "Other methods",
    "expert": "Each expert alone",
}


@dataclass(frozen=True)
class Method:
    """A method. A name with a field, such as `{k}`, is a pattern for several methods."""

    name: str
    label: str  # human-readable; may contain the name's field
    meaning: str  # one sentence
    kind: str  # a key of KINDS

    def of(self, value: object) -> str:
        """Return the method's name for a value of its field."""
        return _filled(self.name, str(value))

    def matches(self, method: str) -> str | None:
        """Return the value of the field in a method's name, '' without a field; None for another method's name."""
        pattern = re.escape(self.name).replace(r"\{k\}", r"(\d+)")
        match = re.fullmatch(re.sub(r"\\\{\w+\\\}", "(.+)", pattern), method)
        return None if match is None else "".join(match.groups())


@dataclass(frozen=True)
class Ensemble(Method):
    """A mixture of the experts' probabilities: the posterior `mode` from `prior`, if `mode` is set."""

    kind: str = "ensemble"
    mode: Mode | None = None
    prior: Literal["cached", "static", "uniform"] = "cached"
    in_results: bool = True


@dataclass(frozen=True)
class Average(Method):
    """A weighted mean of the experts' parameters."""

    kind: str = "average"
    per_domain: bool = True  # one model for each domain; otherwise one for all
    is_expert: bool = False  # an expert itself: no model is merged

    @property
    def key(self) -> str:
        """Its name in `evaluate.averages`."""
        return self.name.removeprefix("average:")


ENSEMBLE, EXPERT, POSTERIOR_AVERAGE, GREEDY = "ensemble", "expert:", "average:posterior", "greedy"
TOP_K = Ensemble(
    "ensemble:top{k}", "Top {k} experts", "The ensemble of the k experts with the largest prior in the domain."
)
TOP_K_PER_TOKEN = Ensemble(
    "ensemble:top{k}-per-token",
    "Top {k} at each token",
    "The ensemble of the k experts with the largest weight before each token.",
)
GATED = Ensemble(
    "ensemble:gated",
    "Gated",
    "The experts weighted by their probabilities of the last tokens and of longer text; fitted to dev text.",
    prior="static",
)
ROUTED = Ensemble(
    "ensemble:routed",
    "Routed by cluster",
    "The experts of discovered domains, weighted by the distance of the text so far to their clusters.",
)
ROUTED_TOP_K = Ensemble(
    "ensemble:routed:top{k}",
    "Routed, top {k}",
    "The routed ensemble of the k experts whose clusters are nearest to the text so far.",
)

METHODS: tuple[Method, ...] = (
    Method(SEED, "Seed LM", "The model that every expert branched from, before any branching.", "baseline"),
    Method(DENSE, "Dense baseline", "One model trained from the seed LM on all domains together.", "baseline"),
    Method(f"{LONGER_DENSE}{{n}}x", "Dense, {n}x compute", "Dense, with n times the forest's compute.", "baseline"),
    Method(
        "random-split",
        "Random split",
        "Control: the same number of experts, each trained on a random part of all text.",
        "baseline",
    ),
    Ensemble(ENSEMBLE, "Ensemble", "The experts' probabilities, weighted by how well each predicted the text so far."),
    Ensemble(
        "ensemble:prefix",
        "Prefix posterior",
        "The ensemble with the paper's posterior, whatever the config says.",
        mode="prefix",
        in_results=False,
    ),
    Ensemble(
        "ensemble:tempered",
        "Tempered posterior",
        "The ensemble with weakened, decaying evidence; its parameters are fitted to dev text.",
        mode="tempered",
    ),
    Ensemble(
        "ensemble:static",
        "Tempered, static prior",
        "The tempered posterior from the fixed mixture of experts that predicts dev text best.",
        mode="tempered",
        prior="static",
    ),
    GATED,
    Ensemble(
        "ensemble:uniform-prior",
        "Uniform prior",
        "The ensemble with equal weights before the first token.",
        mode="prefix",
        prior="uniform",
    ),
    Ensemble(
        "ensemble:token", "One-token posterior", "The ensemble weighted by the previous token only.", mode="token"
    ),
    Ensemble(
        "ensemble:equal",
        "Equal weights",
        "The mean of the experts' probabilities, whatever the text.",
        mode="fixed",
        prior="uniform",
    ),
    TOP_K,
    TOP_K_PER_TOKEN,
    ROUTED,
    ROUTED_TOP_K,
    Average("average:uniform", "Uniform average", "The plain mean of the experts' parameters.", per_domain=False),
    Average(
        "average:argmax", "Argmax average", "For each domain, the parameters of its most likely expert.", is_expert=True
    ),
    Average(
        POSTERIOR_AVERAGE,
        "Posterior average",
        "For each domain, the mean of the experts' parameters, weighted by the domain's prior.",
    ),
    Average(
        "average:tempered",
        "Tempered average",
        "For each domain, the mean of the experts' parameters, weighted by the tempered posterior.",
    ),
    Average(
        "average:greedy",
        "Greedy soup",
        "For each domain, the mean of experts chosen greedily by the loss of their mean on dev text.",
    ),
    Method("moe", "Mixture of experts", "One model whose MLPs are the experts'.", "moe"),
    Method(EXPERT + "{name}", "{name}", "One expert alone.", "expert"),
)
AVERAGES = {row.key: row for row in METHODS if isinstance(row, Average)}
# The methods without a prefix, the averages, and the names that commands and servers give to the forest.
RESERVED = frozenset({row.name for row in METHODS if not {":", "{"} & set(row.name)} | {*AVERAGES, "forest", "mixture"})


@functools.cache
def find(method: str) -> tuple[Method | None, str]:
    """Return a method's row and the value of its field; (None, '') for a name that is not in the table."""
    matches = ((row, row.matches(method)) for row in METHODS)
    return next(((row, value) for row, value in matches if value is not None), (None, ""))


def kind(method: str) -> str:
    """Return the key in `KINDS` of a method."""
    row, _ = find(method)
    head = method.partition(":")[0]
    return row.kind if row is not None else head if head in KINDS else "other"


def label(method: str) -> str:
    """Return a method's human-readable name."""
    row, value = find(method)
    return method if row is None else _filled(row.label, value).replace(" 1 experts", " 1 expert")


def general_label(method: str) -> str:
    """Return the human-readable name of all methods of a row: `Top k experts`."""
    row, _ = find(method)
    return method if row is None else row.label.replace("{", "").replace("}", "")


def meaning(method: str) -> str:
    """Return a sentence that describes a method; '' for a single expert and for a name that is not in the table."""
    row, _ = find(method)
    return "" if row is None or row.kind == "expert" else row.meaning


def place(method: str) -> tuple[int, int]:
    """Return a sort key: by kind, baselines in the table's order, the plain ensemble before the others."""
    row, _ = find(method)
    first = METHODS.index(row) if row is not None and row.kind == "baseline" else int(method != ENSEMBLE)
    return list(KINDS).index(kind(method)), first


def require_free_name(name: str, what: str = "a domain") -> str:
    """Return the name of a new domain or expert. Raises ValueError if it is invalid or reserved."""
    if name in RESERVED:
        raise ValueError(_reserved(name))
    return require_name(name, what)


def check_names(config: RunConfig, known: Collection[str] = ()) -> None:
    """Check a config's names of averages and domains.

    `known`: domains that the run already has; they may keep a name that was reserved only later.
    Raises ConfigError with every problem.
    """
    problems = [
        f"evaluate.averages: {unknown_name('average', average, AVERAGES)}"
        for average in config.evaluate.averages
        if average not in AVERAGES
    ]
    for section in ("domains", "added_domains", "novel_domains"):
        for name in getattr(config, section):
            if name in RESERVED and name not in known:
                problems.append(f"{section}: {_reserved(name)}")
    if problems:
        raise ConfigError("\n".join(problems))


def _reserved(name: str) -> str:
    return f"'{name}' is a reserved name: methods and commands use it. Choose another name."


def _filled(text: str, value: str) -> str:
    return re.sub(r"\{\w+\}", lambda _: value, text)
