"""Log-likelihoods of given text under a run's method, as evaluation benchmarks need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from btm_scale.config.run import RunConfig
from btm_scale.errors import UserError, unknown_name
from btm_scale.forest.average_models import average_model, made_model
from btm_scale.forest.methods import ENSEMBLE, METHODS, Average, Ensemble, find
from btm_scale.forest.posterior.evidence import Mode, RunningPosterior
from btm_scale.forest.posterior.log_weights import logsumexp
from btm_scale.forest.posterior.mixture import mixture_log_probs
from btm_scale.forest.priors import generation_tempering, log_prior_of, models_of
from btm_scale.generate.generator import Generator
from btm_scale.generate.sampling import refuse_nan, token_log_probs
from btm_scale.kernels import mix_sample
from btm_scale.run_dir import DENSE, MOE, SEED, RunDir

Tokens = Sequence[int]

# Logits in memory at a time, of all models and texts together (64 MB of float32).
_MAX_LOGITS = 2**24


def generator_of_method(
    config: RunConfig, run: RunDir, method: str, *, domain: str | None = None, **settings: Any
) -> Generator:
    """Return a generator for a method of results.json: an ensemble or a single model.

    `ensemble` has the config's posterior and prior; with `updating`, every text starts from the cached prior, as the
    first block does. An average that differs between domains needs a `domain`.

    Raises:
        UserError: the method is unknown, or can only be evaluated.
    """
    row, value = find(method)
    if method == ENSEMBLE:
        prior = "cached" if config.evaluate.prior == "updating" else config.evaluate.prior
        options = _mixture(config, run, config.evaluate.posterior, prior, domain)
    elif isinstance(row, Ensemble) and row.mode is not None:
        options = _mixture(config, run, row.mode, row.prior, domain)
    elif isinstance(row, Ensemble):
        raise UserError(
            f"'{method}' is only evaluated, from the experts' scores; it cannot score or generate other text. Choose "
            f"one of {', '.join(_method_names())}."
        )
    elif method in (SEED, DENSE, MOE):
        options = {"models": [method]}
    elif row is not None and row.kind == "expert":
        options = {"models": [value]}
    elif isinstance(row, Average) and row.is_expert and domain is not None:
        names = models_of(run, ())
        log_prior = log_prior_of(config, run, names, "cached", domain)
        options = {"models": [average_model(row.key, domain, names, log_prior)]}
    elif isinstance(row, Average) and (domain is not None or not row.per_domain):
        options = {"models": [made_model(row.key, domain or "")]}
    elif isinstance(row, Average):
        raise UserError(f"'{method}' is a different model for each domain. Set domain=NAME.")
    else:
        raise UserError(unknown_name("method", method, _method_names()))
    return Generator.of_run(config, run, method="mixture", **options, **settings)


def _mixture(config: RunConfig, run: RunDir, posterior: Mode, prior: str, domain: str | None) -> dict[str, Any]:
    """Return the options of a mixture; a uniform prior has the tempering of the cached one, as in results.json."""
    options: dict[str, Any] = {"posterior": posterior, "prior": prior}
    if prior != "uniform":
        return options | {"domain": domain}
    if domain is not None and domain not in config.all_domains:
        raise UserError(unknown_name("domain", domain, config.all_domains))
    if posterior == "tempered":
        names = models_of(run, ())
        cached = log_prior_of(config, run, names, "cached", domain)
        options["tempering"] = generation_tempering(config, run, names, cached, domain)
    return options


def _method_names() -> list[str]:
    """Return the names of the methods that can score and generate text."""
    ensembles = [row.name for row in METHODS if isinstance(row, Ensemble) and row.mode is not None]
    averages = [row.name for row in METHODS if isinstance(row, Average)]
    return [ENSEMBLE, *ensembles, SEED, DENSE, MOE, *averages, "expert:NAME"]


def score_continuations(generator: Generator, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
    """Return the log-probability in nats of each continuation, and whether greedy decoding would give it.

    `pairs` are (context, continuation). Contexts that do not fit are truncated from the left. Raises `UserError` for a
    continuation that leaves no room for a context, and `FloatingPointError` if a log-probability is NaN.
    """
    contexts = [_fitting(generator, context, continuation) for context, continuation in pairs]
    lengths = np.array([len(continuation) for _, continuation in pairs])
    padded = np.zeros((len(pairs), lengths.max()), dtype=np.int64)
    for row, (_, continuation) in enumerate(pairs):
        padded[row, : len(continuation)] = continuation
    reading, running = generator.begin(contexts)
    total, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)
    columns = max(1, _MAX_LOGITS // reading.logits.numel())
    for first in range(0, padded.shape[1], columns):
        tokens = torch.as_tensor(padded[:, first : first + columns], device=reading.device)
        logits = reading.logits.unsqueeze(2)  # before the first token: [models, pairs, 1, vocabulary]
        if tokens.shape[1] > 1:
            logits = torch.cat([logits, reading.extend(tokens[:, :-1])], dim=2)
        active = np.arange(first, first + tokens.shape[1]) < lengths[:, None]
        nats, most_likely = _mixed(logits, tokens, running, active)
        total += nats
        greedy &= (~active | (most_likely == tokens).cpu().numpy()).all(axis=1)
        if first + columns < padded.shape[1]:
            reading.feed(tokens[:, -1])
    return list(zip(np.minimum(total, 0.0).tolist(), greedy.tolist(), strict=True))


def _mixed(
    logits: torch.Tensor, tokens: torch.Tensor, running: RunningPosterior, active: np.ndarray
) -> tuple[np.ndarray, torch.Tensor]:
    """Return the nats of each pair's active tokens, [pairs], and the most likely token in the place of each.

    Updates the posterior. `logits` are [models, pairs, tokens, vocabulary]; `tokens` and `active` [pairs, tokens].
    """
    flat = logits.flatten(1, 2)
    log_probs = token_log_probs(flat, tokens.flatten()).cpu().numpy().reshape(*active.shape, len(logits))
    refuse_nan(log_probs)
    weights, nats = np.empty_like(log_probs), np.zeros(len(active))
    for position in range(active.shape[1]):
        weights[:, position] = running.log_weights()
        mixed = logsumexp((weights[:, position] + log_probs[:, position]).T)
        nats += np.where(active[:, position], mixed, 0.0)
        running.observe(log_probs[:, position], active[:, position])
    rows = torch.as_tensor(weights.reshape(-1, len(logits)), device=logits.device).float()
    most_likely, _ = mix_sample(flat, rows, temperature=0)
    return nats, most_likely.view_as(tokens)


def score_windows(generator: Generator, windows: Sequence[tuple[Tokens, int]]) -> list[float]:
    """Return the log-probability in nats of the last tokens of each text.

    `windows` are (text, number of tokens to score). All but a text's last token must fit the context. Raises
    `FloatingPointError` if a log-probability is NaN.
    """
    texts = [text for text, _ in windows]
    stacked = generator.shelf.take_together(generator.names, "A mixture").score(texts).cpu().numpy()
    refuse_nan(stacked)
    totals = []
    for row, (text, count) in enumerate(windows):
        mixed = mixture_log_probs(
            stacked[:, row, stacked.shape[2] - (len(text) - 1) :],
            np.zeros(1, np.int64),
            log_prior=generator.log_prior,
            mode=generator.mode,
            tempering=generator.tempering,
        )
        totals.append(float(mixed[-count:].sum()))
    return totals


def _fitting(generator: Generator, context: Tokens, continuation: Tokens) -> Tokens:
    # The last token is predicted but not read.
    room = generator.context + 1 - len(continuation)
    if room < 1:
        raise UserError(
            f"A continuation of {len(continuation)} tokens leaves no room for context. These experts read at most "
            f"{generator.context} tokens: use a task with shorter texts."
        )
    return context[-room:]
