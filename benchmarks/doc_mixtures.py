"""The table of docs/mixtures.md, from benchmarks/results/mixtures.json. A unit that is not measured yet is a dash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from doc_tables import _read, _source, _table

_NOT_MEASURED = "-"
_REPLAYS = (0.1, 0.3)
HELD_OUT = "demo-4"  # none of its mixtures was known when the constants of the prediction were chosen
PREDICTIONS = {"predicted": "trained models predicted", "averages": "averages, by the law fitted to them"}

Unit = Mapping[str, Any]
Units = Mapping[str, Unit]


def mixtures() -> str:
    """How well averages of experts predict trained mixtures, by forest; without and with replay in every expert."""
    try:
        units: Units = _read("mixtures")["units"]
    except FileNotFoundError:
        return "Not measured yet: `python benchmarks/mixtures.py` takes the measurements."
    forests = list(dict.fromkeys(name.partition("/")[0] for name in units))
    rows = [["", *forests]]
    for other in ("uniform", "proportional"):
        rows.append([f"recommended / {other}, trained", *(_text(_ratio(units, forest, other)) for forest in forests)])
    for unit, replay in predictors():
        found = [(forest, units.get(f"{forest}/{unit}")) for forest in forests]
        rows.append([f"{replay}: lowest R2 of a domain's law", *(_text(_lowest_r2(one)) for _, one in found)])
        for key, of in PREDICTIONS.items():
            ranked = (_text(rank_correlation(units, forest, unit, key)) for forest, _ in found)
            rows.append([f"{replay}: Spearman, {of}", *ranked])
        rows.append([f"{replay}: perplexity of the uniform average", *(_text(_uniform(one)) for _, one in found)])
        rows.append([f"{replay}: perplexity of each expert on its domain", *(_text(_own(one)) for _, one in found)])
    counts = ", ".join(f"{forest} {len(_trained(units, forest))}" for forest in forests)
    return f"{_table(rows)}\n\nTrained mixtures: {counts} of 8. {_source('mixtures')}."


def predictors() -> list[tuple[str, str]]:
    """Return the units whose experts' averages predict, and how much their experts replay."""
    return [("predicted", "no replay"), *((f"replay-{share:g}", f"replay {share:g}") for share in _REPLAYS)]


def rank_correlation(units: Units, forest: str, predictor: str, key: str = "predicted") -> float | None:
    """Return Spearman's correlation of the mean perplexity that a unit predicts with that of the trained mixtures.

    `key`: one of PREDICTIONS, of models that are trained on the mixtures, or of the averages by the
    law that is fitted to some of them.
    """
    trained, unit = _trained(units, forest), units.get(f"{forest}/{predictor}")
    if unit is None or len(trained) < 3:
        return None
    predicted = np.array([_mean(unit[key][number]) for number in trained])
    return spearman(predicted, np.array([_mean(one["perplexity"]) for one in trained.values()]))


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Return the rank correlation of two series without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def _trained(units: Units, forest: str) -> dict[int, Unit]:
    named = {number: units.get(f"{forest}/trained-{number}") for number in range(8)}
    return {number: unit for number, unit in named.items() if unit is not None}


def _ratio(units: Units, forest: str, other: str) -> float | None:
    pair = [units.get(f"{forest}/{name}") for name in ("recommended", other)]
    means = [_mean(unit["perplexity"]) for unit in pair if unit is not None]
    return means[0] / means[1] if len(means) == 2 else None


def _lowest_r2(unit: Unit | None) -> float | None:
    return None if unit is None else min(unit["r2"].values())


def _own(unit: Unit | None) -> float | None:
    return None if unit is None else _mean(unit["own"])


def _uniform(unit: Unit | None) -> float | None:
    return None if unit is None else unit["uniform"]


def _mean(by_domain: Mapping[str, float]) -> float:
    return float(np.mean(list(by_domain.values())))


def _text(value: float | None) -> str:
    return _NOT_MEASURED if value is None else f"{value:.3f}"


TABLES: dict[str, Callable[[], str]] = {"mixtures": mixtures}
