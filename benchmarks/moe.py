"""The demo's forest as one mixture of experts: routers without training, MLP-only experts, and joint training.

    python benchmarks/moe.py [--seeds 1 2 3] [--out runs/moe] [--list] [UNIT ...]

Each unit takes a few minutes on two cores, and writes its figures to benchmarks/results/moe.json when it ends. Units
that are in the file are not measured again; an interrupted one resumes. Run `forest-SEED` before the others of a seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe

import btm_scale.configs
from btm_scale.config.run import RunConfig
from btm_scale.data.demo_text import write_installed_text
from btm_scale.evaluate.results import load_results
from btm_scale.forest.router import ROUTERS
from btm_scale.run_dir import DENSE, MOE, SEED, RunDir

RESULT = Path(__file__).parent / "results" / "moe.json"
CONFIG = Path(btm_scale.configs.__file__).parent / "demo.yaml"
SHARES = (0.05, 0.1, 0.2)
BYTES_PER_DOMAIN = 3_000_000  # as `btm-scale demo` writes


class Forest:
    """The runs of one random seed."""

    def __init__(self, folder: Path, random_seed: int) -> None:
        self.run, self.mlps = RunDir(folder / f"{random_seed}"), RunDir(folder / f"{random_seed}-mlps")
        self._overrides = [f"random_seed={random_seed}", f"text_root={folder / 'text'}"]
        self._text = folder / "text"

    def make(self) -> dict[str, Any]:
        """Train seed, dense and complete experts."""
        if not self._text.is_dir():
            partial = self._text.with_name("text.part")
            shutil.rmtree(partial, ignore_errors=True)
            write_installed_text(partial, bytes_per_domain=BYTES_PER_DOMAIN)
            partial.rename(self._text)
        self._btm("run", CONFIG, "--out", self.run.root, *self._settings())
        return means(self.run)

    def routers(self) -> dict[str, Any]:
        """Compare the routers of a mixture that is not trained."""
        perplexities = {}
        for router in ROUTERS:
            self._btm("upcycle", self.run.root, "--router", router)
            self._btm("evaluate", self.run.root)
            perplexities[router] = means(self.run)[MOE]
        return perplexities

    def joint(self, share: float) -> dict[str, Any]:
        """Train the mixture of complete experts jointly."""
        self._btm("run", CONFIG, "--out", self.run.root, *self._settings(f"moe.train.budget_share={share}"))
        return means(self.run)

    def mlp_experts(self) -> dict[str, Any]:
        """Train the experts' MLPs alone from the same seed LM, and make a mixture without training it.

        `gain kept` is the mixture's fraction of the nats that each domain's own expert gains over the seed LM.
        """
        for part in ("data", "tokenizer", SEED, f"train/{SEED}", f"scores/{SEED}"):
            if not (self.mlps.root / part).exists():
                partial = self.mlps.root / f"{part}.part"
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(self.run.root / part, partial)
                partial.rename(self.mlps.root / part)
        names = RunConfig.load(CONFIG).domains
        changes = [f"experts.{name}.train=mlp" for name in names]
        changes += ["moe.train.budget_share=0", "baselines.dense=false"]
        self._btm("run", CONFIG, "--out", self.mlps.root, *self._settings(*changes))
        perplexities = means(self.mlps)
        gain = np.log(perplexities[SEED]) - np.log(perplexities["own expert"])
        return perplexities | {"gain kept": float((np.log(perplexities[SEED]) - np.log(perplexities[MOE])) / gain)}

    def _settings(self, *changes: str) -> list[str]:
        return [part for change in (*self._overrides, *changes) for part in ("--set", change)]

    def _btm(self, *arguments: object) -> None:
        subprocess.run([sys.executable, "-m", "btm_scale.cli", *map(str, arguments)], check=True)


def means(run: RunDir) -> dict[str, Any]:
    """Return mean perplexities over the training domains, by method."""
    results = load_results(run)
    domains = [name for name, domain in results.domains.items() if not domain.novel]
    perplexities = {
        method: float(np.mean([results.methods[method].perplexity[name] for name in domains]))
        for method in (SEED, DENSE, "ensemble", "ensemble:tempered", "average:uniform", MOE)
        if method in results.methods
    }
    own = [results.methods[f"expert:{name}"].perplexity[name] for name in domains]
    return perplexities | {"own expert": float(np.mean(own))}


def units(folder: Path, seeds: list[int]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the measurements by name."""
    named: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in seeds:
        forest = Forest(folder, seed)
        named |= {f"forest-{seed}": forest.make, f"routers-{seed}": forest.routers, f"mlps-{seed}": forest.mlp_experts}
        named |= {f"joint-{share:g}-{seed}": lambda share=share, forest=forest: forest.joint(share) for share in SHARES}
    return named


def main() -> None:
    """Take the measurements that the result lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("units", nargs="*", metavar="UNIT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/moe"))
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    known = units(options.out.absolute(), options.seeds)
    document = json.loads(RESULT.read_text()) if RESULT.is_file() else {"units": {}}
    if options.list:
        print("\n".join(f"{name}{' (measured)' if name in document['units'] else ''}" for name in known))
        return
    for name in options.units or known:
        if name in document["units"]:
            continue
        begin = time.monotonic()
        figures = known[name]()
        document["units"][name] = {"seconds": round(time.monotonic() - begin), "figures": figures}
        document["environment"] = describe()
        partial = RESULT.with_suffix(".part")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.rename(RESULT)
        print(name, json.dumps(figures))


if __name__ == "__main__":
    main()
