"""The page's sections: figures with their tables, and the sentences that say what came out and how to read it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import plotly.graph_objects as go

from btm_scale.config.run import RunConfig
from btm_scale.evaluate.mixture_record import ChosenMixture, CriticalReplay, MixtureRecord
from btm_scale.evaluate.results import Results
from btm_scale.forest.methods import ENSEMBLE, general_label, label, meaning
from btm_scale.report import figures
from btm_scale.report.equivalence import equivalence_sentence
from btm_scale.report.figures.compute import compute_bars
from btm_scale.report.figures.curves import MOST_BESIDE, Curves, schedule_curves, seed_end
from btm_scale.report.figures.matrices import (
    perplexity_matrix,
    routing_entropies,
    routing_matrix,
    smallest_width,
    weight_matrix,
)
from btm_scale.report.figures.ratios import ratio_rows
from btm_scale.report.figures.style import NARROW, WIDE
from btm_scale.report.figures.trees import is_worth_drawing
from btm_scale.report.mixture_table import domain_weights, prediction_rows, text_notes, trust
from btm_scale.report.replay_table import COLUMNS, replay_rows, replay_sentences
from btm_scale.report.summary import (
    count,
    experts,
    flops_text,
    is_same,
    mean,
    moe_sentence,
    novel_domains,
    ordered_methods,
    perplexity,
    reference,
    tokens_text,
    training_domains,
)
from btm_scale.report.tables import Table, method_table, plain_table
from btm_scale.run_dir import DENSE, SEED

Draw = Callable[..., go.Figure]
_IN_TREE = {"seed LM": SEED, "dense": DENSE, "ensemble": ENSEMBLE}
_PRIOR_WORDS = {
    "cached": "Before the first token of a text, the ensemble weighs the experts by this prior",
    "static": "This run's ensemble starts from the static prior; its top k variants start from this one",
    "updating": "The ensemble starts from this prior and updates it block by block",
    "uniform": "This run's ensemble starts from equal weights; its top k variants start from this prior",
}


@dataclass(frozen=True)
class Chart:
    """A figure with its caption, and the same numbers as a table for readers without JavaScript."""

    name: str  # of the PNG that a reader saves
    title: str
    draw: Draw
    words: str
    table: Table | None = None
    smallest: int = 0  # pixels; on a narrower page it scrolls
    hint: str = ""  # what one can do with it

    def documents(self) -> tuple[go.Figure, go.Figure]:
        """Return the figure for a wide page and for a phone. They differ in the layout only."""
        return self.draw(width=WIDE), self.draw(width=NARROW)


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    title: str
    chart: Chart | None = None
    notes: Sequence[str] = ()
    table: Table | None = None
    more: Table | None = None  # folded
    glossary: Mapping[str, str] = field(default_factory=dict)


def sections(
    config: RunConfig, results: Results, curves: Curves, mixtures: MixtureRecord | None = None
) -> Iterator[Section]:
    """Return the sections that the run has data for. `mixtures`: those of `btm-scale mixture`."""
    yield _results(results)
    if experts(results):
        yield _experts(results)
    if is_worth_drawing(results.lineage):
        yield _lineage(results)
    if schedule_curves(config, curves):
        yield _training(config, results, curves)
    if any(results.priors.values()):
        yield _priors(config, results)
    if results.routing:
        yield _routing(results)
    if mixtures is not None and mixtures.chosen is not None:
        yield _mixture(mixtures.chosen)
    if mixtures is not None and mixtures.replay is not None:
        yield _replay(mixtures.replay)
    if results.compute:
        yield _compute(results)


def tree(results: Results) -> Chart | None:
    """Return the run as a picture, for the head of the page."""
    if not experts(results):
        return None
    title = f"The seed LM branches into {count(len(experts(results)), 'expert')}, which are merged into an ensemble"
    means = {name: mean(results, method, training_domains(results)) for name, method in _IN_TREE.items()}
    numbers = [
        f"{name} {perplexity(over.value)}" for name, over in means.items() if over is not None and not over.partial
    ]
    words = f"Mean perplexity over the training domains: {', '.join(numbers)}." if numbers else ""
    return Chart("forest", title, partial(figures.forest, results), words)


def _results(results: Results) -> Section:
    some_partial = any(
        (over := mean(results, method, domains)) is not None and over.partial
        for method in results.methods
        for domains in (training_domains(results), novel_domains(results))
    )
    notes = "Lower is better; the best of each column is bold. Means are arithmetic, over the training domains. "
    notes += "A dash means that the method was not evaluated there. "
    notes += "* The mean is over those domains only that the method has; its ratio compares the same domains."
    return Section(
        "Perplexity",
        _ratios(results),
        [notes if some_partial else notes.partition(" *")[0], *filter(None, [moe_sentence(results)])],
        method_table(results, "perplexity", "Perplexity by method and domain"),
        method_table(results, "bits_per_byte", "Bits per byte by method and domain"),
        {general_label(method): meaning(method) for method in ordered_methods(results) if meaning(method)},
    )


def _ratios(results: Results) -> Chart | None:
    to = reference(results)
    rows = [] if to is None else ratio_rows(results, to)
    if not rows:
        return None
    name = "dense" if to == DENSE else "the seed LM"
    ours = [row.ratios["Ensemble"] for row in rows if "Ensemble" in row.ratios and not row.is_mean]
    better = sum(r < 1 and not is_same(r) for r in ours)
    words = f"The ensemble is better than {name} on {better} of {count(len(ours), 'domain')}. "
    words = (words if ours else "") + (
        f"Each mark is a method's perplexity divided by that of {name}, on the same text. "
        "Left of the line is better. The scale is logarithmic, so equal distances are equal factors. "
        f"Numbers at the right are {name}'s own."
    )
    title = f"Perplexity relative to {name}, by domain"
    hint = "Click a name in the legend to hide its marks; drag to zoom, double-click to zoom out."
    return Chart("ratios", title, partial(figures.perplexity_ratios, results), words, hint=hint)


def _experts(results: Results) -> Section:
    matrix = perplexity_matrix(results)
    bests = Counter(column for _, column in matrix.best)
    own = [bests[column] for _, column in matrix.own & matrix.best]
    equal = sum(number > 1 for number in own)
    words = (
        f"In {len(own) - equal} of {count(len(matrix.own), 'domain')} the domain's own expert is the best single model"
        + (f", and in {equal} another model is as good. " if equal else ". ")
        + "Read down a column: perplexities of different domains don't compare, so the colour says "
        "how near a model comes to the best of its column. "
        "Outlined is each expert on the domain it was trained on; the best of a column is bold. "
        "The numbers are also in the table of perplexities, under each expert alone."
    )
    title = "Perplexity of every expert on every domain"
    draw = partial(figures.expert_matrix, results)
    return Section("Experts and domains", Chart("experts", title, draw, words, smallest=smallest_width(matrix)))


def _training(config: RunConfig, results: Results, curves: Curves) -> Section:
    placed = {curve.name: curve for curve in schedule_curves(config, curves)}
    rows, ends = [], {}
    for name in [*(n for n in (SEED, DENSE) if n in placed), *sorted(placed.keys() - {SEED, DENSE})]:
        curve = placed[name]
        smooth = curve.smooth
        ends[name] = float(smooth[-1])
        rows.append((name, [f"{curve.step[-1]:,}", f"{smooth[0]:.3f}", f"{smooth[-1]:.3f}"]))
    said = [f"{said} at {ends[name]:.2f}" for name, said in ((SEED, "the seed LM"), (DENSE, "dense")) if name in ends]
    own = [ends[name] for name in experts(results) if name in ends]
    if own:
        said.append(f"the experts between {min(own):.2f} and {max(own):.2f}")
    words = f"Losses in nats per token end for {', '.join(said)}. " if said else ""
    end = seed_end(config)
    if 0 < end < 1:
        words += (
            "The seed LM trains first, on all domains; at the dashed line, experts and dense resume from its "
            "weights. An expert's loss jumps there, because from then on it reads its own domain only, which may "
            "be easier or harder than the mix. "
        )
    else:
        words += "The seed LM takes no step. " if end == 0 else "The seed LM takes every step of the schedule. "
        words += "An expert with its own `tokens` has a separate schedule. " if end == 1 and own else ""
    words += "Lines are moving means over 6% of the steps"
    words += ", with the raw losses behind." if len(placed) <= MOST_BESIDE else "."
    dropped = sum(len(curves[name]) - len(curve.loss) for name, curve in placed.items())
    words += f" {count(dropped, 'step')} with a loss that is not a number could not be drawn." if dropped else ""
    title = "Training loss over the schedule"
    table = plain_table("Training loss by model, in nats per token", ["Model", "Steps", "First", "Last"], rows)
    hint = "Click a name to hide its curve, double-click to see it alone; drag to zoom, double-click to zoom out."
    draw = partial(figures.training_loss, config, results, curves)
    return Section("Training", Chart("training-loss", title, draw, words, table, hint=hint))


def _priors(config: RunConfig, results: Results) -> Section:
    matrix = weight_matrix(results)
    own = [results.priors[d][d] for d in training_domains(results) if d in results.priors.get(d, {})]
    words = f"A domain's own expert gets {sum(own) / len(own):.2f} of the weight on average. " if own else ""
    words += _PRIOR_WORDS[config.evaluate.prior] + (
        ": what the domain posterior came to on the domain's development text. The posterior average weighs "
        "parameters by it too. Each column sums to 1; a dot is less than 0.005."
    )
    title = "Prior weight of every expert, by domain"
    table = plain_table(title, ["Expert", *matrix.columns], list(zip(matrix.rows, matrix.texts(), strict=True)))
    draw = partial(figures.prior_matrix, results)
    return Section("Who speaks for a domain", Chart("priors", title, draw, words, table, smallest_width(matrix)))


def _routing(results: Results) -> Section:
    matrix = routing_matrix(results)
    own = [matrix.values[i][j] or 0.0 for i, j in matrix.own]
    words = f"The domain's own expert has {sum(own) / len(own):.2f} of the uses on average. " if own else ""
    words += (
        "How often the mixture of experts uses each expert on a domain's text, layer by layer. A column is a domain "
        "and a layer, and sums to 1."
    )
    rows = list(zip(matrix.rows, matrix.texts(), strict=True))
    if entropies := routing_entropies(results):
        words += (
            f" The routers' mean entropy is {sum(entropies) / len(entropies):.2f} nats; it would be "
            f"{math.log(len(matrix.rows)):.2f} if all experts were equally probable."
        )
        rows.append(("Router entropy, nats", [f"{entropy:.2f}" for entropy in entropies]))
    title = "Experts that compute a domain's tokens, by layer"
    table = plain_table(title, ["Expert", *matrix.columns], rows)
    draw = partial(figures.routing_map, results)
    return Section("Routing of the mixture", Chart("routing", title, draw, words, table, smallest_width(matrix)))


def _mixture(chosen: ChosenMixture) -> Section:
    targets = ", ".join(chosen.targets)
    is_trained = chosen.mean.trained is not None  # not without a seed LM, nor in older files
    words = f"The mixture with the lowest predicted mean perplexity on {targets}"
    words += ", of a model that is trained on it" if is_trained else ", of the average"
    words += "".join(
        f", keeping the average's on {name} within {ratio:g} times the seed LM's" for name, ratio in chosen.keep.items()
    )
    words += (
        ". Each dot is a weighted average of the experts and the seed LM on one text: its measured perplexity (y) and "
        "the one that the text's law predicts, fitted to all other averages (x). On the dotted line, both are equal. "
        "A star is the average with the chosen weights, with its 95% interval."
    )
    words += " The table also has the predicted perplexity of a trained model." if is_trained else ""
    title = "Perplexity of weighted averages, measured and predicted"
    columns = ["Text", "Seed LM", "Uniform average", "Chosen average", "95%", "Trained", "Law", "R\u00b2"]
    table = plain_table("Predicted perplexity of the chosen mixture", columns, prediction_rows(chosen))
    hint = "Click a name in the legend to hide its marks; drag to zoom, double-click to zoom out."
    chart = Chart("mixture", title, partial(figures.mixture_fit, chosen), words, table, hint=hint)
    weights = domain_weights(chosen)
    pasted = ", ".join(f"{name}: {{weight: {weight}}}" for name, weight in weights.items())
    notes = [*trust(chosen), *text_notes(chosen)]
    notes += [f"In the YAML of a run: domains: {{{pasted}}}"] if weights else []
    rows = [(name, [f"{weight:.3f}"]) for name, weight in chosen.weights.items()]
    return Section("Data mixture", chart, notes, plain_table("Weights of the models", ["Model", "Weight"], rows))


def _replay(critical: CriticalReplay) -> Section:
    columns = [name.capitalize() for name in (*COLUMNS, *critical.perplexity)]
    title = f"Perplexity over the seed LM's, by the share of other text of {critical.target}"
    return Section("Replay", notes=replay_sentences(critical), table=plain_table(title, columns, replay_rows(critical)))


def _lineage(results: Results) -> Section:
    children = {name: parents for name, parents in results.lineage.items() if parents}
    others = sum(set(parents) != {SEED} for parents in children.values())
    words = f"{others} of {count(len(children), 'expert')} began with weights of other experts. "
    words += "A line goes from each parent to what began with it, as thick as the parent's weight."
    rows = [
        (name, [", ".join(f"{p} {weight:.0%}" for p, weight in parents.items())]) for name, parents in children.items()
    ]
    table = plain_table("Parents of every expert", ["Expert", "Parents and weights"], rows)
    return Section("Lineage", Chart("lineage", "Who came from whom", partial(figures.lineage, results), words, table))


def _compute(results: Results) -> Section:
    bars = compute_bars(results)
    words = (
        "Floating-point operations of forward and backward passes over all training tokens. The light part "
        "is the seed LM's, which all share and which counts once. "
        "1 TFLOP is 10\u00b9\u00b2 operations, 1 PFLOP 10\u00b9\u2075, 1 EFLOP 10\u00b9\u2078."
    )
    ours, dense = results.compute.get(ENSEMBLE), results.compute.get(DENSE)
    if ours is not None and dense is not None and dense.flops:
        share = ours.flops / dense.flops
        took = "as much compute as" if 0.98 < share < 1.02 else f"{share:.3g} times the compute of"
        words = f"The ensemble took {took} dense. {words}"
    rows = [(bar.name, [flops_text(bar.flops), f"{tokens_text(bar.tokens)} tokens"]) for bar in bars]
    table = plain_table("Training compute by method", ["Method", "Compute", "Tokens"], rows)
    sentences = (equivalence_sentence(results, method, label(method)) for method in (ENSEMBLE, "ensemble:tempered"))
    chart = Chart("compute", "Training compute by method", partial(figures.compute, results), words, table)
    return Section("Compute", chart, [sentence for sentence in sentences if sentence])
