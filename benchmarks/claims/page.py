"""docs/claims.md: every claim with its figures, verdict and command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from environment import environments_of, measured_on

from claims import earlier, trained
from claims.claim import HOLDS, IN_PART, NOT_HERE, NOT_MEASURED, UNDECIDED, Claim, Evidence, Figure, Judged, judged
from claims.families import families

RESULTS = Path(__file__).resolve().parents[1] / "results"
CLAIMS = (*earlier.CLAIMS, *trained.CLAIMS)
_HEAD = """# Claims

Which claims of Branch-Train-Merge and of papers that build on it hold in this system, at a size that two CPU cores
train in minutes? Each claim has figures with a bound. It *holds* if the figures of all random seeds meet their bounds,
*holds in part* if some do, and otherwise *does not hold at this size*. Where there is only one random seed, the verdict
says so: its spread is unknown. Figures without a bound are shown for comparison.

Except where a claim says otherwise, perplexity is on test text and over the same target tokens for every method; lower
is better. Nothing was fitted or tuned on test text, with one exception that [Data ablation](#data-ablation) states: the
weights of ensembles and averages, and the [sweep](results.md#sweep-of-the-dense-baseline) of the dense baseline, use
dev text. The models and their text are small: these figures compare methods, and do not predict large models.

`python benchmarks/write_docs.py` writes this page from the JSON files in `benchmarks/results/`, which record hardware,
package versions and date. `make claims NAME=... CORPORA=FOLDER` trains one family of runs of `configs/claims/`, and
without NAME all of them; units that are in the JSON are not measured again. `FOLDER` contains the corpora,
`math.jsonl.gz` and so on, with `text` and `source` in each row; `DEMO` is the folder `text` of a run of
`btm-scale demo`.
"""


def claims_page(results: Path = RESULTS) -> str:
    """Return the page."""
    evidence = Evidence(results)
    found = [judged(claim, evidence) for claim in CLAIMS]
    return "\n".join([_HEAD, *_summary(found), *(_section(one, evidence) for one in found), *_time(evidence)])


def plots(results: Path = RESULTS) -> dict[str, str]:
    """Return the SVG of each measured claim that has one, by file name."""
    evidence = Evidence(results)
    measured = [claim for claim in CLAIMS if claim.draw and judged(claim, evidence).figures]
    return {_file_of(claim): claim.draw(evidence) for claim in measured if claim.draw}


def _file_of(claim: Claim) -> str:
    """Return the name of a claim's plot."""
    return f"claims-{_slug(claim)}.svg"


def _slug(claim: Claim) -> str:
    return claim.title.lower().replace(" ", "-")


def _summary(found: Sequence[Judged]) -> Iterator[str]:
    counts = {
        verdict: sum(one.verdict == verdict for one in found) for verdict in (HOLDS, IN_PART, NOT_HERE, UNDECIDED)
    }
    parts = [f"{counts[HOLDS]} hold", f"{counts[IN_PART]} hold in part", f"{counts[NOT_HERE]} do not hold at this size"]
    parts += [f"{counts[UNDECIDED]} are undecided"] if counts[UNDECIDED] else []
    listed = f"{', '.join(parts[:-1])}, and {parts[-1]}"
    yield f"Of {len(found)} claims, {sum(counts.values())} are measured: {listed}.\n"
    yield "| claim | verdict | random seeds |\n| --- | --- | ---: |"
    for one in found:
        seeds = " to ".join(map(str, sorted(set(one.seeds)))) if one.seeds[1] else "-"
        yield f"| [{one.claim.title}](#{_slug(one.claim)}) | {one.sentence} | {seeds} |"
    yield ""


def _section(one: Judged, evidence: Evidence) -> str:
    claim = one.claim
    lines = [f"## {claim.title}", "", f"{claim.text} ({claim.source}.)", "", f"Run here: {claim.size}."]
    if one.verdict == NOT_MEASURED:
        return "\n".join([*lines, "", "**Not measured** yet:", "", _block(claim.command), ""])
    lines += ["", _table(one.figures), "", f"**{one.sentence.capitalize()}.**"]
    if one.contradicts:
        lines[-1] += f" {claim.reason}"
    if claim.draw:
        lines += ["", f"![{claim.title}](images/{_file_of(claim)})"]
    return "\n".join([*lines, "", *_sources(claim.results, evidence), "", _block(claim.command), ""])


def _block(command: str) -> str:
    """Return a command as a code block."""
    return f"```\n{command}\n```"


def _table(figures: Sequence[Figure]) -> str:
    seeds = sorted({seed for figure in figures for seed in figure.by_seed})
    rows = [["figure", *(f"seed {seed}" for seed in seeds), "mean ± sd", "claim"]]
    for figure in figures:
        row = [figure.label, *(_value(figure, seed) for seed in seeds), _spread(list(figure.by_seed.values()))]
        rows.append([*row, "" if figure.bound is None else str(figure.bound)])
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(figure: Figure, seed: int) -> str:
    if seed not in figure.by_seed:
        return "-"
    sign = figure.beyond.get(seed, "")
    return f"{sign} {figure.by_seed[seed]:.3f}".strip()


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "one seed"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def _sources(names: Sequence[str], evidence: Evidence) -> Iterator[str]:
    """Yield one line for each JSON file: its link, hardware, dates, and how long its units took."""
    for name in names:
        document = evidence.document(name)
        units = document.get("units", {})
        took = f"; {len(units)} units, {_minutes(document):.0f} minutes" if units else ""
        where = measured_on(environments_of(document))
        yield f"- [`{name}.json`](../benchmarks/results/{name}.json): {where}{took}"


def _minutes(document: Mapping[str, Any]) -> float:
    return sum(unit["seconds"] for unit in document["units"].values()) / 60


def _time(evidence: Evidence) -> Iterator[str]:
    """Yield the time of the families: of those that are measured, and of the rest as their YAML estimates it."""
    measured = estimated = 0.0
    for name, family in families().items():
        path = evidence.path(f"claims/{name}")
        document = json.loads(path.read_text()) if path.is_file() else {"units": {}}
        measured += _minutes(document) / 60
        estimated += sum(unit.minutes for unit in family.units() if unit.name not in document["units"]) / 60
    yield "## Time\n"
    yield (
        f"The families of `configs/claims/` have taken {measured:.1f} hours on two cores so far; what is not measured "
        f"yet takes about {estimated:.1f} more. `python benchmarks/run_claims.py --list` lists every unit.\n"
    )
    yield "Next: [results](results.md)."
