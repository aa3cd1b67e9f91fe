"""A model on disk as transformers runs it: a prompt is read once, then text goes on token by token from the cache.

transformers serves here and Megatron-core elsewhere because its caches know every family, on CPU and GPU alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btm_scale.errors import CheckpointError, UserError
from btm_scale.model.hf_load import load_causal_lm, load_config

# Logits that are in memory at once while a prompt is read (256 MB of float32).
_LOGITS_AT_ONCE = 2**26


def limits_of(directory: Path) -> tuple[int, int]:
    """The longest text in tokens, and the rows of the vocabulary, of a Hugging Face directory.

    Raises CheckpointError if its config can't be read.
    """
    config = load_config(directory)
    try:
        return int(config.max_position_embeddings), int(config.vocab_size)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / 'config.json'} does not describe a causal LM: {error}.") from None


class Decoder:
    """A causal language model; `read` begins texts with it, a batch at a time."""

    def __init__(self, model: Any, *, vocabulary: int | None = None) -> None:
        """`vocabulary`: real rows of the head; later rows are padding and never a token."""
        self.model = model.eval()
        self.vocabulary = vocabulary or model.config.vocab_size
        # Rounded logits would shift the posterior's log-odds: from the hidden state on, all is float32.
        head = model.get_output_embeddings()
        model.set_output_embeddings(_Float32Head(head))

    @classmethod
    def load(cls, directory: Path, *, vocabulary: int | None = None, device: str = "cpu") -> Decoder:
        """A Hugging Face directory, in the type of its weights. Raises CheckpointError for one that can't be read."""
        return cls(load_causal_lm(directory).to(device), vocabulary=vocabulary)

    @property
    def positions(self) -> int:
        """The longest text in tokens."""
        return int(self.model.config.max_position_embeddings)

    def read(self, prompts: Sequence[Sequence[int]], *, score: bool = True) -> Reading:
        """Begin a batch of texts from prompts of at least one token each; with `score`, score the prompts too."""
        return Reading(self, prompts, score)


class Reading:
    """A batch of texts under one model: what its cache holds, and what may come next."""

    logits: Tensor
    """float32 [batch, vocabulary] of the next token."""
    log_probs: Tensor | None
    """float32 [batch, longest prompt - 1] nats: each prompt's tokens from its second on, ends aligned, 0 before."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], score: bool) -> None:
        from transformers import DynamicCache

        self._decoder = decoder
        self._device = decoder.model.device
        self._cache = DynamicCache(config=decoder.model.config)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        # Prompts end together, so that all go on at one place; what stands before a shorter one is never attended to.
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        self._seen = (torch.arange(longest) >= longest - lengths[:, None]).to(self._device)
        self._padded = bool((lengths < longest).any())
        self._length = 0
        self.log_probs = self._read(ids.to(self._device), score)

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> None:
        """Append one token to each text, int64 [batch]."""
        seen = torch.ones(len(tokens), 1, dtype=torch.bool, device=self._device)
        self._seen = torch.cat([self._seen, seen], dim=1)
        self.logits = self._forward(tokens.to(self._device).unsqueeze(1), keep=1)[:, -1]

    def next_log_probs(self, tokens: Tensor) -> Tensor:
        """Log-probability in nats of a next token for each text, float64 [batch]."""
        logits = self.logits.double()
        return (logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(1)).clamp_(max=0.0)

    def _read(self, ids: Tensor, score: bool) -> Tensor | None:
        batch, longest = ids.shape
        columns = max(1, _LOGITS_AT_ONCE // (batch * self._decoder.vocabulary))
        pieces = []
        for first in range(0, longest, columns):
            piece = ids[:, first : first + columns]
            logits = self._forward(piece, keep=0 if score else 1)
            self.logits = logits[:, -1]
            if score:
                targets = ids[:, first + 1 : first + 1 + piece.shape[1]]
                logits = logits[:, : targets.shape[1]]
                found = logits.gather(2, targets[:, :, None]).squeeze(2) - logits.logsumexp(2)
                pieces.append(found.clamp_(max=0.0))
        if not score:
            return None
        # The first token of a text has nothing before it that could predict it.
        return torch.cat(pieces, dim=1).masked_fill_(~self._seen[:, :-1], 0.0)

    def _forward(self, ids: Tensor, keep: int) -> Tensor:
        begin, end = self._length, self._length + ids.shape[1]
        self._length = end
        seen = self._seen[:, :end]
        # Texts that are finished are fed on with the others; their places must still exist.
        places = (seen.cumsum(1) - 1).clamp_(0, self._decoder.positions - 1)
        logits: Tensor = self._decoder.model(
            input_ids=ids,
            attention_mask=seen.long() if self._padded else None,
            position_ids=places[:, begin:end],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits[:, :, : self._decoder.vocabulary].float()


def usable_device(asked: str | None) -> str:
    """The device that was asked for, or a GPU if there is one. Raises UserError for one that can't be used."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:
        told = str(error).partition("\n")[0]
        raise UserError(f"the device '{asked}' cannot be used: {told}; leave --device out, or name another") from None
    return asked


class _Float32Head(nn.Module):
    """An output projection in float32, whatever the type of the model."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", head.weight.detach().float(), persistent=False)
        self.register_buffer("bias", None if head.bias is None else head.bias.detach().float(), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., vocabulary] of hidden states [..., hidden]."""
        return nn.functional.linear(hidden.float(), self.weight, self.bias)
