"""Train one unit of a family with the command line, and read its figures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_yaml, load_yaml
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.evaluate.results import Results, load_results
from btm_scale.forest.methods import EXPERT
from btm_scale.run_dir import RunDir
from claims.families import Family, Unit, merged
from claims.training_text import write_training_text

# The size of --small: it shows that a family runs, and its figures answer nothing.
_SMALL = {
    "model": {"family": "llama", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96},
    "budget": {"sequence_length": 64, "batch_tokens": 64 * 32},
    "evaluate": {"tokens_per_domain": 2048, "dev_blocks": 10},
}
_SMALL_STEPS, _SMALL_VOCABULARY, _SMALL_TEXT = 24, 512, "1MB"


@dataclass(frozen=True)
class Place:
    """Where the units of a family are trained, and from which text."""

    family: Family
    folder: Path
    corpora: Path
    small: bool = False

    def measure(self, unit: Unit) -> dict[str, Any]:
        """Train a unit, or what an interrupted call left of it, and return its figures."""
        config = self.config(unit)
        run = RunDir(self.folder / f"{unit.point}-seed-{unit.seed}")
        if self.family.config.shares == "text":
            prepared = self._prepared()
            run.root.mkdir(parents=True, exist_ok=True)
            for part in ("data", "tokenizer"):
                if not (run.root / part).exists():
                    (run.root / part).symlink_to(prepared.root / part)
        _btm("run", config, "--out", run.root)
        return {"point": unit.point, "random_seed": unit.seed, **figures(load_results(run), self.family.domains)}

    def config(self, unit: Unit) -> Path:
        """Write the YAML of a unit, and return its path."""
        values = self._values(unit)
        clusters = self.family.config.points[unit.point].clusters
        if self.family.config.shares == "tokenizer":
            prepared = self._prepared()
            values["tokenizer"] = {"path": str(prepared.tokenizer)}
            if clusters is not None:
                values["novel_domains"], values["domains"] = values["domains"], self._clustered(clusters, prepared)
        path = self.folder / f"{unit.point}-seed-{unit.seed}.yaml"
        dump_yaml(values, path)
        return path

    def _values(self, unit: Unit) -> dict[str, Any]:
        values = self.family.values(unit.point, unit.seed, self.corpora)
        return shrunk(values) if self.small else values

    def _prepared(self) -> RunDir:
        """Return the folder of the text and tokenizer that all points share."""
        run = RunDir((self.folder / "text").resolve())
        values = self._values(next(self.family.units()))
        dump_yaml(merged(values, {"name": f"{self.family.name}-text"}), self.folder / "text.yaml")
        _btm("prepare", self.folder / "text.yaml", "--out", run.root)
        return run

    def _clustered(self, clusters: int, prepared: RunDir) -> dict[str, Any]:
        """Return the section `domains` of c-BTM's clusters of the text on which the family's domains train."""
        config = RunConfig.load(self.folder / "text.yaml")
        require_usual_splits(config, prepared)
        files = write_training_text(config, (self.folder / "train").resolve())
        found = (self.folder / f"clusters-{clusters}").resolve()
        _btm("discover", *files.values(), "--clusters", clusters, "--out", found)
        domains: dict[str, Any] = load_yaml(found / "domains.yaml")["domains"]
        return {name: {"text": str(found / domain["text"])} for name, domain in domains.items()}


def require_usual_splits(config: RunConfig, run: RunDir) -> None:
    """Raise SystemExit if a domain is not split by the hash that puts equal text into the same split everywhere."""
    moved = [name for name in config.domains if Fingerprint.of_domain(run, name).placement]
    if moved:
        raise SystemExit(
            f"{run.root}: the splits of {', '.join(moved)} were moved, because too little text falls into one of them. "
            "Clusters would be trained on their test text. Give domains with more documents."
        )


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """Return a run's YAML with a toy model, little text and few steps."""
    small = merged(values, _SMALL)
    small["model"] = _SMALL["model"]
    small["budget"]["tokens"] = _SMALL_STEPS * small["budget"]["batch_tokens"]
    scale = small["budget"]["tokens"] / values["budget"]["tokens"]
    small["tokenizer"] = {"vocab_size": _SMALL_VOCABULARY + values["tokenizer"]["vocab_size"] // 64}
    for section in ("domains", "added_domains"):
        for name, domain in values.get(section, {}).items():
            small[section] = {**small[section], name: {**domain, "max_bytes": _SMALL_TEXT}}
    for name, expert in values.get("experts", {}).items():
        if "tokens" in expert:
            small["experts"] = {**small["experts"], name: {**expert, "tokens": round(expert["tokens"] * scale)}}
    return small


def figures(results: Results, domains: Sequence[str]) -> dict[str, Any]:
    """Return each method's perplexity and bits per byte on some domains, their bytes, and the compute of each method.

    Clusters' experts are left out. `own` is the expert of each domain, if all have one.
    """
    measures: dict[str, Any] = {}
    for measure in ("perplexity", "bits_per_byte"):
        by_method = {name: result.of(measure) for name, result in results.methods.items()}
        own = {name: by_method[f"{EXPERT}{name}"][name] for name in domains if f"{EXPERT}{name}" in by_method}
        kept = {
            method: {name: values[name] for name in domains if name in values}
            for method, values in by_method.items()
            if not method.startswith(EXPERT) or method.removeprefix(EXPERT) in domains
        }
        measures[measure] = kept | ({"own": own} if len(own) == len(domains) else {})
    compute = {method: {"tokens": one.tokens, "flops": one.flops} for method, one in results.compute.items()}
    return {
        "bytes": {name: results.domains[name].bytes for name in domains},
        **measures,
        "compute": {name: one for name, one in compute.items() if name in measures["perplexity"]},
    }


def _btm(*arguments: object) -> None:
    words = list(map(str, arguments))
    done = subprocess.run([sys.executable, "-m", "btm_scale.cli", *words], check=False)
    if done.returncode:
        raise SystemExit(f"btm-scale {words[0]} ended with exit code {done.returncode}, for the reason above.")
