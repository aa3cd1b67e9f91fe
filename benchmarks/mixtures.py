"""Do weighted averages of experts predict models that are really trained on the mixture?

    python benchmarks/mixtures.py --list                     # every unit, and whether it is measured
    python benchmarks/mixtures.py --runs runs --units 'demo-1/*'

--runs has finished runs `demo-1` to `demo-4` of `btm-scale demo --set random_seed=1` and so on. A unit trains one
model or one forest; its figures are written to benchmarks/results/mixtures.json when it ends, and those in the file
are not measured again. benchmarks/mixture_ratios.json has the eight mixtures, drawn from Dirichlet(1) with random seed
0 before any was trained. `demo-4` has eight others, drawn with random seed 1 after the constants of the prediction were
chosen on those of `demo-1` to `demo-3`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from doc_mixtures import HELD_OUT
from mixture_forest import Forest, perplexities, surfaces, weights_for
from units import matching, measure, print_units

from btm_scale.data.fingerprint import Fingerprint
from btm_scale.run_dir import RunDir

RESULT = Path(__file__).parent / "results" / "mixtures.json"
RATIOS = Path(__file__).parent / "mixture_ratios.json"
RUNS = ("demo-1", "demo-2", "demo-3", "demo-4")
REPLAY = (0.1, 0.3)
KEEP = (1.0, 1.02, 1.05, 1.1)  # of every other domain's perplexity, for the critical mixture ratio

Figures = dict[str, Any]


class Units:
    """The measurements of one forest."""

    def __init__(self, name: str, source: Path, out: Path) -> None:
        self.name, self._source, self._out = name, source / name, out

    @cached_property
    def forest(self) -> Forest:
        """A copy of the finished run: `mixture` writes into its folder."""
        copy = self._out / self.name
        if not copy.is_dir():
            unfinished = copy.with_name(f"{copy.name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(self._source, unfinished, ignore=shutil.ignore_patterns("mixture.json", "averages"))
            unfinished.rename(copy)
        return Forest.load(copy)

    def all(self) -> Iterator[tuple[str, Callable[[], Figures]]]:
        """Yield every unit, those that others need first."""
        yield "predicted", self.predicted
        for number in range(len(_ratios(self.name))):
            yield f"trained-{number}", partial(self.trained, number)
        for name in ("recommended", "uniform", "proportional"):
            yield name, partial(self.alternative, name)
        for share in REPLAY:
            yield f"replay-{share:g}", partial(self.replayed, share)
        yield "critical", self.critical

    def predicted(self) -> Figures:
        """What `mixture` says: its fit, the recommended ratios, and the perplexity of each committed mixture."""
        return _predictions(self.forest, _ratios(self.name))

    def trained(self, number: int) -> Figures:
        """One of the committed mixtures, trained."""
        ratios = _ratios(self.name)[number]
        return {"perplexity": self.forest.train_mixture(self._out / f"{self.name}-trained-{number}", ratios)}

    def alternative(self, name: str) -> Figures:
        """The recommended mixture, the uniform one, or the one that is proportional to the tokens there are."""
        domains = self.forest.domains
        if name == "recommended":
            found = self.forest.mixture()["domains"]
            amounts = {domain: found[domain]["weight"] for domain in domains}
        elif name == "uniform":
            amounts = dict.fromkeys(domains, 1.0)
        else:
            amounts = {domain: float(_tokens(self.forest.run, domain)) for domain in domains}
        total = sum(amounts.values())
        ratios = {domain: max(amount / total, 1e-6) for domain, amount in amounts.items()}  # a weight must be positive
        trained = self.forest.train_mixture(self._out / f"{self.name}-{name}", ratios)
        return {"ratios": ratios, "perplexity": trained}

    def replayed(self, share: float) -> Figures:
        """A forest whose experts replay text: what it predicts, its experts, and its averages."""
        forest = self._with_replay(share)
        return _predictions(forest, _ratios(self.name), share)

    def critical(self) -> Figures:
        """The critical mixture ratio of each expert, from this forest and those that replay."""
        others = [word for share in REPLAY for word in ("--replay", self._with_replay(share).run.root)]
        found: Figures = {}
        for domain in self.forest.domains:
            kept = [name for name in self.forest.domains if name != domain]
            found[domain] = {}
            for ratio in KEEP:
                limits = ",".join(f"{name}={ratio:g}" for name in kept)
                try:
                    answer = self.forest.mixture(*others, "--target", f"{domain}=1", "--keep", limits)
                except subprocess.CalledProcessError as error:
                    if "No share of other domains' text" not in error.stderr:
                        raise
                    found[domain][f"{ratio:g}"] = None  # more replay than any of these forests has
                    continue
                keys = ("share", "replay", "ratio", "range", "perplexity")
                found[domain][f"{ratio:g}"] = {key: answer[key] for key in keys}
        return {"critical": found}

    def _with_replay(self, share: float) -> Forest:
        return self.forest.train_with_replay(self._out / f"{self.name}-replay-{share:g}", share)


def _predictions(forest: Forest, drawn: Sequence[dict[str, float]], replay: float = 0.0) -> Figures:
    answer = forest.mixture()
    names, laws, trained = surfaces(forest)
    mixtures = [weights_for(forest, names, ratios, replay)[None] for ratios in drawn]
    predicted, averages = (
        [{name: float(np.exp(surface.loss(weights)[0])) for name, surface in by_domain.items()} for weights in mixtures]
        for by_domain in (trained, laws)
    )
    return {
        "r2": {name: one["r2"] for name, one in answer["fit"].items()},
        "error": {name: one["error"] for name, one in answer["fit"].items()},
        "law": {name: one["law"] for name, one in answer["fit"].items()},
        "domains": {name: one["weight"] for name, one in answer["domains"].items()},
        "mean": answer["mean"],
        "uniform": answer["mean"]["uniform"],
        "own": {name: perplexities(forest.config, forest.run, name)[name] for name in forest.domains},
        "predicted": predicted,
        "averages": averages,
    }


def _ratios(name: str) -> list[dict[str, float]]:
    """Return the mixtures of a forest."""
    ratios: list[dict[str, float]] = json.loads(RATIOS.read_text())["held_out" if name == HELD_OUT else "mixtures"]
    return ratios


def _tokens(run: RunDir, domain: str) -> int:
    return Fingerprint.load(run.fingerprint(domain)).splits["train"].tokens


def main() -> None:
    """Take the measurements that the result lacks, and write each as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the finished runs")
    parser.add_argument("--out", type=Path, default=Path("runs/mixtures"), help="for the models that are trained")
    parser.add_argument("--units", nargs="+", metavar="PATTERN", default=["*"])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    known = {
        f"{name}/{unit}": measured
        for name in RUNS
        for unit, measured in Units(name, options.runs.resolve(), options.out.resolve()).all()
    }
    wanted = matching(options.units, known)
    if options.list:
        print_units(wanted, options.result)
        return
    measure(wanted, known, options.result)


if __name__ == "__main__":
    main()
