"""The tables of docs/moe.md, from benchmarks/results/moe.json. A unit that is not measured yet is a dash."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import numpy as np
from doc_tables import _read, _table
from environment import environments_of, measured_on

from btm_scale.config.moe import MoeConfig

_NOT_MEASURED = "-"
_ABSENT = "Not measured yet: `python benchmarks/moe.py` takes the measurements."
_ROUTERS: tuple[str, ...] = get_args(MoeConfig.model_fields["router"].annotation)
_SHARES = (0.05, 0.1, 0.2, 0.4)
_METHODS = {
    "seed": "seed LM",
    "own": "own expert",
    "ensemble": "`ensemble`",
    "ensemble:tempered": "`ensemble:tempered`",
    "ensemble:top2": "`ensemble:top2`",
    "average:uniform": "`average:uniform`",
    "average:posterior": "`average:posterior`",
}
_UPCYCLED = {
    "averaged": "complete experts, the rest averaged",
    "shared": "experts of MLPs alone, the rest copied",
    "averaged_fitted": "complete experts, router `fitted` to sums that exist",
    "shared_fitted": "experts of MLPs alone, router `fitted` to sums that exist",
    "averaged_anew": "complete experts, without kept hashes",
    "shared_anew": "experts of MLPs alone, without kept hashes",
}

Units = Mapping[str, Mapping[str, Any]]
ByDomain = Mapping[str, float]


def routers() -> str:
    """Mean perplexity of a mixture of complete experts that is not trained, by router and forest."""
    units: Units = _document()["units"]
    names = _forests(units, "router-")
    if not names:
        return _ABSENT
    means = {router: [_mean(_perplexity(units, name, f"router-{router}")) for name in names] for router in _ROUTERS}
    rows = [["router", *names]]
    rows += [[f"`{router}`", *(_text(value, ".2f") for value in values)] for router, values in means.items()]
    rows.append(["**best of `embedding`, `hidden`, `random` / `fitted`**"])
    for place in range(len(names)):
        others = [means[router][place] for router in ("embedding", "hidden", "random")]
        rows[-1].append(_text(_ratio(min(filter(None, others), default=None), means["fitted"][place])))
    return f"{_table(rows)}\n\n{_source('router-')}"


def recipes() -> str:
    """Mean perplexity over that of the dense baseline, by recipe and forest."""
    units: Units = _document()["units"]
    names = _forests(units, "forest")
    if not names:
        return _ABSENT
    rows = [["mean perplexity / dense's", *names]]
    for label, recipe, method in _rows():
        values = []
        for name in names:
            dense = _mean(_perplexity(units, name, "forest", "dense"))
            values.append(_ratio(_mean(_perplexity(units, name, recipe, method)), dense))
        rows.append([label, *map(_text, values)])
    for router, recipe in (("fitted", "mlps"), ("fitted-routed", "mlps-routed")):
        kept = [_text(_gain_kept(units, name, recipe), ".2f") for name in names]
        rows.append([f"**MLPs alone: gain over the seed LM that `moe` keeps, router `{router}`**", *kept])
    return f"{_table(rows)}\n\nThe gain is in nats per token, as a fraction of that of the own experts. {_source('')}"


def upcycling() -> str:
    """Time and memory of upcycling, beside a copy of the bytes that it writes."""
    unit = _document()["units"].get("upcycle")
    if unit is None:
        return _ABSENT
    cores, written = unit["environment"]["hardware"]["cores"], unit["averaged"]["bytes_written"] / 1e9
    copies = {
        "copy": "a copy, by one process",
        "hashed_copy": f"a copy that is hashed, by {cores} processes",
        "direct_copy": f"a copy directly to the disk, by {cores} threads",
    }

    def row(label: str, seconds: float, memory: str) -> list[str]:
        ratios = (f"{seconds / unit[f'{copy}_seconds']:.2f}" for copy in copies)
        return [label, f"{seconds:.1f} s", *ratios, memory]

    head = f"eight models of {unit['bytes_per_model'] / 1e9:.2f} GB, {written:.2f} GB written"
    rows = [[head, "time", "/ copy", "/ hashed copy", "/ direct copy", "memory"]]
    for key, label in _UPCYCLED.items():
        rows.append(row(label, unit[key]["seconds"], f"{unit[key]['anonymous_bytes'] / 2**30:.2f} GiB"))
    rows += [row(label, unit[f"{copy}_seconds"], "-") for copy, label in copies.items()]
    return f"{_table(rows)}\n\n{measured_on([unit['environment']])}."


TABLES: dict[str, Callable[[], str]] = {"moe_routers": routers, "moe_recipes": recipes, "moe_upcycling": upcycling}


def _rows() -> Iterator[tuple[str, str, str]]:
    """Yield label, unit and method of each row."""
    yield from ((label, "forest", method) for method, label in _METHODS.items())
    yield "`moe`, router `fitted-routed`, not trained", "router-fitted-routed", "moe"
    for share in _SHARES:
        yield f"`moe`, router `fitted-routed`, {share:.0%} more tokens", f"joint-{share:g}", "moe"
        yield f"dense, {share:.0%} more tokens", "dense", f"dense-{1 + share:g}x"
    for method in ("own", "ensemble", "ensemble:tempered"):
        yield f"MLPs alone: {_METHODS[method]}", "mlps", method
    yield "MLPs alone: `moe`, router `fitted`, not trained", "mlps", "moe"
    yield "MLPs alone: `moe`, router `fitted-routed`, not trained", "mlps-routed", "moe"


def _document() -> dict[str, Any]:
    try:
        return _read("moe")
    except FileNotFoundError:
        return {"units": {}}


def _forests(units: Units, recipe: str) -> list[str]:
    """Return the forests with a unit whose recipe begins so."""
    named = [name.partition("/") for name in units]
    return sorted({forest for forest, _, one in named if one.startswith(recipe)})


def _perplexity(units: Units, forest: str, recipe: str, method: str = "moe") -> ByDomain | None:
    unit = units.get(f"{forest}/{recipe}")
    return None if unit is None else unit["perplexity"].get(method)


def _gain_kept(units: Units, forest: str, recipe: str) -> float | None:
    seed, own = (_perplexity(units, forest, "mlps", method) for method in ("seed", "own"))
    moe = _perplexity(units, forest, recipe)
    if seed is None or own is None or moe is None:
        return None
    kept, gain = (sum(np.log(seed[domain] / other[domain]) for domain in seed) for other in (moe, own))
    return float(kept / gain)


def _mean(by_domain: ByDomain | None) -> float | None:
    return None if by_domain is None else float(np.mean(list(by_domain.values())))


def _ratio(value: float | None, to: float | None) -> float | None:
    return None if value is None or to is None else value / to


def _text(value: float | None, form: str = ".3f") -> str:
    return _NOT_MEASURED if value is None else format(value, form)


def _source(recipe: str) -> str:
    """Return where and when the units of forests were measured whose recipe begins so."""
    document = _document()
    units = {name: unit for name, unit in document["units"].items() if name.partition("/")[2].startswith(recipe)}
    units.pop("upcycle", None)
    return f"{measured_on(environments_of({**document, 'units': units}))}."
