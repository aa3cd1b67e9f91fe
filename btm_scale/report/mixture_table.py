"""What `btm-scale mixture` prints: the cost, the progress, and the chosen mixture."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from itertools import compress
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from btm_scale.config.yaml import dump_text
from btm_scale.errors import first_few
from btm_scale.evaluate.mixture_law import LAWS, needed
from btm_scale.evaluate.mixture_record import ChosenMixture, Predicted
from btm_scale.report.fitting import first_fitting
from btm_scale.report.quantities import amount, size
from btm_scale.report.quantities import time as time_text
from btm_scale.report.summary import NOTHING, count, perplexity, shorten
from btm_scale.util.terminal import printable

logger = logging.getLogger(__name__)

_DECIMALS = 3  # of a weight
_COLUMNS = ("seed", "uniform", "average", "95%", "trained", "law", "R2")
_LONGEST_NAMES = (64, 24, 16, 10)


class Countdown:
    """Logs after each average how many are measured, and the estimated time left."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._begin = total, 0, time.monotonic()

    def log(self, mixture: Mapping[str, float]) -> None:
        """Log that the average with these weights was measured."""
        self._done += 1
        left = (time.monotonic() - self._begin) / self._done * (self._total - self._done)
        words = f"; about {time_text(left)} left" if self._done < self._total else ""
        logger.info("%d of %d averages measured%s", self._done, self._total, words)


def cost_sentence(cost: Mapping[str, Any]) -> str:
    """Return a sentence on the cost of measuring; `cost` is the document of `run.mixture_cost.Cost`."""
    if not cost["to_measure"]:
        return f"All {cost['runs']} averages are measured already."
    words = f"{cost['to_measure']} of {count(cost['runs'], 'average')} to measure: {amount(cost['tokens'])} tokens to "
    words += f"score, {size(cost['disk_bytes'])} of disk space at a time, "
    if cost["seconds"] is None:
        return f"{words}an unknown time, since no model of this run was trained on a device like this one"
    return f"{words}about {time_text(cost['seconds'])}"


def print_mixture(chosen: ChosenMixture, console: Console) -> None:
    """Print the predictions, the weights, warnings, and the section of the YAML to paste."""
    console.print(first_fitting(mixture_tables(chosen)))
    weights = ", ".join(f"{name} {weight:.{_DECIMALS}f}" for name, weight in chosen.weights.items())
    for sentence in (f"Weights: {weights}.", *trust(chosen), *text_notes(chosen)):
        console.print(printable(sentence), markup=False, highlight=False, soft_wrap=True)
    if chosen.domains:
        console.print()
        console.print(printable(domains_yaml(chosen)).rstrip(), markup=False, highlight=False, soft_wrap=True)


def mixture_tables(chosen: ChosenMixture) -> Iterator[Table]:
    """Yield versions of the table of predicted perplexities, with those of the seed LM and the uniform average, and R2.

    Narrower ones have shorter names of texts, then fewer columns: no number is cut.
    """
    for absent in (set[str](), {"law"}, {"law", "95%"}, {"law", "95%", "uniform"}):
        for longest in _LONGEST_NAMES:
            yield _mixture_table(chosen, absent, longest)


def _mixture_table(chosen: ChosenMixture, absent: set[str], longest: int) -> Table:
    title = "Perplexity of the chosen mixture, predicted (lower is better)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("text", no_wrap=True)
    shown = [name not in absent for name in _COLUMNS]
    for name in compress(_COLUMNS, shown):
        table.add_column(name, justify="left" if name == "law" else "right", no_wrap=True)
    for name, row in prediction_rows(chosen):
        table.add_row(Text(shorten(printable(name), longest)), *compress(row, shown))
    return table


def prediction_rows(chosen: ChosenMixture) -> list[tuple[str, list[str]]]:
    """Return a row per text and the mean: seed, uniform, average, interval, trained, law and leave-one-out R2."""
    rows = [
        (name, [*_numbers(one), chosen.fit[name].law, f"{chosen.fit[name].r2:.3f}"])
        for name, one in chosen.perplexity.items()
    ]
    return [*rows, ("mean", [*_numbers(chosen.mean), "", ""])] if len(chosen.targets) > 1 else rows


def trust(chosen: ChosenMixture) -> list[str]:
    """Return sentences on how far the predictions can be trusted."""
    measured = count(len(chosen.measured), "measured average")
    sentences = []
    if chosen.mean.trained is not None and chosen.mean.trained_uniform is not None:
        sentences.append(
            f"A model that is trained on this mixture is predicted to have a mean perplexity of "
            f"{perplexity(chosen.mean.trained)}, and one that is trained on the uniform mixture "
            f"{perplexity(chosen.mean.trained_uniform)}. Use these to rank mixtures: their levels are less certain "
            "than those of averages."
        )
    sentences += [f"The nearest of {measured} differs in {chosen.nearest:.0%} of the weight."]
    models = len(chosen.weights)
    if left_out := [law for law in LAWS if not any(law.name in fit.laws for fit in chosen.fit.values())]:
        laws = " and ".join(f"the {law.name} law, which needs {needed(law, models)}" for law in left_out)
        sentences.append(f"They are too few averages of {models} models for {laws}. Raise --runs.")
    if chosen.extrapolated:
        sentences.append(
            f"This extrapolates: for {', '.join(chosen.extrapolated)}, the law is less certain there than at any "
            "measured average. Raise --runs."
        )
    poor = [name for name, fit in chosen.fit.items() if fit.r2 < 0.9]
    if poor:
        sentences.append(f"No law predicts {', '.join(poor)} well (R2 below 0.9). Raise --runs.")
    if chosen.unreplayed:
        named = first_few(chosen.unreplayed, "models", most=8)
        sentences.append(
            f"Trained on a single domain: {named}. Averages of such models can rank mixtures differently from "
            "training. Those of experts with `branch: {replay: 0.1}` rank them better, and with a seed LM the "
            "perplexity of trained models is predicted."
        )
    return sentences


def text_notes(chosen: ChosenMixture) -> list[str]:
    """Return sentences on models with other text than the domains', and on domains without weight."""
    sentences = [
        f"{weight:.{_DECIMALS}f} of the mixture is {name}, which was trained on other text than this run's domains: it "
        "is left out of the weights below."
        for name, weight in chosen.outside.items()
    ]
    if none := [name for name, one in chosen.domains.items() if not _rounded(one["weight"])]:
        sentences.append(f"Leave out: {', '.join(none)}.")
    return sentences


def domain_weights(chosen: ChosenMixture) -> dict[str, float]:
    """Return the rounded weights of those domains that have any."""
    weights = {name: _rounded(one["weight"]) for name, one in chosen.domains.items()}
    return {name: weight for name, weight in weights.items() if weight}


def domains_yaml(chosen: ChosenMixture) -> str:
    """Return the weights as the section `domains` of a run's YAML."""
    return dump_text({"domains": {name: {"weight": weight} for name, weight in domain_weights(chosen).items()}})


def _rounded(weight: float) -> float:
    return round(weight, _DECIMALS)


def _numbers(one: Predicted) -> list[str]:
    low, high = one.interval
    seed, trained = (NOTHING if value is None else perplexity(value) for value in (one.seed, one.trained))
    average = [perplexity(one.predicted), f"{perplexity(low)} to {perplexity(high)}"]
    return [seed, perplexity(one.uniform), *average, trained]
