"""Data ablation: the average of experts' parameters approximates a model trained on all of their domains.

After arXiv 2410.15661: the perplexity of the average of models trained on parts predicts the perplexity of a model
trained on all parts, so 2^E mixtures cost E trainings. One average is on disk and one model in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.checkpoint.merge.compatibility import promoted_dtype
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.config.run import RunConfig
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import ForestError, UserError, unknown_name
from btm_scale.evaluate.evaluate import MAX_LOSS
from btm_scale.evaluate.hf_score import block_log_probs
from btm_scale.forest.expert import read_expert
from btm_scale.forest.forest import require_experts
from btm_scale.model.hf_decoder import Decoder
from btm_scale.run_dir import RunDir
from btm_scale.util.files import make_directory
from btm_scale.util.leftovers import scratch_directory
from btm_scale.util.locks import alone
from btm_scale.util.records import Part, Record

logger = logging.getLogger(__name__)

Subset = tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """A text to evaluate mixtures on: tokens int64 [targets + 1], predicted in blocks."""

    tokens: np.ndarray
    block_starts: np.ndarray
    fingerprint: str
    counted: np.ndarray | None = None  # bool [targets]; None if every target counts


class Measured(Part):
    """The perplexity of the average of a subset of experts."""

    key: str  # digest of the experts' and the texts' contents
    experts: tuple[str, ...]
    mean: float
    perplexity: dict[str, float]  # by text


class Ablation(Record):
    """ablation.json: every measured subset."""

    ERROR = ForestError
    REMEDY = "Delete it; its subsets are then measured again."

    measured: tuple[Measured, ...] = ()


def ablate(
    run: RunDir,
    texts: Mapping[str, Text],
    subsets: Sequence[Subset],
    *,
    device: str = "cpu",
    on_subset: Callable[[Subset, float], None] = lambda subset, mean: None,
) -> dict[str, Any]:
    """Return the perplexity of the uniform average of each subset of experts on each text, lowest mean first.

    Every result is written to evaluation/ablation.json at once; subsets with a result for the same experts and texts
    are not measured again. Raises ForestError for an unknown expert, CheckpointError for experts of different shapes.
    """
    path = run.results.with_name("ablation.json")
    hashes = {name: read_expert(run.model(name)).content_hash for subset in subsets for name in subset}
    measured = {one.key: one for one in (Ablation.find(path) or Ablation()).measured}
    rows = []
    vocabulary = Tokenizer.load(run.tokenizer).vocab_size
    for subset in subsets:
        key = _key([hashes[name] for name in subset], [text.fingerprint for text in texts.values()])
        if key not in measured:
            losses = _average_losses(run, subset, texts, vocabulary, device)
            if not all(loss <= MAX_LOSS for loss in losses.values()):  # NaN is not
                name = " + ".join(subset)
                logger.warning("the average of %s diverged: its losses are %s nats per token; left out", name, losses)
                continue
            perplexity = {name: math.exp(loss) for name, loss in losses.items()}
            mean = sum(perplexity.values()) / len(perplexity)
            measured[key] = Measured(key=key, experts=subset, mean=mean, perplexity=perplexity)
            with alone(run.ablation_lock):
                make_directory(path.parent)
                measured |= {one.key: one for one in (Ablation.find(path) or Ablation()).measured}
                Ablation(measured=tuple(measured.values())).save(path)
        rows.append(measured[key].model_copy(update={"experts": subset}))  # which may have other names now
        on_subset(subset, measured[key].mean)
    rows.sort(key=lambda row: row.mean)
    return {
        "texts": {name: {"tokens": _targets(text)} for name, text in texts.items()},
        "ranking": [
            {
                "rank": rank,
                "experts": list(row.experts),
                "mean": row.mean,
                "perplexity": dict(zip(texts, row.perplexity.values(), strict=True)),
            }
            for rank, row in enumerate(rows, 1)
        ],
    }


def _targets(text: Text) -> int:
    return len(text.tokens) - 1 if text.counted is None else int(np.count_nonzero(text.counted))


def choose_subsets(run: RunDir, names: Sequence[str], *, most: int, random_seed: int = 0) -> list[Subset]:
    """Return all subsets of the experts (default: the forest's), or `most`: each expert alone, all, and random ones.

    Raises ForestError for an unknown expert, UserError if `most` is too low.
    """
    forest = list(require_experts(run))
    if unknown := [name for name in names if name not in forest]:
        raise ForestError(unknown_name("expert", unknown[0], forest))
    chosen = sorted(set(names)) or forest
    if 2 ** len(chosen) - 1 <= most:
        return [subset for size in range(1, len(chosen) + 1) for subset in combinations(chosen, size)]
    required: list[Subset] = [*((name,) for name in chosen), tuple(chosen)]
    if most < len(required):
        raise UserError(
            f"{most} subsets are too few for {len(chosen)} experts: each expert alone and all together are "
            f"{len(required)} subsets. Raise --subsets, or choose fewer experts."
        )
    return required + list(_random_subsets(chosen, most - len(required), set(required), random_seed))


def run_texts(config: RunConfig, run: RunDir, domains: Sequence[str], split: str | None) -> dict[str, Text]:
    """Return the run's evaluation text of each domain (default: all). Raises UserError for an unknown domain."""
    from btm_scale.forest.scores import evaluation_text

    texts = {}
    for domain in domains or config.all_domains:
        if domain not in config.all_domains:
            raise UserError(unknown_name("domain", domain, config.all_domains))
        text = evaluation_text(config, run, domain, split or config.evaluate.split)
        texts[domain] = Text(text.tokens, text.block_starts, text.fingerprint, text.counted)
    return texts


def file_text(config: RunConfig, run: RunDir, path: Path) -> Text:
    """Return a plain text file as one document. Raises UserError if it cannot be read or is empty."""
    tokenizer = Tokenizer.load(run.tokenizer)
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}. Give a text file.") from None
    if not ids:
        raise UserError(f"{path} is empty. Give a file that contains text.")
    tokens = np.array([tokenizer.start, *ids], dtype=np.int64)
    length = config.budget.sequence_length
    starts = np.arange(0, len(ids), length, dtype=np.int64)
    digest = hashlib.sha256(tokens.tobytes() + f"{tokenizer.digest} {length}".encode()).hexdigest()
    return Text(tokens, starts, digest)


def average_losses(
    run: RunDir, weights: Mapping[str, float], texts: Mapping[str, Text], vocabulary: int, device: str
) -> dict[str, float]:
    """Return the loss on each text, in nats per token, of the average of models with positive weights."""
    with scratch_directory(run.root / "ablation") as folder:
        directory = run.model(next(iter(weights)))
        if len(weights) > 1:
            directory = folder / "average"
            inputs = [(run.model(name), weight) for name, weight in weights.items()]
            merge(directory, inputs, dtype=promoted_dtype(model for model, _ in inputs), with_recipe=False)
        decoder = Decoder.load(directory, vocabulary=vocabulary, device=device)
        scores = {name: block_log_probs(decoder, text.tokens, text.block_starts) for name, text in texts.items()}
    scores |= {name: scores[name][text.counted] for name, text in texts.items() if text.counted is not None}
    return {name: -float(np.mean(values, dtype=np.float64)) for name, values in scores.items()}


def _average_losses(
    run: RunDir, subset: Subset, texts: Mapping[str, Text], vocabulary: int, device: str
) -> dict[str, float]:
    """Return the loss of the uniform average of a subset on each text, in nats per token."""
    return average_losses(run, dict.fromkeys(subset, 1.0), texts, vocabulary, device)


def _random_subsets(names: Sequence[str], count: int, seen: set[Subset], random_seed: int) -> Iterator[Subset]:
    chooser = random.Random(random_seed)
    while count:
        subset = tuple(name for name in names if chooser.random() < 0.5)
        if subset and subset not in seen:
            seen.add(subset)
            count -= 1
            yield subset


def _key(experts: Sequence[str], texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([experts, texts]).encode()).hexdigest()
