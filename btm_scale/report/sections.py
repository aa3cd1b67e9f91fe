"""The page's sections: a drawing each, and the sentences that say how to read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from btm_scale.config.run import RunConfig
from btm_scale.evaluate.results import Results
from btm_scale.forest.methods import ENSEMBLE, EXPERT, general_label, label, meaning
from btm_scale.report.chart_data import (
    FARTHEST,
    MARKS,
    Curves,
    compute_bars,
    expert_styles,
    nearness,
    ratio_rows,
    seed_end_share,
    training_curves,
    weight_text,
)
from btm_scale.report.charts import drawing, element, escape
from btm_scale.report.equivalence import equivalence_sentence
from btm_scale.report.heat_map import heat_map, shade_key
from btm_scale.report.html_table import method_table
from btm_scale.report.line_chart import line_chart
from btm_scale.report.plots import bar_chart, mark, ratio_chart
from btm_scale.report.summary import (
    NOTHING,
    count,
    lowest,
    mean,
    novel_domains,
    ordered_methods,
    perplexity,
    reference,
    training_domains,
    value,
)
from btm_scale.report.tree import is_worth_drawing, lineage_graph, run_tree
from btm_scale.run_dir import DENSE, SEED

WIDE, NARROW = 960, 350
_PRIOR_WORDS = {
    "cached": "Before the first token of a text, the ensemble weighs the experts by this prior",
    "updating": "The ensemble starts from this prior and updates it block by block",
    "uniform": "This run's ensemble starts from equal weights; its top k variants start from this prior",
}


def tree_figure(results: Results) -> str:
    """The run as a picture, for the head of the page."""
    styles = expert_styles(results)
    if not styles:
        return ""
    pictures = _for_both_widths(lambda w: run_tree(results, styles, width=w))
    words = element("figcaption", "Numbers are mean perplexities over the training domains.")
    return element("figure", pictures, words, class_="tree")


def results_section(results: Results) -> str:
    """The ratio chart, the table and what each method is."""
    to = reference(results)
    chart = ""
    if to is not None:
        name = "dense" if to == DENSE else "the seed LM"
        rows = ratio_rows(results, to)
        series = {s: m for s, m in MARKS.items() if any(s in row.ratios for row in rows)}
        title = f"Perplexity relative to {name}, by domain"
        pictures = _for_both_widths(lambda w: ratio_chart(rows, series, label(to), title=title, width=w))
        words = (
            f"Each mark is a method's perplexity divided by that of {name}, on the same text. "
            "Left of the line is better. The scale is logarithmic, so equal distances are equal factors. "
            f"Figures at the right are {name}'s own."
        )
        chart = _figure(title, _legend(series) + pictures, words) if rows else ""
    some_partial = any(
        (found := mean(results, method, domains)) is not None and found.partial
        for method in results.methods
        for domains in (training_domains(results), novel_domains(results))
    )
    notes = "Lower is better; the best of each column is bold. Means are arithmetic, over the training domains. "
    notes += "A dash means that the method was not evaluated there. "
    notes += (
        "* The mean is over those domains only that the method has; its ratio compares the same domains." * some_partial
    )
    table = method_table(results, "perplexity", "Perplexity by method and domain")
    bits = method_table(results, "bits_per_byte", "Bits per byte by method and domain")
    more = element(
        "details", element("summary", "The same in bits per byte, which do not depend on the tokenizer"), bits
    )
    meanings = {meaning(m): general_label(m) for m in ordered_methods(results)}
    glossary = "".join(
        element("div", element("dt", escape(name)), element("dd", escape(words)))
        for words, name in meanings.items()
        if words
    )
    return _section("Perplexity", chart, table, _note(notes), more, element("dl", glossary, class_="glossary"))


def experts_section(results: Results) -> str:
    """The expert x domain matrix."""
    models = [m for m in (SEED, DENSE) if m in results.methods]
    first_expert = len(models)
    models += [m for m in ordered_methods(results) if m.startswith(EXPERT)]
    if len(models) == first_expert:
        return ""
    training, novel = training_domains(results), novel_domains(results)
    domains = [*training, *novel]
    matrix = [[value(results, m, d) for d in domains] for m in models]
    bests = [lowest({str(i): row[j] for i, row in enumerate(matrix)}) for j in range(len(domains))]
    strong = {(int(i), j) for j, winners in enumerate(bests) for i in winners}
    own = {
        (i, domains.index(m.removeprefix(EXPERT))) for i, m in enumerate(models) if m.removeprefix(EXPERT) in domains
    }
    won = sum(cell in strong for cell in own)
    title = "Perplexity of every expert on every domain"
    draw = partial(
        heat_map,
        [label(m) for m in models],
        domains,
        [[NOTHING if number is None else perplexity(number) for number in row] for row in matrix],
        nearness(matrix),
        title=title,
        framed=own,
        strong=strong,
        gap_before_row=first_expert,
        gap_before_column=len(training) if novel else None,
    )
    words = (
        "Read down a column: perplexities of different domains don't compare, so the colour says "
        "how near a model comes to the best of its column. "
        "Outlined is each expert on the domain it was trained on. "
        f"In {won} of {count(len(own), 'domain')} the domain's own expert is the best single model."
    )
    scale = shade_key(f"{FARTHEST:g} times the best, or more", "best")
    return _section(
        "Experts and domains",
        _figure(title, scale + _for_both_widths(lambda w: _scroll(draw(width=w), title)), words),
    )


def curves_section(config: RunConfig, results: Results, curves: Curves) -> str:
    """Training losses over the one schedule that seed and branches share."""
    drawn, dropped = training_curves(config, curves, expert_styles(results))
    if not drawn:
        return ""
    seed_end = seed_end_share(config)
    title = "Training loss over the schedule"
    pictures = _for_both_widths(
        lambda w: line_chart(
            drawn,
            title=title,
            x_label="share of the schedule",
            y_label="loss (nats per token)",
            width=w,
            boundary=seed_end,
        )
    )
    words = (
        "The seed LM trains first, on all domains; where the line stands, experts and dense go on from its "
        "weights. An expert's loss jumps there, because from then on it reads its own domain only, which may "
        "be easier or harder than the mix. "
        "Lines are moving means over 6% of the steps, with the raw losses behind."
    )
    words += f" {count(dropped, 'step')} with a loss that is not a number could not be drawn." if dropped else ""
    return _section("Training", _figure(title, pictures, words))


def priors_section(config: RunConfig, results: Results) -> str:
    """The cached prior of every domain, as a matrix."""
    priors = results.priors
    domains = [d for d in results.domains if d in priors]
    names = list(dict.fromkeys(name for d in domains for name in priors[d]))
    if not names:
        return ""
    training = [d for d in domains if d in training_domains(results)]
    weights = [[priors[d].get(name) for d in domains] for name in names]
    title = "Prior weight of every expert, by domain"
    draw = partial(
        heat_map,
        names,
        domains,
        [[NOTHING if w is None else weight_text(w) for w in row] for row in weights],
        weights,
        title=title,
        framed={(names.index(d), j) for j, d in enumerate(domains) if d in names},
        gap_before_column=len(training) if len(training) < len(domains) else None,
    )
    own = [priors[d][d] for d in training if d in priors[d]]
    words = _PRIOR_WORDS[config.evaluate.prior] + (
        ": what the domain posterior came to on the domain's development text. The posterior average weighs "
        "parameters by it too. Each column sums to 1; a dot is less than 0.005. "
    )
    words += f"A domain's own expert gets {np.mean(own):.2f} of the weight on average." if own else ""
    return _section(
        "Who speaks for a domain",
        _figure(title, shade_key("0", "1") + _for_both_widths(lambda w: _scroll(draw(width=w), title)), words),
    )


def lineage_section(results: Results) -> str:
    """Who came from whom; empty where every expert branched from the seed LM."""
    lineage = results.lineage
    if not is_worth_drawing(lineage):
        return ""
    styles = expert_styles(results)
    pictures = _for_both_widths(lambda w: lineage_graph(lineage, styles, width=w))
    words = "A line goes from each parent to what began with it, as thick as the parent's weight."
    return _section("Lineage", _figure("Who came from whom", pictures, words))


def compute_section(results: Results) -> str:
    """Training compute, equal methods drawn as one bar."""
    if not results.compute:
        return ""
    bars = compute_bars(results)
    title = "Training compute by method"
    pictures = _for_both_widths(lambda w: bar_chart(bars, title=title, width=w))
    words = (
        "Floating-point operations of forward and backward passes over all training tokens. The light part "
        "is the seed LM's, which all share and which counts once. "
        "1 TFLOP is 10¹² operations, 1 PFLOP 10¹⁵, 1 EFLOP 10¹⁸."
    )
    sentences = [equivalence_sentence(results, method, label(method)) for method in (ENSEMBLE, "ensemble:tempered")]
    notes = [_note(sentence) for sentence in sentences if sentence]
    return _section("Compute", _figure(title, pictures, words), *notes)


def _for_both_widths(draw: Callable[[int], str]) -> str:
    # Drawn twice, because a wide drawing made small has letters that nobody can read on a phone.
    return element("div", draw(WIDE), class_="wide") + element("div", draw(NARROW), class_="narrow")


def _legend(series: Mapping[str, str]) -> str:
    keys = [
        element("li", drawing(16, 16, name, mark(shape, 8, 8)), element("span", escape(name)))
        for name, shape in series.items()
    ]
    return element("ul", *keys, class_="legend")


def _figure(title: str, body: str, words: str) -> str:
    return element("figure", element("h3", escape(title)), body, element("figcaption", escape(words)))


def _scroll(picture: str, title: str) -> str:
    return element("div", picture, class_="scroll", tabindex="0", role="region", aria_label=title)


def _note(words: str) -> str:
    return element("p", escape(words.strip()), class_="note")


def _section(title: str, *parts: str) -> str:
    return element("section", element("h2", escape(title)), *parts)
