"""The forest as one mixture of experts: untrained routers, MLP-only experts, joint training, and speed of upcycling.

    python benchmarks/moe.py --list                      # every unit, minutes on two cores, and whether it is measured
    python benchmarks/moe.py --units 'demo-1/*' upcycle  # some units, in the order of the list
    python benchmarks/moe.py --smoke                     # every kind of unit at toy size, into another file

A unit is a recipe of one forest, such as `demo-1/joint-0.1`: the demo's forest with random seed 1 and 10% more tokens.
`eight-1` is the forest of configs/eight_domains.yaml, whose text is in --corpora. A unit's figures are written to
benchmarks/results/moe.json when it ends; those in the file are not measured again, and an interrupted unit resumes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from units import matching, measure, print_units

import btm_scale.configs
from btm_scale.config.moe import MoeConfig
from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_yaml, load_yaml
from btm_scale.data.demo_text import write_installed_text
from btm_scale.evaluate.results import load_results
from btm_scale.forest.scores import Scores
from btm_scale.run_dir import MOE, SEED, RunDir

RESULT = Path(__file__).parent / "results" / "moe.json"
BYTES_PER_DOMAIN = 3_000_000  # as `btm-scale demo` writes, whose finished runs may be moved to runs/moe/demo-SEED
SHARES = (0.1, 0.2, 0.05, 0.4)  # of the budget, in joint training; of eight domains the first two alone
ROUTERS: tuple[str, ...] = get_args(MoeConfig.model_fields["router"].annotation)
FORESTS = ("demo-1", "demo-2", "demo-3", "eight-1")
FOREST, MLPS, DENSE, UPCYCLE = "forest", "mlps", "dense", "upcycle"
# Minutes on two idle cores: of the demo's forest, and of eight domains.
MINUTES = {FOREST: (9, 26), "router": (0.7, 2), MLPS: (5, 16), "joint": (3, 20), DENSE: (11, 40), UPCYCLE: (13, 13)}
SMALL = {
    "name": "smoke",
    "domains": ("python", "licences"),
    "tokenizer": {"vocab_size": 512},
    "model": {"family": "llama", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96},
    "data": {"dev": 0.1, "test": 0.1, "workers": 1},
    "budget": {"tokens": 24 * 1024, "seed_share": 0.5, "sequence_length": 64, "batch_tokens": 1024},
    "layout": {"micro_batch": 4},
    "evaluate": {"tokens_per_domain": 2048, "dev_blocks": 10, "averages": ["uniform"]},
}


@dataclass(frozen=True)
class Forest:
    """The runs of one config and random seed: complete experts in `run`, and experts that train their MLPs alone."""

    name: str
    folder: Path
    config: Path
    text: Path | None  # None: that of this installation, in the run's folder
    shares: Sequence[float] = SHARES

    @property
    def run(self) -> RunDir:
        """The run of complete experts."""
        return RunDir(self.folder / self.name)

    @property
    def mlps(self) -> RunDir:
        """The run of experts that train their MLPs alone."""
        return RunDir(self.folder / f"{self.name}-mlps")

    def recipes(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Return the measurements by name, the most valuable first."""
        routers = {f"router-{router}": partial(self._router, router) for router in ROUTERS}
        joint = {f"joint-{share:g}": partial(self._joint, share) for share in self.shares}
        mlps = {MLPS: self._mlp_experts, f"{MLPS}-routed": self._mlps_routed}
        return {FOREST: self._make, **routers, **mlps, **joint, DENSE: self._longer_dense}

    def _make(self) -> dict[str, Any]:
        """Train seed LM, dense baseline and complete experts."""
        self._train(self.run)
        return figures(self.run)

    def _router(self, router: str) -> dict[str, Any]:
        """Upcycle the complete experts without training."""
        _btm("upcycle", self.run.root, "--router", router)
        return {"perplexity": {MOE: mixture_perplexity(self.run)}}

    def _joint(self, share: float) -> dict[str, Any]:
        """Train the mixture of complete experts jointly, beginning with the default router."""
        self._train(self.run, "moe.router=fitted-routed", f"moe.train.budget_share={share:g}")
        return {"perplexity": {MOE: mixture_perplexity(self.run)}}

    def _longer_dense(self) -> dict[str, Any]:
        """Train dense baselines with the tokens of forest and joint training."""
        factors = ",".join(f"{1 + share:g}" for share in sorted(self.shares))
        self._train(self.run, f"baselines.dense_compute=[{factors}]")
        return figures(self.run)

    def _mlp_experts(self) -> dict[str, Any]:
        """Train the experts' MLPs alone from the same seed LM, and make a mixture without training it."""
        self._train_mlps()
        return figures(self.mlps)

    def _mlps_routed(self) -> dict[str, Any]:
        """Upcycle those experts with the router of the mixture as it routes."""
        self._train_mlps()
        _btm("upcycle", self.mlps.root, "--router", "fitted-routed")
        return {"perplexity": {MOE: mixture_perplexity(self.mlps)}}

    def _train_mlps(self) -> None:
        self._train(self.run)
        for part in ("data", "tokenizer", SEED, f"train/{SEED}", f"scores/{SEED}"):
            if not (target := self.mlps.root / part).exists():
                unfinished = target.with_name(f".{target.name}.part")
                shutil.rmtree(unfinished, ignore_errors=True)
                shutil.copytree(self.run.root / part, unfinished)
                unfinished.rename(target)
        settings = [f"experts.{name}.train=mlp" for name in RunConfig.load(self.run.config).domains]
        settings += ["moe.router=fitted", "moe.train.budget_share=0", "baselines.dense=false"]
        self._train(self.mlps, *settings)

    def _train(self, run: RunDir, *changes: str) -> None:
        number = self.name.rpartition("-")[2]
        text = self.text or self.run.root / "text"
        if self.text is None and not text.is_dir():
            unfinished = text.with_name("text.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            write_installed_text(unfinished, bytes_per_domain=BYTES_PER_DOMAIN)
            unfinished.rename(text)
        settings = [f"random_seed={number}", f"text_root={text}", *changes]
        _btm("run", self.config, "--out", run.root, *(word for one in settings for word in ("--set", one)))


def _btm(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "btm_scale.cli", *map(str, arguments)], check=True)


def figures(run: RunDir) -> dict[str, Any]:
    """Return perplexities by method and training domain, of the experts only `own` on their domains, and tokens."""
    results = load_results(run)
    domains = [name for name, domain in results.domains.items() if not domain.novel]
    perplexity = {
        method: {domain: result.perplexity[domain] for domain in domains}
        for method, result in results.methods.items()
        if not method.startswith("expert:")
    }
    perplexity["own"] = {domain: results.methods[f"expert:{domain}"].perplexity[domain] for domain in domains}
    tokens = {method: compute.tokens for method, compute in results.compute.items()}
    return {"perplexity": perplexity, "tokens": {method: tokens[method] for method in perplexity if method in tokens}}


def mixture_perplexity(run: RunDir) -> dict[str, float]:
    """Return the perplexity of the run's mixture by training domain, from its scores."""
    config = RunConfig.load(run.config)
    scores = {name: Scores.load(run.scores(MOE, name, config.evaluate.split)) for name in config.domains}
    return {name: float(np.exp(-one.log_probs.mean(dtype=np.float64))) for name, one in scores.items()}


def forests(options: argparse.Namespace) -> Iterator[Forest]:
    """Yield the forests that can be trained here."""
    configs = Path(btm_scale.configs.__file__).parent
    if options.smoke:
        values = load_yaml(configs / "demo.yaml") | SMALL
        values["domains"] = {name: load_yaml(configs / "demo.yaml")["domains"][name] for name in SMALL["domains"]}
        options.out.mkdir(parents=True, exist_ok=True)
        dump_yaml(values, options.out / "smoke.yaml")
        yield Forest(FORESTS[0], options.out, options.out / "smoke.yaml", None, SHARES[:1])
        return
    for name in FORESTS:
        is_demo = name.startswith("demo")
        config = configs / ("demo.yaml" if is_demo else "eight_domains.yaml")
        text, shares = (None, SHARES) if is_demo else (options.corpora, SHARES[:2])
        yield Forest(name, options.out, config, text, shares)


def all_units(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the measurements by name, the most valuable first within a forest."""
    named = {f"{forest.name}/{name}": unit for forest in forests(options) for name, unit in forest.recipes().items()}
    return {**named, UPCYCLE: lambda: _upcycling(options)}


def _upcycling(options: argparse.Namespace) -> dict[str, Any]:
    from moe_upcycle import measure_upcycling

    if options.smoke:
        return measure_upcycling(options.out, billions=0.01, vocabulary=512, rounds=1)
    return measure_upcycling(options.out)


def minutes(unit: str) -> float:
    """Return about how many minutes a unit takes on two idle cores."""
    forest, _, recipe = unit.partition("/")
    return MINUTES[recipe.partition("-")[0] or forest][forest.startswith("eight")]


def chosen(patterns: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Return the units that match, each after its forest. Raises SystemExit for a pattern that matches none."""
    wanted = matching(patterns, known)
    needed = {f"{name.partition('/')[0]}/{FOREST}" for name in wanted if "/" in name}
    return [name for name in known if name in wanted or name in needed]


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the measurements that the result lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", nargs="+", metavar="PATTERN", default=["demo-*", UPCYCLE])
    parser.add_argument("--corpora", type=Path, help="text of configs/eight_domains.yaml, for eight-1/*")
    parser.add_argument("--out", type=Path, help="for runs and models; default: runs/moe")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="toy sizes; default of --out: runs/moe-smoke")
    options = parser.parse_args(arguments)
    options.out = (options.out or Path("runs/moe-smoke" if options.smoke else "runs/moe")).absolute()
    result = options.out / "moe.json" if options.smoke else RESULT
    known = all_units(options)
    if options.list:
        print_units(known, result, minutes)
        return
    names = chosen(options.units, known)
    if options.corpora is None and any(name.startswith("eight") for name in names):
        raise SystemExit("The forest of eight domains needs text: --corpora FOLDER with math.jsonl.gz and so on.")
    measure(names, known, result)


if __name__ == "__main__":
    main()
