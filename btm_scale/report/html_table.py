"""The page's table: methods down by kind, domains across; every number carries its full value."""

from __future__ import annotations

from btm_scale.evaluate.results import Measure, Results
from btm_scale.forest.methods import KINDS, kind, label, meaning
from btm_scale.report.charts import element, escape, shorten
from btm_scale.report.plots import ratio_bar
from btm_scale.report.summary import (
    NOTHING,
    Mean,
    lowest,
    lowest_means,
    mean,
    novel_domains,
    ordered_methods,
    perplexity,
    ratio,
    reference,
    share_text,
    training_domains,
    value,
)

_LONGEST_NAME = 24


def method_table(results: Results, measure: Measure, caption: str) -> str:
    """Means, the ratio to the reference and every domain's figure; the best of each column is bold."""
    training, novel = training_domains(results), novel_domains(results)
    rows, previous = [], None
    best = {d: lowest({m: value(results, m, d, measure) for m in results.methods}) for d in [*training, *novel]}
    best_mean = {
        "training": lowest_means(results, training, measure),
        "novel": lowest_means(results, novel, measure),
    }
    for method in ordered_methods(results):
        if kind(method) != previous:
            previous = kind(method)
            heading = element("th", escape(KINDS[previous]), colspan=99, scope="rowgroup")
            rows.append(element("tr", heading, class_="kind"))
        shown = escape(shorten(label(method), _LONGEST_NAME))
        name = element("th", shown, scope="row", title=meaning(method) or label(method))
        cells = [
            name,
            _mean_cell(mean(results, method, training, measure), method in best_mean["training"], "mean"),
        ]
        cells += _ratio_cell(results, method, measure)
        cells += [_cell(value(results, method, d, measure), method in best[d]) for d in training]
        if novel:
            cells.append(_mean_cell(mean(results, method, novel, measure), method in best_mean["novel"], "mean novel"))
            cells += [_cell(value(results, method, d, measure), method in best[d], "novel") for d in novel]
        css = "headline" if method == "ensemble" else None
        rows.append(element("tr", *cells, data_method=method, class_=css))
    words = element("caption", escape(caption))
    roomy = "roomy" if len(training) + len(novel) <= 6 else None
    table = element("table", words, element("thead", _heading(results)), element("tbody", *rows), class_=roomy)
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _heading(results: Results) -> str:
    training, novel = training_domains(results), novel_domains(results)
    upright = len(training) + len(novel) <= 6 and all(len(name) <= 12 for name in (*training, *novel))
    to = reference(results)

    def column(name: str, css: str = "") -> str:
        turned = "" if upright else " turned"
        return element(
            "th",
            element("span", escape(shorten(name, _LONGEST_NAME))),
            scope="col",
            class_=(css + turned).strip() or None,
            title=name,
        )

    cells = [element("th", "Method", scope="col"), element("th", "Mean", scope="col", class_="mean")]
    if to:
        cells.append(element("th", f"÷ {escape(to)}", scope="col", class_="ratio"))
    cells += [column(name) for name in training]
    if novel:
        cells.append(element("th", "Novel<br>mean", scope="col", class_="mean novel"))
        cells += [column(name, "novel") for name in novel]
    return element("tr", *cells)


def _ratio_cell(results: Results, method: str, measure: Measure) -> list[str]:
    to = reference(results)
    if to is None:
        return []
    against = ratio(results, method, to, training_domains(results), measure)
    if against is None:
        return [element("td", NOTHING, class_="ratio")]
    bar = ratio_bar(against.value) if method != to else ""
    number = element("data", share_text(against.value), value=repr(against.value))
    return [element("td", bar, number, "*" * against.partial, class_="ratio")]


def _mean_cell(found: Mean | None, best: bool, css: str) -> str:
    if found is None:
        return element("td", NOTHING, class_=css)
    number = element("data", perplexity(found.value), value=repr(found.value))
    star = element("abbr", "*", title=f"over {found.domains} domains only") if found.partial else ""
    return element("td", element("b", number) if best else number, star, class_=css)


def _cell(number: float | None, best: bool, css: str | None = None) -> str:
    if number is None:
        return element("td", NOTHING, class_=css)
    shown = element("data", perplexity(number), value=repr(number))
    return element("td", element("b", shown) if best else shown, class_=css)
