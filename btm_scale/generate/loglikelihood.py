"""How likely given text is to a run's method: what other people's benchmarks ask of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from btm_scale.config.run import RunConfig
from btm_scale.errors import UserError, unknown_name
from btm_scale.forest.average_models import average_model, made_model
from btm_scale.forest.methods import ENSEMBLE, METHODS, Average, Ensemble, find
from btm_scale.forest.posterior.log_weights import logsumexp
from btm_scale.forest.posterior.mixture import mixture_log_probs
from btm_scale.forest.priors import log_prior_of, models_of
from btm_scale.generate.generator import Generator
from btm_scale.kernels import mix_sample
from btm_scale.run_dir import DENSE, SEED, RunDir

Tokens = Sequence[int]


def generator_of_method(
    config: RunConfig, run: RunDir, method: str, *, domain: str | None = None, **settings: Any
) -> Generator:
    """A method of results.json as something that reads and writes text: an ensemble, or one model.

    `ensemble` has the config's posterior; an average that differs between domains needs a `domain`. Raises
    UserError for an unknown method.
    """
    row, value = find(method)
    if method == ENSEMBLE:
        prior = "uniform" if config.evaluate.prior == "uniform" and domain is None else "cached"
        chosen: dict[str, Any] = {"posterior": config.evaluate.posterior, "prior": prior, "domain": domain}
    elif isinstance(row, Ensemble) and row.mode is not None:
        chosen = {"posterior": row.mode, "prior": row.prior, "domain": domain}
    elif method in (SEED, DENSE):
        chosen = {"models": [method]}
    elif row is not None and row.kind == "expert":
        chosen = {"models": [value]}
    elif isinstance(row, Average) and row.is_expert and domain is not None:
        names = models_of(run, ())
        log_prior = log_prior_of(config, run, names, "cached", domain)
        chosen = {"models": [average_model(row.key, domain, names, log_prior)]}
    elif isinstance(row, Average) and (domain is not None or not row.per_domain):
        chosen = {"models": [made_model(row.key, domain or "")]}
    elif isinstance(row, Average):
        raise UserError(f"'{method}' is a different model for each domain; add domain=NAME")
    else:
        raise UserError(unknown_name("method", method, _readable()))
    return Generator.of_run(config, run, method="mixture", **chosen, **settings)


def _readable() -> list[str]:
    """The names of the methods that read and write text."""
    ensembles = [row.name for row in METHODS if isinstance(row, Ensemble) and row.mode is not None]
    averages = [row.name for row in METHODS if isinstance(row, Average)]
    return [ENSEMBLE, *ensembles, SEED, DENSE, *averages, "expert:NAME"]


def score_continuations(generator: Generator, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
    """For each (context, continuation): the continuation's log-probability in nats, and whether each of its tokens is
    the mixture's likeliest.

    A context that doesn't fit loses its beginning. Raises UserError for a continuation that no context fits beside.
    """
    contexts = [_fitting(generator, context, continuation) for context, continuation in pairs]
    lengths = np.array([len(continuation) for _, continuation in pairs])
    padded = np.zeros((len(pairs), lengths.max()), dtype=np.int64)
    for row, (_, continuation) in enumerate(pairs):
        padded[row, : len(continuation)] = continuation
    readings, running = generator.begin(contexts)
    total, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)
    for place in range(padded.shape[1]):
        going = place < lengths
        tokens = torch.as_tensor(padded[:, place], device=readings[0].logits.device)
        weights = running.log_weights()
        log_probs = torch.stack([reading.next_log_probs(tokens) for reading in readings], dim=1).cpu().numpy()
        total += np.where(going, logsumexp((weights + log_probs).T), 0.0)
        logits = torch.stack([reading.logits for reading in readings])
        likeliest, _ = mix_sample(logits, torch.as_tensor(weights, device=tokens.device).float(), temperature=0)
        greedy &= ~going | (likeliest == tokens).cpu().numpy()
        running.observe(log_probs, going)
        if place + 1 < padded.shape[1]:
            for reading in readings:
                reading.feed(tokens)
    return list(zip(np.minimum(total, 0.0).tolist(), greedy.tolist(), strict=True))


def score_windows(generator: Generator, windows: Sequence[tuple[Tokens, int]]) -> list[float]:
    """Of each text, the log-probability in nats of its last so many tokens; all but the last token must fit the
    context."""
    texts = [text for text, _ in windows]
    scores = [generator.shelf.take(name).read(texts).log_probs for name in generator.names]
    stacked = torch.stack([score for score in scores if score is not None]).cpu().numpy()
    totals = []
    for row, (text, counted) in enumerate(windows):
        mixed = mixture_log_probs(
            stacked[:, row, stacked.shape[2] - (len(text) - 1) :],
            np.zeros(1, np.int64),
            log_prior=generator.log_prior,
            mode=generator.mode,
            tempering=generator.tempering,
        )
        totals.append(float(mixed[-counted:].sum()))
    return totals


def _fitting(generator: Generator, context: Tokens, continuation: Tokens) -> Tokens:
    # The last token is predicted and never read.
    room = generator.context + 1 - len(continuation)
    if room < 1:
        raise UserError(
            f"a continuation of {len(continuation)} tokens leaves no room for context in the {generator.context} that "
            "these experts read; use a task of shorter texts"
        )
    return context[-room:]
