"""What `btm-scale mixture --replay` prints, and the page's table of it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from btm_scale.evaluate.mixture_record import CriticalReplay, ReplayedRun
from btm_scale.report.fitting import first_fitting
from btm_scale.report.summary import shorten
from btm_scale.util.terminal import printable

_LONGEST_NAMES = (200, 40, 24, 16, 10)
COLUMNS = ("run", "other text", "replay", "tokens")


def print_replay(critical: CriticalReplay, console: Console) -> None:
    """Print the measured runs, and the critical share."""
    console.print(first_fitting(_replay_table(critical, longest) for longest in _LONGEST_NAMES))
    for sentence in replay_sentences(critical):
        console.print(printable(sentence), markup=False, highlight=False, soft_wrap=True)


def _replay_table(critical: CriticalReplay, longest: int) -> Table:
    """Return the table with names of at most this many characters, so that no number is cut."""
    table = Table(title="Perplexity over the seed LM's", title_justify="left", box=None, pad_edge=False)
    for name in (*COLUMNS, *(shorten(printable(text), longest) for text in critical.perplexity)):
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for name, row in replay_rows(critical):
        table.add_row(Text(shorten(printable(name), longest)), *row)
    return table


def replay_rows(critical: CriticalReplay) -> list[tuple[str, list[str]]]:
    """Return a row per run, with each text's ratio to the seed LM's; then the prediction at the critical share."""
    texts = list(critical.perplexity)
    rows = [
        (one.run, [*_text_of(one), *(f"{one.perplexity[text]:.3f}" for text in texts)]) for one in critical.measured
    ]
    predicted = [f"{critical.perplexity[text]:.3f}" for text in texts]
    return [*rows, ("predicted", [*_text_of(critical), *predicted])]


def _text_of(one: ReplayedRun | CriticalReplay) -> list[str]:
    return [f"{one.share:.3f}", f"{one.replay:.3f}", f"{one.tokens:,}"]


def replay_sentences(critical: CriticalReplay) -> list[str]:
    """Return the result in sentences, with how far it can be trusted."""
    low, high = critical.range
    limits = " and ".join(f"{name} within {ratio:g} times" for name, ratio in critical.keep.items())
    sentences = [
        f"With {critical.share:.3f} of its text from other domains, '{critical.target}' is predicted to keep {limits} "
        f"the seed LM's perplexity: at most {critical.ratio:.3f} of its training text may be its own (critical mixture "
        "ratio).",
        f"It needs experts.{critical.target}.branch.replay: {critical.replay:.3f}, with the same parents.",
        f"Without each run in turn, the share is {low:.3f} to {high:.3f}.",
    ]
    if critical.is_smallest:
        sentences.append("It is the smallest share of the runs, so less may do. Train with less to find out.")
    if critical.extrapolated:
        sentences.append(f"This extrapolates: no run trained on as few or as many as {critical.tokens:,} tokens.")
    if poor := [name for name, fit in critical.fit.items() if fit.r2 < 0.9]:
        sentences.append(f"No law predicts {', '.join(poor)} well (R2 below 0.9). Add runs with other shares.")
    laws = ", ".join(f"{name} {fit.law} (R2 {fit.r2:.3f})" for name, fit in critical.fit.items())
    return [*sentences, f"Laws: {laws}."]
