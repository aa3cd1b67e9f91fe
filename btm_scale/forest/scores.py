"""Scores on disk: one log-probability per target token. Reading them needs no engine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from btm_scale.config.run import RunConfig
from btm_scale.data.eval_text import EvaluationText
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.errors import ForestError
from btm_scale.forest.expert import read_expert
from btm_scale.forest.posterior.prior import cached_prior, static_prior
from btm_scale.run_dir import RunDir
from btm_scale.util.files import make_directory, write_file

DevPrior = Literal["cached", "static"]  # those that are estimated from dev text
_OPTIONAL = ("routing", "routing_entropy", "counted")  # tensors that only some scores have


@dataclass(frozen=True)
class Scores:
    """A model's log-probabilities of a text in nats."""

    log_probs: np.ndarray  # float32 [tokens]
    block_starts: np.ndarray  # int64 [blocks]
    model: str  # `scored_hash` of the model's card
    fingerprint: str  # of the text's tokens
    device: str = ""  # that scored the text; empty in files of earlier versions
    kernels: str = ""  # triton or reference
    # Of a mixture of experts: each expert's fraction of a layer's uses, float64 [layers, experts].
    routing: np.ndarray | None = None
    routing_entropy: np.ndarray | None = None  # the mean entropy of a layer's router in nats, float64 [layers]
    counted: np.ndarray | None = None  # of conversations: the tokens of answers, bool [tokens]

    def save(self, path: Path) -> None:
        """Write the scores atomically."""
        make_directory(path.parent)
        metadata = {"model": self.model, "data_fingerprint": self.fingerprint}
        metadata |= {"device": self.device, "kernels": self.kernels}
        tensors = {"log_probs": self.log_probs, "block_starts": self.block_starts}
        optional = {name: getattr(self, name) for name in _OPTIONAL}
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        write_file(path, with_sorted_header(save(tensors, metadata)))

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Load scores. Raises ForestError if they are missing or damaged."""
        if not path.is_file():
            raise ForestError(f"There are no scores at {path}. Score this model first: btm-scale score RUN")
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                names = ("log_probs", "block_starts")
                keys = ("model", "data_fingerprint", "device", "kernels")
                optional = {name: file.get_tensor(name) for name in set(_OPTIONAL) & set(file.keys())}
                log_probs, block_starts = (file.get_tensor(name) for name in names)
                model, fingerprint, device, kernels = (metadata.get(key, "") for key in keys)
                scores = cls(log_probs, block_starts, model, fingerprint, device, kernels, **optional)
            problem = scores._problem()
        except (OSError, SafetensorError) as error:
            problem = str(error)
        if problem:
            raise ForestError(
                f"The scores at {path} are damaged ({problem}). Score the model again: btm-scale score RUN"
            )
        return scores

    def _problem(self) -> str | None:
        """Return why these cannot be the scores of a text, or None."""
        starts, log_probs = self.block_starts, self.log_probs
        if log_probs.dtype != np.float32 or log_probs.ndim != 1 or not len(log_probs):
            return f"log_probs is {log_probs.dtype} {list(log_probs.shape)}, and must be float32 [tokens]"
        if starts.dtype != np.int64 or starts.ndim != 1 or not len(starts):
            return f"block_starts is {starts.dtype} {list(starts.shape)}, and must be int64 [blocks]"
        if starts[0] != 0 or starts[-1] >= len(log_probs) or np.any(starts[1:] <= starts[:-1]):
            return f"block_starts must increase from 0 to below {len(log_probs)}"
        if self.counted is not None and (self.counted.dtype != np.bool_ or self.counted.shape != log_probs.shape):
            return f"counted is {self.counted.dtype} {list(self.counted.shape)}, and must be bool [{len(log_probs)}]"
        return None if self.model and self.fingerprint else "the metadata lacks model or data_fingerprint"


def with_sorted_header(content: bytes) -> bytes:
    """Return a safetensors file with its header in a fixed order; the library's differs between processes."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + content[end:]


def scored_model(path: Path) -> str | None:
    """Return the `scored_hash` of the scored model, or None if the scores are missing or damaged."""
    return scored(path)[0]


def scored(path: Path) -> tuple[str | None, int]:
    """Return the `scored_hash` of the scored model and the number of tokens; (None, 0) without intact scores."""
    if not path.is_file():
        return None, 0
    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("model"), file.get_slice("log_probs").get_shape()[0]
    except (OSError, SafetensorError, IndexError):
        return None, 0


def scored_on(path: Path) -> tuple[str, str]:
    """Return the device and the kernels that scored a text, from the metadata alone; empty where not recorded."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    return metadata.get("device", ""), metadata.get("kernels", "")


def all_texts(config: RunConfig) -> list[tuple[str, str]]:
    """Return every (domain, split) that an expert is scored on."""
    splits = dict.fromkeys(["dev", config.evaluate.split])
    return [(domain, split) for domain in config.all_domains for split in splits]


def evaluation_text(config: RunConfig, run: RunDir, domain: str, split: str) -> EvaluationText:
    """Return the text that every model is scored on: the split's first documents in a fixed random order."""
    tokens = _most_tokens(config, split)
    return EvaluationText.load(run, domain, split, tokens=tokens, sequence_length=config.budget.sequence_length)


def _most_tokens(config: RunConfig, split: str) -> int:
    tokens = config.evaluate.tokens_per_domain
    if split == "dev" and config.evaluate.split != "dev":
        tokens = min(tokens, config.evaluate.dev_blocks * config.budget.sequence_length)
    return tokens


def scored_tokens(config: RunConfig, run: RunDir, domain: str, split: str) -> int | None:
    """Return how many tokens `evaluation_text` has, without reading them; None if the domain is not prepared."""
    path = run.fingerprint(domain)
    if not path.is_file():
        return None
    return min(_most_tokens(config, split), _tokens_of_splits(path, path.stat().st_mtime_ns)[split] - 1)


@lru_cache(maxsize=1024)
def _tokens_of_splits(path: Path, modified: int) -> dict[str, int]:
    """Return the tokens of each split of a domain; `modified` is part of the cache key."""
    return {split: counts.tokens for split, counts in Fingerprint.load(path).splits.items()}


def missing_scores(
    config: RunConfig, run: RunDir, model: str, texts: Iterable[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return those of `texts` for which the current model has no scores, or scores of a shorter or longer text."""
    current = read_expert(run.model(model)).scored_hash
    missing = []
    for text in texts:
        scored_hash, tokens = scored(run.scores(model, *text))
        if scored_hash != current or tokens != (scored_tokens(config, run, *text) or tokens):
            missing.append(text)
    return missing


def has_scores(config: RunConfig, run: RunDir, model: str, domain: str, split: str) -> bool:
    """Return whether a model has scores of the text that is to be scored; damaged ones count, and loading raises."""
    path = run.scores(model, domain, split)
    if not path.is_file():
        return False
    _, tokens = scored(path)
    return not tokens or tokens == (scored_tokens(config, run, domain, split) or tokens)


@dataclass(frozen=True)
class Stack:
    """Log-probabilities [models, tokens] in nats, and block starts [blocks].

    `counted`, bool [tokens], are the tokens of answers in conversations; None if every token counts.
    """

    log_probs: np.ndarray
    block_starts: np.ndarray
    counted: np.ndarray | None = None

    @classmethod
    def load(cls, run: RunDir, models: Sequence[str], domain: str, split: str) -> Stack:
        """Load every model's scores. Raises ForestError if any are missing or are of another text."""
        scores = [Scores.load(run.scores(model, domain, split)) for model in models]
        for model, other in zip(models, scores, strict=True):
            same_blocks = np.array_equal(other.block_starts, scores[0].block_starts)
            same_tokens = other.log_probs.shape == scores[0].log_probs.shape
            if other.fingerprint != scores[0].fingerprint or not (same_blocks and same_tokens):
                raise ForestError(
                    f"'{model}' and '{models[0]}' were scored on different texts of '{domain}'. "
                    "Delete both models' scores and score them again: btm-scale score RUN"
                )
        # Scores of an earlier version lack it.
        counted = next((other.counted for other in scores if other.counted is not None), None)
        return cls(np.stack([other.log_probs for other in scores]), scores[0].block_starts, counted)

    @classmethod
    def joined(cls, stacks: Sequence[Stack]) -> Stack:
        """Concatenate the texts of stacks with the same models."""
        offsets = np.cumsum([0, *(stack.log_probs.shape[1] for stack in stacks[:-1])])
        starts = [stack.block_starts + offset for stack, offset in zip(stacks, offsets, strict=True)]
        counted = None
        if any(stack.counted is not None for stack in stacks):
            every = [
                np.ones(stack.log_probs.shape[1], bool) if stack.counted is None else stack.counted for stack in stacks
            ]
            counted = np.concatenate(every)
        return cls(np.concatenate([stack.log_probs for stack in stacks], axis=1), np.concatenate(starts), counted)


def dev_prior(run: RunDir, models: Sequence[str], domain: str, prior: DevPrior = "cached") -> np.ndarray:
    """Return log p(D=j) [models] of a domain in nats, estimated from its dev text."""
    return prior_of(Stack.load(run, models, domain, "dev"), prior)


def prior_of(dev: Stack, prior: DevPrior = "cached") -> np.ndarray:
    """Return log p(D=j) [models] in nats, estimated from dev text."""
    if prior == "static":
        return static_prior(dev.log_probs, dev.counted)
    return cached_prior(dev.log_probs, dev.block_starts)
