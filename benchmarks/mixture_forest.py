"""A forest and models that are really trained on mixtures of its domains, each a run that shares the seed LM."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.config.run import RunConfig
from btm_scale.evaluate.ablate import run_texts
from btm_scale.evaluate.mixture_law import Fit, chosen, fit_laws
from btm_scale.evaluate.mixture_runs import components, default_runs, drawn, measure
from btm_scale.evaluate.mixture_trained import TrainedLoss, related_models, trained_losses
from btm_scale.forest.expert import read_expert
from btm_scale.forest.scores import Scores
from btm_scale.run_dir import DENSE, SEED, RunDir

_SHARED = ("data", "tokenizer", SEED, f"train/{SEED}", f"scores/{SEED}")


@dataclass(frozen=True)
class Forest:
    """A finished run, to whose folder nothing but the answers of `mixture` is added."""

    run: RunDir
    config: RunConfig

    @classmethod
    def load(cls, folder: Path) -> Forest:
        """Load a finished run."""
        run = RunDir(folder)
        return cls(run, RunConfig.load(run.config))

    @property
    def domains(self) -> list[str]:
        """The domains of the experts."""
        return list(self.config.domains)

    def mixture(self, *words: object) -> dict[str, Any]:
        """Return what `btm-scale mixture` answers."""
        command = [sys.executable, "-m", "btm_scale.cli", "mixture", self.run.root, *words, "--json"]
        done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def train_mixture(self, folder: Path, ratios: Mapping[str, float]) -> dict[str, float]:
        """Train one model from the seed LM like an expert, but on a mixture, and return its perplexity by domain.

        It has an expert's steps, batches and schedule: it is the dense baseline of a run with an expert's budget.
        """
        share = self.config.expert_sequences(self.domains[0]) / self.config.budget.sequences
        first, second = self.config.optimizer.betas_at(share)
        run = self._branch(
            folder,
            [DENSE],
            f"budget.tokens={round(self.config.budget.tokens * share)}",
            f"budget.batch_tokens={round(self.config.budget.batch_tokens * share)}",
            f"optimizer.betas=[{first},{second}]",
            *(f"domains.{name}.weight={weight}" for name, weight in ratios.items()),
        )
        return perplexities(self.config, run, DENSE)

    def train_with_replay(self, folder: Path, share: float) -> Forest:
        """Return the forest of the same seed LM whose experts have this branch.replay."""
        replay = [f"experts.{name}.branch.replay={share:g}" for name in self.domains]
        return Forest.load(self._branch(folder, self.domains, "baselines.dense=false", *replay).root)

    def _branch(self, folder: Path, models: Sequence[str], *settings: str) -> RunDir:
        """Train models of another run with the same seed LM and text."""
        run = RunDir(folder)
        for part in _SHARED:
            if not (target := run.root / part).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to((self.run.root / part).resolve())
        words = [word for name in models for word in ("--model", name)]
        words += [word for one in settings for word in ("--set", one)]
        command = [sys.executable, "-m", "btm_scale.cli", "train", self.run.config, "--out", run.root, *words]
        subprocess.run(list(map(str, command)), check=True)
        return run


def perplexities(config: RunConfig, run: RunDir, model: str) -> dict[str, float]:
    """Return a model's perplexity on the text that the run reports, by training domain."""
    scores = {name: Scores.load(run.scores(model, name, config.evaluate.split)) for name in config.domains}
    return {name: float(np.exp(-one.log_probs.mean(dtype=np.float64))) for name, one in scores.items()}


def surfaces(forest: Forest) -> tuple[list[str], dict[str, Fit], dict[str, TrainedLoss]]:
    """Return the models, and by domain the best law of averages and the predicted loss of trained models.

    They are from what `btm-scale mixture` has measured by default.
    """
    names = sorted(components(forest.run))
    texts = run_texts(forest.config, forest.run, forest.domains, "dev")
    measured = measure(forest.run, texts, drawn(names, default_runs(len(names))))
    mixtures = np.array([[one.weights.get(name, 0.0) for name in names] for one in measured])
    laws = {
        name: chosen(fit_laws(mixtures, np.array([one.losses[text.fingerprint] for one in measured])))
        for name, text in texts.items()
    }
    cards = {name: read_expert(forest.run.model(name)) for name in names}
    return names, laws, trained_losses(laws, names, related_models(list(texts), cards))


def weights_for(forest: Forest, names: list[str], ratios: Mapping[str, float], replay: float = 0.0) -> np.ndarray:
    """Return the weights [models] of the experts whose text has these ratios; experts replay equal parts of all text.

    Ratios that no weights give are approximated by the nearest that do.
    """
    replayed = replay / len(forest.domains)
    wanted = np.array([(ratios[name] - replayed) / (1.0 - replay) for name in forest.domains])
    wanted = _nearest_on_simplex(wanted)
    by_name = dict(zip(forest.domains, wanted.tolist(), strict=True))
    return np.array([by_name.get(name, 0.0) for name in names])


def _nearest_on_simplex(point: np.ndarray) -> np.ndarray:
    descending = np.sort(point)[::-1]
    excess = (np.cumsum(descending) - 1.0) / np.arange(1, len(point) + 1)
    height = excess[np.flatnonzero(descending > excess)[-1]]
    nearest: np.ndarray = np.maximum(point - height, 0.0)
    return nearest
