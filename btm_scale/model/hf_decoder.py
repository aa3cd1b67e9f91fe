"""Decode with transformers: a prompt is read once, then the text continues token by token from the KV cache.

transformers is used here because its caches support every family on CPU and GPU; training uses Megatron-core.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btm_scale.errors import CheckpointError, LaunchError, UserError
from btm_scale.model.hf_load import load_causal_lm, new_cache, require_causal_lm
from btm_scale.model.kv_rows import bytes_of, has_all_positions, joined_rows, leading_positions, selected_rows
from btm_scale.util.devices import usable_gpus

# Logits in memory at a time while a prompt is read (256 MB of float32).
_MAX_LOGITS = 2**26
# The names of a model's longest sequence in config.json; models without any read sequences of every length.
_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "context_length")
UNLIMITED = 2**31 - 1
# How much log-probabilities of a recurrent model may differ between batches.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def limits_of(directory: Path) -> tuple[int, int]:
    """Return the maximum sequence length in tokens and the vocabulary size of a Hugging Face model.

    Raises `CheckpointError` if its config cannot be read.
    """
    config = require_causal_lm(directory).get_text_config()
    try:
        return positions_of(config), int(config.vocab_size)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / 'config.json'} does not describe a causal LM: {error}.") from None


def learned_positions(directory: Path) -> int | None:
    """Return the longest sequence in tokens that a model can compute, or None if its positions are not learned."""
    config = require_causal_lm(directory).get_text_config()
    positions = positions_of(config)
    is_rotary = getattr(config, "rope_parameters", None) is not None
    return None if is_rotary or positions == UNLIMITED else positions


def positions_of(config: Any) -> int:
    """Return the maximum sequence length in tokens of a transformers config, `UNLIMITED` if it names none."""
    given = (getattr(config, name, None) for name in _POSITIONS)
    return int(next((positions for positions in given if positions is not None), UNLIMITED))


@dataclass(frozen=True)
class Prefix:
    """What a model has computed for one sequence: its KV cache and scores. It does not keep the model in memory."""

    cache: Any
    log_probs: Tensor | None  # float32 [1, tokens - 1] in nats

    @property
    def nbytes(self) -> int:
        """The memory that the KV cache takes."""
        return bytes_of(self.cache)


class Decoder:
    """A causal language model; `read` starts a batch of sequences."""

    def __init__(self, model: Any, *, vocabulary: int | None = None) -> None:
        """Wrap a transformers model; head rows from `vocabulary` on are padding and never a token."""
        self.model = model.eval()
        self.vocabulary = vocabulary or model.config.get_text_config().vocab_size
        self.positions = positions_of(model.config.get_text_config())  # maximum sequence length in tokens
        self._takes = inspect.signature(model.forward).parameters
        self._pads = False  # whether a recurrent model was seen to leave padding out
        # Rounded logits would shift the posterior's log-odds, so everything after the hidden state is float32.
        head = model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            model.set_output_embeddings(_Float32Head(head))

    @classmethod
    def load(cls, directory: Path, *, vocabulary: int | None = None, device: str = "cpu") -> Decoder:
        """Load a Hugging Face directory in the dtype of its weights. Raises `CheckpointError` if it cannot be read."""
        return cls(load_causal_lm(directory).to(device), vocabulary=vocabulary)

    @property
    def has_cache(self) -> bool:
        """Whether the model continues from a KV cache; those with a recurrent state read all tokens for each next."""
        return "past_key_values" in self._takes and not self._is_recurrent

    @property
    def _is_recurrent(self) -> bool:
        return bool(getattr(self.model, "_is_stateful", False))

    def logits(self, ids: Tensor, *, mask: Tensor | None, positions: Tensor, cache: Any, keep: int) -> Tensor:
        """Return float32 [batch, kept, vocabulary], of all tokens or the last `keep`, after those in the cache."""
        inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "logits_to_keep": keep}
        inputs |= {"use_cache": self.has_cache}
        logits: Tensor = self.model(
            input_ids=ids, **{name: value for name, value in inputs.items() if name in self._takes}
        ).logits
        return logits[:, -keep:, : self.vocabulary].float()

    def read(self, prompts: Sequence[Sequence[int]], *, score: bool = True) -> Reading:
        """Start a batch of sequences from prompts of at least one token; with `score`, also score the prompts."""
        reading = Reading(self, prompts, score)
        if self._is_recurrent and not self._pads:
            self._require_padding(prompts, reading)
        return reading

    def resume(self, prefix: Prefix, prompt: Sequence[int], kept: int) -> Reading:
        """Start a sequence that begins with `kept` tokens of a prefix of this model, and has at least one more.

        Only the tokens after them are read. The reading has scores if the prefix has.
        """
        return Reading.resumed(self, prefix, prompt, kept)

    def _require_padding(self, prompts: Sequence[Sequence[int]], reading: Reading) -> None:
        """Raise UserError if padding before the shortest prompt has changed what follows it: some states read it."""
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) == max(lengths):
            return
        shortest = lengths.index(min(lengths))
        alone = Reading(self, [prompts[shortest]], False).logits[0].log_softmax(0)
        rounding = _ROUNDING[next(self.model.parameters()).dtype]
        if not torch.allclose(reading.logits[shortest].log_softmax(0), alone, rtol=rounding, atol=rounding):
            raise UserError(
                f"A model of type '{self.model.config.model_type}' reads padding, so it cannot continue prompts of "
                "different lengths together. Give one prompt at a time."
            )
        self._pads = True


class Reading:
    """A batch of sequences under one model: its KV cache and the logits of the next token."""

    logits: Tensor
    """float32 [batch, vocabulary] of the next token."""
    log_probs: Tensor | None
    """float32 [batch, longest prompt - 1] in nats, of each prompt from its second token on, left-padded with 0."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], score: bool) -> None:
        self._decoder = decoder
        self._device = decoder.model.device
        self._cache = new_cache(decoder.model) if decoder.has_cache else None
        self._ids = torch.empty(len(prompts), 0, dtype=torch.int64, device=self._device)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        # Left padding, which is never attended to: all prompts end at the same position and continue from there.
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        self._mask = (torch.arange(longest) >= longest - lengths[:, None]).to(self._device)
        self._padded = bool((lengths < longest).any())
        self._length = 0
        self.log_probs = self._read(ids.to(self._device), score)

    @classmethod
    @torch.no_grad()
    def resumed(cls, decoder: Decoder, prefix: Prefix, prompt: Sequence[int], kept: int) -> Reading:
        """See Decoder.resume."""
        reading = cls.__new__(cls)
        reading._decoder, reading._device = decoder, decoder.model.device
        reading._cache = leading_positions(prefix.cache, new_cache(decoder.model), kept)
        reading._ids = torch.empty(1, 0, dtype=torch.int64, device=reading._device)
        reading._set_mask(torch.ones(1, len(prompt), dtype=torch.bool, device=reading._device))
        reading._length = kept
        rest = torch.tensor([prompt[kept:]], device=reading._device)
        scores = reading._read(rest, prefix.log_probs is not None)
        reading.log_probs = None
        if prefix.log_probs is not None and scores is not None:
            reading.log_probs = torch.cat([prefix.log_probs[:, :kept], scores], dim=1)
        return reading

    @torch.no_grad()
    def prefix(self, row: int, tokens: int) -> Prefix | None:
        """Return what was computed for a sequence of `tokens`, or None if the model cannot resume from it."""
        if self._cache is None or not has_all_positions(self._cache):
            return None
        index = torch.tensor([row], device=self._device)
        cache = selected_rows(self._cache, new_cache(self._decoder.model), index, tokens)
        if self.log_probs is None:
            return Prefix(cache, None)
        return Prefix(cache, self.log_probs[row : row + 1, self.log_probs.shape[1] - (tokens - 1) :].clone())

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> None:
        """Append one token, int64 [batch], to each sequence."""
        self._append(tokens.unsqueeze(1), keep=1)

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """Append several tokens, int64 [batch, count]; return the logits after each, [batch, count, vocabulary]."""
        return self._append(tokens, keep=0)

    def select(self, rows: Sequence[int]) -> Reading:
        """Return a reading that continues these sequences, which may repeat; this one remains as it is."""
        chosen = object.__new__(Reading)
        chosen._decoder, chosen._device = self._decoder, self._device
        index = torch.as_tensor(list(rows), device=self._device)
        mask = self._mask[index]
        # Columns that are padding in each of these sequences are dropped.
        columns = int(mask.sum(1).max())
        chosen._set_mask(mask[:, mask.shape[1] - columns :])
        chosen._ids, chosen._cache = self._ids[index][:, -columns:], None
        if self._cache is not None:
            chosen._cache = selected_rows(self._cache, new_cache(self._decoder.model), index, columns)
        chosen.logits = self.logits[index]
        chosen.log_probs = None
        return chosen

    def join(self, other: Reading) -> None:
        """Append the sequences of another reading of the same model, which must not be used any more."""
        columns = max(self._length, other._length)
        masks = (nn.functional.pad(one._mask, (columns - one._length, 0)) for one in (self, other))
        self._set_mask(torch.cat(list(masks)))
        if self._cache is not None:
            self._cache = joined_rows(self._cache, other._cache, new_cache(self._decoder.model), columns)
        else:
            ids = (nn.functional.pad(one._ids, (columns - one._ids.shape[1], 0)) for one in (self, other))
            self._ids = torch.cat(list(ids))
        self.logits = torch.cat([self.logits, other.logits])
        self.log_probs = None

    def _set_mask(self, mask: Tensor) -> None:
        self._mask, self._length = mask, mask.shape[1]
        self._padded = not bool(mask.all())

    def _append(self, tokens: Tensor, keep: int) -> Tensor:
        ones = torch.ones(*tokens.shape, dtype=torch.bool, device=self._device)
        self._mask = torch.cat([self._mask, ones], dim=1)
        logits = self._forward(tokens.to(self._device), keep)
        self.logits = logits[:, -1]
        return logits

    def next_log_probs(self, tokens: Tensor) -> Tensor:
        """Return the log-probability in nats of each sequence's next token, float64 [batch]."""
        logits = self.logits.double()
        return (logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(1)).clamp_(max=0.0)

    def _read(self, ids: Tensor, score: bool) -> Tensor | None:
        begin = self._length
        batch, longest = ids.shape
        columns = max(1, _MAX_LOGITS // (batch * self._decoder.vocabulary))
        pieces = []
        for first in range(0, longest, columns):
            piece = ids[:, first : first + columns]
            logits = self._forward(piece, keep=0 if score else 1)
            self.logits = logits[:, -1]
            if score:
                targets = ids[:, first + 1 : first + 1 + piece.shape[1]]
                logits = logits[:, : targets.shape[1]]
                log_probs = logits.gather(2, targets[:, :, None]).squeeze(2) - logits.logsumexp(2)
                pieces.append(log_probs.clamp_(max=0.0))
        if not score:
            return None
        # Nothing predicts the first token of a sequence.
        return torch.cat(pieces, dim=1).masked_fill_(~self._mask[:, begin:-1], 0.0)

    def _forward(self, ids: Tensor, keep: int) -> Tensor:
        begin, end = self._length, self._length + ids.shape[1]
        self._length = end
        mask = self._mask[:, :end]
        # Finished sequences are fed along with the others; their positions must stay valid.
        position_ids = (mask.cumsum(1) - 1).clamp_(0, self._decoder.positions - 1)
        if self._cache is None:
            self._ids = torch.cat([self._ids, ids], dim=1)
            begin, ids, keep = 0, self._ids, keep or ids.shape[1]
        return self._decoder.logits(
            ids,
            mask=mask.long() if self._padded else None,
            positions=position_ids[:, begin:end],
            cache=self._cache,
            keep=keep,
        )


def usable_device(name: str | None) -> str:
    """Return `name`, or if it is None a GPU if there is one.

    Raises `UserError` for a device that cannot be used, and if this process was given GPUs and torch can use none.
    """
    if name is None:
        try:
            return "cuda" if usable_gpus("auto", in_this_process=True).names else "cpu"
        except LaunchError as error:
            raise UserError(f"{error} For this command alone, --device cpu chooses the CPU.") from None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"Cannot use device '{name}': {reason}. Leave --device out, or choose another.") from None
    return name


class _Float32Head(nn.Module):
    """An output projection in float32, whatever the dtype of the model."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        # Parameters, because some classes of transformers share a head's bias.
        self.weight = nn.Parameter(head.weight.detach().float(), requires_grad=False)
        self.bias = None if head.bias is None else nn.Parameter(head.bias.detach().float(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [..., vocabulary] of hidden states [..., hidden]."""
        return nn.functional.linear(hidden.float(), self.weight, self.bias)
