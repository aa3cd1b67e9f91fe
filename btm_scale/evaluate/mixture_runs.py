"""Draw weighted averages of the experts and the seed LM, and measure their losses.

The average of models that were trained on parts of the text is a proxy for a model that was trained on the mixture, and
the weights are the proportions (arXiv 2601.17858, 2602.00747). The weight of the seed LM is that of replayed text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import ForestError, UserError
from btm_scale.evaluate.ablate import Text, average_losses
from btm_scale.evaluate.mixture_law import LAWS, Quadratic, needed
from btm_scale.evaluate.mixture_record import ChosenMixture, CriticalReplay, MeasuredMixture, MixtureRecord
from btm_scale.evaluate.results import MAX_LOSS
from btm_scale.forest.expert import is_finished, read_expert
from btm_scale.forest.forest import require_experts
from btm_scale.forest.nonfinite import nonfinite_models
from btm_scale.run_dir import SEED, RunDir
from btm_scale.util.files import make_directory
from btm_scale.util.locks import alone

logger = logging.getLogger(__name__)

Mixture = dict[str, float]  # weight of each model; models of weight 0 are absent
_CANDIDATES = 8
_MOST_GENERAL = Quadratic()
_LEAST_RUNS, _MOST_RUNS = 24, 120  # by default; of 15 models and more, the most general law needs a larger --runs
_PER_PARAMETER = 1.5  # averages, by default
_UNITS = 1_000_000  # weights are multiples of 1e-6, which are the same on every machine


def components(run: RunDir) -> list[str]:
    """Return the models to mix: every expert, and the seed LM if the run has one.

    Raises ForestError without experts, or if there is only one model.
    """
    names = [*require_experts(run), *([SEED] if is_finished(run.model(SEED)) else [])]
    if len(names) < 2:
        raise ForestError(
            f"'{names[0]}' is the only model in {run.root}. A mixture has at least two: train another expert, or add "
            f"one with btm-scale forest add {run.root} MODEL"
        )
    return names


def default_runs(models: int) -> int:
    """Return how many averages of this many models are measured by default: enough for every law, within limits."""
    wanted = math.ceil(_PER_PARAMETER * _MOST_GENERAL.size(models))
    least = max(_LEAST_RUNS, 2 * needed(LAWS[0], models))
    return max(least, min(wanted, _MOST_RUNS))


def drawn(names: Sequence[str], runs: int, random_seed: int = 0) -> list[Mixture]:
    """Return `runs` mixtures: the uniform one, each model alone, and draws that are uniform on the simplex.

    Each is the one of several draws whose loss the quadratic law, fitted to the mixtures before it, predicts with the
    largest variance. A larger `runs` appends mixtures. Raises UserError if there are too few for any law.
    """
    names = sorted(names)
    least = needed(LAWS[0], len(names))
    if runs < least:
        laws = ", ".join(f"the {law.name} law {needed(law, len(names))}" for law in LAWS)
        raise UserError(
            f"{runs} runs are too few for {len(names)} models. A law needs one mixture more than it has parameters: "
            f"{laws}. Set --runs to {least} or more."
        )
    generator = np.random.default_rng(random_seed)
    mixtures = np.concatenate([np.full((1, len(names)), 1.0 / len(names)), np.eye(len(names))])
    while len(mixtures) < runs:
        candidates = generator.dirichlet(np.ones(len(names)), _CANDIDATES)
        uncertain = _MOST_GENERAL.uncertainty(mixtures, candidates)
        mixtures = np.concatenate([mixtures, candidates[[np.argmax(uncertain)]]])
    return [_mixture(names, weights) for weights in mixtures]


def unmeasured(
    run: RunDir, texts: Mapping[str, Text], mixtures: Sequence[Mixture]
) -> list[tuple[Mixture, dict[str, Text]]]:
    """Return the mixtures without a recorded loss on every text, each with the texts that it lacks.

    Of mixtures of the same weights, by models whose contents are the same, only one.
    """
    hashes = _hashes(run, mixtures)
    losses = {one.key: one.losses for one in _record(run).measured}
    missing = []
    for key, mixture in {_key(mixture, hashes): mixture for mixture in mixtures}.items():
        known = losses.get(key, {})
        if lacking := {name: text for name, text in texts.items() if text.fingerprint not in known}:
            missing.append((mixture, lacking))
    return missing


def measure(
    run: RunDir,
    texts: Mapping[str, Text],
    mixtures: Sequence[Mixture],
    *,
    device: str = "cpu",
    on_mixture: Callable[[Mixture], None] = lambda mixture: None,
) -> list[MeasuredMixture]:
    """Measure what is not in evaluation/mixture.json, and return every mixture of these models that has these losses.

    That includes mixtures that earlier calls measured for other draws, or before the forest grew. Each result is
    written at once. A mixture that diverged is left out with a warning. Raises ForestError for a model that diverged
    alone and in an average, and CheckpointError for models of different shapes.
    """
    hashes = _hashes(run, mixtures)
    vocabulary = Tokenizer.load(run.tokenizer).vocab_size
    diverged: list[Mixture] = []
    for mixture, lacking in unmeasured(run, texts, mixtures):
        losses = average_losses(run, mixture, lacking, vocabulary, device)
        if not all(loss <= MAX_LOSS for loss in losses.values()):
            diverged.append(mixture)
            _require_averages(run, diverged)
            logger.warning("the average with weights %s diverged: its losses are %s; left out", mixture, losses)
            continue
        by_text = {lacking[name].fingerprint: loss for name, loss in losses.items()}
        _add(run, MeasuredMixture(key=_key(mixture, hashes), weights=mixture, losses=by_text))
        on_mixture(mixture)
    wanted = {text.fingerprint for text in texts.values()}
    recorded = {one.key: one for one in _record(run).measured if wanted <= one.losses.keys()}
    # The models may have other names now than when they were measured, and several the same content.
    keyed = [(_key(mixture, hashes), mixture) for mixture in mixtures]
    found = [recorded[key].model_copy(update={"weights": mixture}) for key, mixture in keyed if key in recorded]
    others = recorded.keys() - {key for key, _ in keyed}
    found += [recorded[key] for key in others if _is_of(recorded[key], hashes)]
    return sorted(found, key=lambda one: (one.key, sorted(one.weights.items())))


def _require_averages(run: RunDir, diverged: Sequence[Mixture]) -> None:
    """Raise ForestError if a model is diverged: no law describes averages with it."""
    alone = {name for mixture in diverged if len(mixture) == 1 for name in mixture}
    averaged = {name for mixture in diverged if len(mixture) > 1 for name in mixture}
    if not (broken := sorted(alone & averaged)):
        return
    name = (nonfinite_models(run, broken) or broken)[0]
    remedy = "Train it again" if name == SEED else f"Remove it (btm-scale forest remove {run.root} {name})"
    raise ForestError(
        f"'{name}' has diverged: its losses, and those of averages with it, are not numbers or exceed {MAX_LOSS:g} "
        f"nats. {remedy}, or restore its weights."
    )


def save_chosen(run: RunDir, chosen: ChosenMixture) -> None:
    """Record the mixture that was chosen, in place of an earlier one."""
    with alone(run.mixture_lock):
        _record(run).model_copy(update={"chosen": chosen}).save(run.mixture)


def save_replay(run: RunDir, critical: CriticalReplay) -> None:
    """Record the critical share of other text, in place of an earlier one."""
    with alone(run.mixture_lock):
        make_directory(run.mixture.parent)
        _record(run).model_copy(update={"replay": critical}).save(run.mixture)


def _add(run: RunDir, measured: MeasuredMixture) -> None:
    with alone(run.mixture_lock):
        make_directory(run.mixture.parent)
        record = _record(run)
        by_key = {one.key: one for one in record.measured}
        if measured.key in by_key:
            losses = by_key[measured.key].losses | measured.losses
            measured = measured.model_copy(update={"losses": losses})
        by_key[measured.key] = measured
        record.model_copy(update={"measured": tuple(by_key.values())}).save(run.mixture)


def _record(run: RunDir) -> MixtureRecord:
    return MixtureRecord.find(run.mixture) or MixtureRecord()


def _mixture(names: Sequence[str], weights: np.ndarray) -> Mixture:
    units = np.rint(weights * _UNITS).astype(int)
    units[np.argmax(units)] += _UNITS - units.sum()
    return {name: int(count) / _UNITS for name, count in zip(names, units, strict=True) if count}


def _hashes(run: RunDir, mixtures: Sequence[Mixture]) -> dict[str, str]:
    names = sorted({name for mixture in mixtures for name in mixture})
    return {name: read_expert(run.model(name)).content_hash for name in names}


def _is_of(measured: MeasuredMixture, hashes: Mapping[str, str]) -> bool:
    """Return whether a mixture was measured of these models, under these names."""
    return measured.weights.keys() <= hashes.keys() and measured.key == _key(measured.weights, hashes)


def _key(mixture: Mapping[str, float], hashes: Mapping[str, str]) -> str:
    parts = sorted([hashes[name], round(weight * _UNITS)] for name, weight in mixture.items())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
