"""How likely given text is to a run's method: what other people's benchmarks ask of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from btm_scale.config.run import RunConfig
from btm_scale.errors import UserError
from btm_scale.forest.methods import average_model
from btm_scale.forest.posterior.log_weights import logsumexp
from btm_scale.forest.posterior.mixture import mixture_log_probs
from btm_scale.forest.priors import log_prior_of, models_of
from btm_scale.generate.generator import Generator
from btm_scale.kernels import mix_sample
from btm_scale.run_dir import AVERAGE, DENSE, SEED, RunDir

Tokens = Sequence[int]
_ENSEMBLES: dict[str, dict[str, str]] = {
    "ensemble:prefix": {"posterior": "prefix"},
    "ensemble:token": {"posterior": "token"},
    "ensemble:tempered": {"posterior": "tempered"},
    "ensemble:uniform-prior": {"posterior": "prefix", "prior": "uniform"},
    "ensemble:equal": {"posterior": "fixed", "prior": "uniform"},
}


def generator_of_method(
    config: RunConfig, run: RunDir, method: str, *, domain: str | None = None, **settings: Any
) -> Generator:
    """A method of results.json as something that reads and writes text: an ensemble, or one model.

    `ensemble` has the config's posterior; an average other than the uniform one is of a `domain`. Raises UserError for
    a method that there isn't.
    """
    kind, _, name = method.partition(":")
    if method == "ensemble":
        prior = "uniform" if config.evaluate.prior == "uniform" and domain is None else "cached"
        chosen: dict[str, Any] = {"posterior": config.evaluate.posterior, "prior": prior, "domain": domain}
    elif method in _ENSEMBLES:
        chosen = {"domain": domain} | _ENSEMBLES[method]
    elif method in (SEED, DENSE):
        chosen = {"models": [method]}
    elif kind == "expert" and name:
        chosen = {"models": [name]}
    elif method == "average:uniform":
        chosen = {"models": [f"{AVERAGE}{name}"]}
    elif method == "average:argmax" and domain is not None:
        names = models_of(run, ())
        log_prior = log_prior_of(config, run, names, "cached", domain)
        chosen = {"models": [average_model(name, domain, names, log_prior)]}
    elif kind == "average" and name and domain is not None:
        chosen = {"models": [f"{AVERAGE}{name}/{domain}"]}
    else:
        raise UserError(
            f"no method is called '{method}'{' without a domain' if kind == 'average' else ''}; choose ensemble, "
            f"{', '.join(_ENSEMBLES)}, seed, dense, expert:NAME, average:uniform, or average:KIND with domain=NAME"
        )
    return Generator.of_run(config, run, method="mixture", **chosen, **settings)


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
