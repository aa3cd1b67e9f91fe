"""Log-probabilities of a prompt's tokens under the mixture, with the most likely tokens in their place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.generate.running_batch import Alternatives, alternatives_of
from btm_scale.kernels import mix_logits
from btm_scale.model.hf_decoder import Decoder

# Logits in memory at a time, of all models together (64 MB of float32).
_MAX_LOGITS = 2**24


@torch.no_grad()
def prompt_scores(
    decoders: Sequence[Decoder], prompt: Sequence[int], posterior: RunningPosterior, top: int
) -> list[Alternatives]:
    """Return the score of each token of a prompt but the first, under the mixture; updates `posterior` of one text."""
    readings = [decoder.read([prompt[:1]], score=False) for decoder in decoders]
    scores: list[Alternatives] = []
    columns = max(1, _MAX_LOGITS // (len(decoders) * decoders[0].vocabulary))
    for first in range(1, len(prompt), columns):
        piece = torch.tensor([prompt[first : first + columns]], device=readings[0].logits.device)
        before = [reading.logits for reading in readings]
        # The logits before each token of the piece: [models, tokens, vocabulary].
        logits = torch.stack(
            [torch.cat([last, reading.extend(piece)[0, :-1]]) for last, reading in zip(before, readings, strict=True)]
        )
        gains = logits.double().log_softmax(2).gather(2, piece[0].expand(len(readings), -1)[:, :, None]).squeeze(2)
        log_probs = gains.clamp_(max=0.0).cpu().numpy()
        weights = np.empty((log_probs.shape[1], len(readings)))
        for position in range(log_probs.shape[1]):
            weights[position] = posterior.log_weights()[0]
            posterior.observe(log_probs[None, :, position])
        mixed = mix_logits(logits, torch.as_tensor(weights, dtype=torch.float32, device=logits.device))
        scores += alternatives_of(mixed, piece[0], top)
    return scores


def weights_after(
    posterior: RunningPosterior, scores: Sequence[torch.Tensor], prompt: Sequence[int]
) -> list[list[float]]:
    """Return the weights [tokens of the prompt, experts] after each token, from left-padded scores [1, tokens]."""
    log_probs = torch.cat(list(scores)).double().cpu().numpy()[:, len(scores[0][0]) - (len(prompt) - 1) :]
    weights = [np.exp(posterior.log_weights()[0]).tolist()]
    for position in range(log_probs.shape[1]):
        posterior.observe(log_probs[None, :, position])
        weights.append(np.exp(posterior.log_weights()[0]).tolist())
    return weights
