"""Measure the claims of configs/claims, and write docs/claims.md with the verdicts of all claims.

    python benchmarks/run_claims.py --list                            # every unit, and about how many minutes it takes
    python benchmarks/run_claims.py seed-share --corpora FOLDER       # the units of some families
    python benchmarks/run_claims.py --corpora FOLDER                  # everything
    python benchmarks/run_claims.py seed-share --corpora FOLDER --units '*/seed-1' --small

FOLDER has the text that the YAML names: math.jsonl.gz and so on, with the fields `text` and `source`. A unit is one
run with one random seed; its figures are written to benchmarks/results/claims/NAME.json when it ends. Units in the file
are not measured again, and an interrupted unit resumes. --small runs every unit in a minute or two, into --runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import write_docs
from claims.families import Family, families
from claims.training import Place
from units import matching, measure, print_units

RESULTS = Path(__file__).parent / "results" / "claims"


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the measurements that the results lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a family, by its file's name; default: all")
    parser.add_argument("--corpora", type=Path, help="folder of the text")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="for the models; default: runs/claims")
    parser.add_argument("--units", nargs="+", metavar="PATTERN", default=["*"], help="such as '*/seed-1'")
    parser.add_argument("--list", action="store_true", help="print the units, and measure nothing")
    parser.add_argument("--small", action="store_true", help="toy sizes, into --runs and into no result")
    options = parser.parse_args(arguments)
    known = families()
    for name in options.names:
        if name not in known:
            raise SystemExit(f"There is no family '{name}'. configs/claims has {', '.join(known)}.")
    results = options.runs.resolve() / "small" if options.small else RESULTS
    for family in (known[name] for name in options.names or known):
        result = results / f"{family.name}.json"
        minutes = {unit.name: unit.minutes for unit in family.units()}
        names = matching(options.units, minutes)
        if options.list:
            print(f"{family.name}: about {sum(minutes.values()) / 60:.1f} hours")
            print_units(names, result, minutes.__getitem__)
        else:
            measure(names, units_of(family, options), result)
    if not (options.list or options.small):
        write_docs.main()


def units_of(family: Family, options: argparse.Namespace) -> dict[str, partial]:
    """Return the measurements of a family by name."""
    if options.corpora is None:
        raise SystemExit(f"'{family.name}' needs text: --corpora FOLDER, with math.jsonl.gz and so on.")
    folder = options.runs.resolve() / ("small" if options.small else "") / family.name
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(family, folder, options.corpora.resolve(), small=options.small)
    return {unit.name: partial(place.measure, unit) for unit in family.units()}


if __name__ == "__main__":
    main()
