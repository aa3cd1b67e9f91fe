"""report.html: one file that says what was run and what came of it; it fetches and executes nothing."""

from __future__ import annotations

from pathlib import Path

from btm_scale import __version__
from btm_scale.config.run import RunConfig
from btm_scale.evaluate.results import Results
from btm_scale.forest.methods import EXPERT
from btm_scale.report.chart_data import Curves, tokens_text
from btm_scale.report.charts import element, escape, shorten
from btm_scale.report.look import STYLE
from btm_scale.report.sections import (
    compute_section,
    curves_section,
    experts_section,
    lineage_section,
    priors_section,
    results_section,
    tree_figure,
)
from btm_scale.report.summary import count, headline, novel_domains, training_domains
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import model_names
from btm_scale.train.metrics import read_metrics
from btm_scale.util.files import make_directory, write_file


def write_page(config: RunConfig, results: Results, curves: Curves, path: Path) -> None:
    """Write the page, complete or not at all. `curves`: each model's lines of metrics.jsonl."""
    make_directory(path.parent)
    # Text from a broken encoding may hold lone surrogates, which UTF-8 cannot.
    write_file(path, render_page(config, results, curves).encode("utf-8", "replace"))


def render_page(config: RunConfig, results: Results, curves: Curves) -> str:
    """The page as HTML."""
    name = results.name or config.name
    head = element(
        "head",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        element("title", escape(f"{name}: Branch-Train-Merge report")),
        f"<style>{STYLE}</style>",
    )
    header = element(
        "header",
        element("p", "Branch-Train-Merge report", class_="eyebrow"),
        element("h1", escape(name)),
        element("p", escape(headline(results)), class_="lead"),
        tree_figure(results),
        element("dl", *(_fact(term, words) for term, words in facts(config, results).items()), class_="facts"),
    )
    main = element(
        "main",
        results_section(results),
        experts_section(results),
        lineage_section(results),
        curves_section(config, results, curves),
        priors_section(config, results),
        compute_section(results),
    )
    footer = element("footer", escape(_provenance()))
    return f"<!doctype html>\n{element('html', head, element('body', header, main, footer), lang='en')}\n"


def facts(config: RunConfig, results: Results) -> dict[str, str]:
    """What was run, in words."""
    budget, training, novel = config.budget, training_domains(results), novel_domains(results)
    training, novel = ([shorten(name, 40) for name in names] for names in (training, novel))
    experts = sum(method.startswith(EXPERT) for method in results.methods)
    steps = (
        f"The seed LM took {tokens_text(budget.seed_steps * budget.batch_tokens)} of these tokens "
        f"in {count(budget.seed_steps, 'step')}"
    )
    sizes = {domain.tokens for domain in results.domains.values()}
    each = f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes, default=0):,} to {max(sizes, default=0):,}"
    found = {
        "Model": _model_words(config),
        "Training budget": (
            f"{budget.tokens:,} tokens in all, read in sequences of {budget.sequence_length:,}. {steps}."
        ),
        "Forest": (f"{count(experts, 'expert')} branched from the seed LM, and trained without communication."),
        "Domains": f"{', '.join(training) or 'none'}."
        + (f" Novel, never trained on: {', '.join(novel)}." if novel else ""),
    }
    found["Evaluation"] = (
        f"{each} tokens of {config.evaluate.split} text a domain, the same for every method; "
        f"posterior over blocks of {budget.sequence_length:,} tokens, {config.evaluate.prior} prior."
    )
    found["Random seed"] = f"{results.random_seed}, a single run: differences of a percent may be chance."
    if results.notes:
        found["Notes"] = " ".join(results.notes)
    return found


def _model_words(config: RunConfig) -> str:
    shape = config.model.shape(config.tokenizer.vocab_size, config.budget.sequence_length)
    words = f"{shape.family} family, {count(shape.layers, 'layer')}, hidden size {shape.hidden:,}, "
    words += count(shape.heads, "head")
    if config.model.preset:
        words = f"{config.model.preset}: {words}"
    if config.tokenizer.path is None:
        words += f", {shape.vocabulary:,} tokens in the vocabulary, {tokens_text(shape.parameters)} parameters"
    return words + "."


def _provenance() -> str:
    return (
        f"Made by btm-scale {__version__} from the run's evaluation/results.json and train/*/metrics.jsonl. "
        "Method: Li et al., Branch-Train-Merge, arXiv 2208.03306."
    )


def _fact(term: str, words: str) -> str:
    return element("div", element("dt", escape(term)), element("dd", escape(words)))


def report(config: RunConfig, run: RunDir, results: Results) -> None:
    """Draw the page."""
    curves = {model: read_metrics(run.metrics(model)) for model in model_names(config)}
    write_page(config, results, {model: curve for model, curve in curves.items() if curve}, run.report)
