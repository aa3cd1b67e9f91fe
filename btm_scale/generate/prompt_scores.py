"""Log-probabilities of a prompt's tokens under the mixture, with the most likely tokens in their place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.forest.posterior.log_weights import logsumexp
from btm_scale.generate.running_batch import Alternatives, alternatives_of
from btm_scale.generate.sampling import refuse_nan, token_log_probs
from btm_scale.generate.together import Together
from btm_scale.kernels import mix_logits

# Logits in memory at a time, of all models together (64 MB of float32).
_MAX_LOGITS = 2**24


@torch.no_grad()
def prompt_scores(
    together: Together, prompt: Sequence[int], posterior: RunningPosterior, top: int
) -> list[Alternatives]:
    """Return the score of each token of a prompt but the first, under the mixture; updates `posterior` of one text.

    With `top` 0 this reads and scores the prompt again; `scores_without_alternatives` takes scores that are known. Like
    the other functions here, it raises `FloatingPointError` if a score is NaN.
    """
    if top == 0:
        return scores_without_alternatives(together.score([prompt])[:, 0], prompt, posterior)
    reading = together.read([prompt[:1]], score=False)
    scores: list[Alternatives] = []
    columns = max(1, _MAX_LOGITS // reading.logits[:, 0].numel())
    for first in range(1, len(prompt), columns):
        piece = torch.tensor([prompt[first : first + columns]], device=reading.device)
        # The logits before each token of the piece: [models, tokens, vocabulary].
        before = reading.logits
        logits = torch.cat([before, reading.extend(piece)[:, 0, :-1]], dim=1)
        log_probs = token_log_probs(logits, piece[0]).cpu().numpy()
        refuse_nan(log_probs)
        weights = np.empty_like(log_probs)
        for position in range(len(log_probs)):
            weights[position] = posterior.log_weights()[0]
            posterior.observe(log_probs[position][None])
        mixed = mix_logits(logits, torch.as_tensor(weights, dtype=torch.float32, device=logits.device))
        scores += alternatives_of(mixed, piece[0], top)
    return scores


def scores_without_alternatives(
    scores: torch.Tensor, prompt: Sequence[int], posterior: RunningPosterior
) -> list[Alternatives]:
    """Return what `prompt_scores` does with `top` 0, of left-padded scores [experts, tokens]; updates `posterior`."""
    found = []
    for log_probs in _of_prompt(scores, prompt).T:
        mixed = logsumexp(posterior.log_weights()[0] + log_probs)
        found.append(Alternatives(min(float(mixed), 0.0)))
        posterior.observe(log_probs[None])
    return found


def weights_after(posterior: RunningPosterior, scores: torch.Tensor, prompt: Sequence[int]) -> list[list[float]]:
    """Return the weights [tokens of the prompt, experts] after each token, of left-padded scores [experts, tokens]."""
    log_probs = _of_prompt(scores, prompt)
    weights = [np.exp(posterior.log_weights()[0]).tolist()]
    for position in range(log_probs.shape[1]):
        posterior.observe(log_probs[None, :, position])
        weights.append(np.exp(posterior.log_weights()[0]).tolist())
    return weights


def _of_prompt(scores: torch.Tensor, prompt: Sequence[int]) -> np.ndarray:
    """Return float64 [experts, tokens of the prompt but the first], without padding."""
    log_probs: np.ndarray = scores.double().cpu().numpy()[:, scores.shape[1] - (len(prompt) - 1) :]
    refuse_nan(log_probs)
    return log_probs
