"""report.html: one file that says what was run and what came of it. It loads nothing, and reads without JavaScript too.

Plotly and Jinja2 are imported when a page is rendered.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btm_scale import __version__
from btm_scale.config.run import RunConfig
from btm_scale.evaluate.mixture_record import MixtureRecord
from btm_scale.evaluate.results import Results
from btm_scale.report.palette import PALETTE
from btm_scale.report.passes import passes_text
from btm_scale.report.summary import count, experts, headline, novel_domains, shorten, tokens_text, training_domains
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import model_names, training_job
from btm_scale.train.metrics import read_metrics
from btm_scale.train.passes import passes_of_run
from btm_scale.util.files import make_directory, write_file
from btm_scale.util.terminal import printable

_LISTED = 12  # domains that are named at the head of the page

if TYPE_CHECKING:
    from jinja2 import Template

    from btm_scale.report.figures.curves import Curves
    from btm_scale.report.sections import Chart


def report(config: RunConfig, run: RunDir, results: Results) -> None:
    """Write the run's page."""
    curves = {model: read_metrics(run.metrics(model)) for model in model_names(config)}
    passes = passes_of_run(config, run)
    mixtures = MixtureRecord.find(run.mixture) or MixtureRecord()
    drawn = {model: curve for model, curve in curves.items() if curve}
    write_page(config, results, drawn, run.report, passes, mixtures)


def write_page(
    config: RunConfig,
    results: Results,
    curves: Curves,
    path: Path,
    passes: Mapping[str, float] | None = None,
    mixtures: MixtureRecord | None = None,
) -> None:
    """Write the page, complete or not at all. `curves`: each model's rows of metrics.jsonl."""
    make_directory(path.parent)
    write_file(path, render_page(config, results, curves, passes, mixtures).encode())


def render_page(
    config: RunConfig,
    results: Results,
    curves: Curves,
    passes: Mapping[str, float] | None = None,
    mixtures: MixtureRecord | None = None,
) -> str:
    """Return the page as HTML.

    `passes`: how often training passes over each domain's train split. `mixtures`: those of `btm-scale mixture`.
    """
    from plotly.offline import get_plotlyjs

    from btm_scale.report.sections import sections, tree

    scripts = {"page": _text("page.js"), "plotly": get_plotlyjs()}
    return _template().render(
        name=results.name or config.name,
        headline=headline(results),
        facts=facts(config, results, passes),
        tree=tree(results),
        sections=list(sections(config, results, curves, mixtures)),
        version=__version__,
        palette=PALETTE,
        style=_text("page.css"),
        scripts=scripts,
        # The browser runs these scripts and no other, whatever a name contains, and loads nothing.
        hashes=[base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts.values()],
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)

    environment = Environment(
        loader=PackageLoader("btm_scale.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure_json
    return environment.get_template("page.html.jinja")


def _figure_json(chart: Chart) -> Any:
    """The figure's data with its two layouts as JSON that may be in a script element: `<`, `>` and `&` are escaped."""
    from jinja2.utils import htmlsafe_json_dumps

    wide, narrow = chart.documents()
    whole = wide.to_dict() | {"narrow": narrow.layout.to_plotly_json()}
    return htmlsafe_json_dumps(whole, dumps=_json)


def _json(figure: Any, **settings: Any) -> str:
    from plotly.io.json import to_json_plotly

    return to_json_plotly(figure, engine="json")


def _text(name: str) -> str:
    return (files("btm_scale.report") / name).read_text(encoding="utf-8")


def facts(config: RunConfig, results: Results, passes: Mapping[str, float] | None = None) -> dict[str, str]:
    """What was run, in words."""
    budget, names = config.budget, experts(results)
    training, novel = training_domains(results), novel_domains(results)
    sizes = {domain.tokens for domain in results.domains.values()}
    each = f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes, default=0):,} to {max(sizes, default=0):,}"
    words = {
        "Model": _model_words(config),
        "Training budget": f"{budget.tokens:,} tokens in all, read in sequences of {budget.sequence_length:,}. "
        + _seed_words(config)
        + (f" The budget was raised from {budget.raised_from[0]:,} tokens." if budget.raised_from else ""),
        "Forest": _forest_words(config, names),
        "Domains": f"{_listed(training) or 'none'}."
        + (f" Novel, never trained on: {_listed(novel)}." if novel else ""),
        "Evaluation": f"{each} tokens of {config.evaluate.split} text per domain, the same for every method; "
        f"posterior over blocks of {budget.sequence_length:,} tokens, {config.evaluate.prior} prior.",
        "Random seed": f"{results.random_seed}, a single run: differences of a percent may be chance.",
    }
    words |= {"Passes over the train split": f"{passes_text(passes)}."} if passes else {}
    words |= {"Devices": _device_words(results)} if results.devices else {}
    return words | ({"Notes": " ".join(results.notes)} if results.notes else {})


def _device_words(results: Results) -> str:
    ran = results.devices.values()
    trained, scored, kernels = (
        _listed(sorted({value for one in ran if (value := getattr(one, name))})) or "unknown devices"
        for name in ("trained", "scored", "kernels")
    )
    return f"Trained on {trained}; scored on {scored} with {kernels} kernels."


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(shorten(name, 40) for name in names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _seed_words(config: RunConfig) -> str:
    budget = config.budget
    if not budget.seed_steps:
        kept = "the pretrained model, unchanged" if config.model.pretrained is not None else "a random initialization"
        return f"The seed LM took none of these tokens: it is {kept}."
    return (
        f"The seed LM took {tokens_text(budget.seed_steps * budget.batch_tokens)} of these tokens "
        f"in {count(budget.seed_steps, 'step')}."
    )


def _forest_words(config: RunConfig, names: Sequence[str]) -> str:
    said = f"{count(len(names), 'expert')} branched from the seed LM"
    # An expert that was added to the forest was trained elsewhere.
    if names and all(name in config.expert_domains and not training_job(config, name).steps for name in names):
        return f"{said} without a training step, as copies of it."
    return f"{said} and trained without communication."


def _model_words(config: RunConfig) -> str:
    vocabulary = config.tokenizer.vocab_size if config.tokenizer.path is None else 1
    shape = config.model.shape(vocabulary, config.budget.sequence_length)
    words = f"{shape.family} family, {count(shape.layers, 'layer')}, hidden size {shape.hidden:,}, "
    words += count(shape.heads, "head")
    if config.model.preset:
        words = f"{config.model.preset}: {words}"
    if config.tokenizer.path is None:
        words += f", {shape.vocabulary:,} tokens in the vocabulary, {tokens_text(shape.parameters)} parameters"
    return words + "."
