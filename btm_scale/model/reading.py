"""A batch of sequences that is read and continued: KV cache, padding, and the logits of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from btm_scale.model.decode_graph import DecodeStep
from btm_scale.model.kv_buffers import empty_cache
from btm_scale.model.kv_rows import (
    bytes_of,
    bytes_of_row,
    has_all_positions,
    joined_rows,
    leading_positions,
    selected_rows,
)

if TYPE_CHECKING:
    from btm_scale.model.hf_decoder import Decoder
    from btm_scale.model.state_scores import StateScores

# In memory at a time while a prompt is read: logits (256 MB of float32), or hidden states where few logits are formed,
# beside which attention and MLPs of a layer need several times as much.
MAX_LOGITS = 2**26
MAX_STATES = 2**24


@dataclass(frozen=True)
class Prefix:
    """What a model has computed for one sequence: its KV cache and scores. It does not keep the model in memory."""

    cache: Any
    log_probs: Tensor | None  # float32 [1, tokens - 1] in nats

    @property
    def nbytes(self) -> int:
        """The memory that the KV cache takes."""
        return bytes_of(self.cache)


class _Inputs(NamedTuple):
    """What a model computes tokens from."""

    ids: Tensor  # int64 [models x batch, tokens]
    mask: Tensor | None  # int64 [models x batch, all tokens so far]
    positions: Tensor  # int64 [models x batch, tokens]
    keep: int


class Reading:
    """A batch of sequences under the models of a decoder: their KV cache and the logits of the next token.

    Several stacked models have one row per model and sequence, one model after the other: [models x batch, ...].
    """

    logits: Tensor
    """float32 [models x batch, vocabulary] of the next token."""
    log_probs: Tensor | None
    """float32 [models x batch, longest prompt - 1] in nats, of prompts from their second tokens on, left-padded: 0."""

    @torch.inference_mode()
    def __init__(
        self, decoder: Decoder, prompts: Sequence[Sequence[int]], score: bool, *, is_continued: bool = True
    ) -> None:
        """Read prompts. One that is not continued needs no KV cache if it is read at once."""
        self._begin(decoder, len(prompts))
        self._cache = self._new_cache() if decoder.has_cache and is_continued else None
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        # Left padding, which is never attended to: all prompts end at the same position and continue from there.
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        self._mask = self._of_models((torch.arange(longest) >= longest - lengths[:, None]).to(self._device))
        self._padded = bool((lengths < longest).any())
        self.log_probs = self._read(self._of_models(ids.to(self._device)), score)

    @classmethod
    @torch.inference_mode()
    def resumed(cls, decoder: Decoder, prefixes: Sequence[Prefix], prompt: Sequence[int], kept: int) -> Reading:
        """See Decoder.resume."""
        reading = cls.__new__(cls)
        reading._begin(decoder, 1)
        reading._cache = leading_positions([prefix.cache for prefix in prefixes], reading._new_cache(), kept)
        reading._set_mask(torch.ones(len(prefixes), len(prompt), dtype=torch.bool, device=reading._device))
        reading._length = kept
        before = [prefix.log_probs for prefix in prefixes if prefix.log_probs is not None]
        has_scores = len(before) == len(prefixes)
        scores = reading._read(reading._of_models(torch.tensor([prompt[kept:]], device=reading._device)), has_scores)
        reading.log_probs = None
        if scores is not None:
            reading.log_probs = torch.cat([torch.cat(before)[:, :kept], scores], dim=1)
        return reading

    def _begin(self, decoder: Decoder, batch: int) -> None:
        self._decoder, self._device = decoder, decoder.model.device
        self._ids = torch.empty(decoder.models * batch, 0, dtype=torch.int64, device=self._device)
        self._length = 0
        self._step: DecodeStep | None = None

    def _new_cache(self) -> Any:
        return empty_cache(self._decoder.model)

    def _of_models(self, tensor: Tensor) -> Tensor:
        """Repeat the rows of sequences for every model."""
        return tensor if self._decoder.models == 1 else tensor.repeat(self._decoder.models, *[1] * (tensor.ndim - 1))

    @torch.inference_mode()
    def prefixes(self, row: int, tokens: int) -> list[Prefix] | None:
        """Return what each model computed for a sequence of `tokens`, or None if it cannot resume from that."""
        self._leave_step()
        if self._cache is None or not has_all_positions(self._cache):
            return None
        found = []
        for index in self._rows([row]).tolist():
            rows = torch.tensor([index], device=self._device)
            cache, scores = selected_rows(self._cache, self._new_cache(), rows, tokens), self.log_probs
            if scores is not None:
                scores = scores[index : index + 1, scores.shape[1] - (tokens - 1) :].clone()
            found.append(Prefix(cache, scores))
        return found

    @property
    def prefix_bytes(self) -> int:
        """The memory that the `prefixes` of one sequence take; 0 without a KV cache."""
        return 0 if self._cache is None else bytes_of_row(self._cache) * self._decoder.models

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> None:
        """Append one token, int64 [batch], to each sequence."""
        step = self._step
        if step is not None and (self._length == step.capacity or step.version != self._decoder.weights_version):
            self._leave_step()
        if self._step is not None:
            self.logits = self._step.feed(tokens)
            self._length += 1
        elif not self._enter_step(tokens):
            self._append(tokens.unsqueeze(1), keep=1)

    def _enter_step(self, tokens: Tensor) -> bool:
        """Append tokens by a step of fixed shapes, which then has the KV cache; return whether they were appended."""
        steps = self._decoder.steps
        step = (
            None
            if steps is None or self._cache is None
            else steps.take(self, self._cache, self._complete_mask(self._length))
        )
        if steps is None or step is None:
            return False
        logits = step.feed(tokens)
        if steps.is_checked:
            self._length += 1
        else:
            self._append(tokens.unsqueeze(1), keep=1)
            if not steps.accepts(logits, self.logits):
                step.free()
                return True
        self._step, self._cache, self.logits = step, None, logits
        return True

    def _leave_step(self) -> None:
        """Take the KV cache back, if a step has it: what follows changes its shape."""
        if self._step is None:
            return
        self._cache = self._step.release(len(self.logits) // self._decoder.models, self._length)
        self._step, self.logits = None, self.logits.clone()

    @torch.inference_mode()
    def extend(self, tokens: Tensor) -> Tensor:
        """Append several tokens, int64 [batch, count]; return the logits after each, [models x batch, count, vocab]."""
        self._leave_step()
        return self._append(tokens, keep=0)

    def select(self, rows: Sequence[int]) -> Reading:
        """Return a reading that continues these sequences, which may repeat; this one remains as it is."""
        return self._chosen(self._decoder, self._rows(rows))

    def of_model(self, number: int, decoder: Decoder) -> Reading:
        """Return a reading of one of several models alone, which is `decoder`; this one remains as it is."""
        batch = len(self.logits) // self._decoder.models
        chosen = self._chosen(decoder, torch.arange(number * batch, (number + 1) * batch, device=self._device))
        return chosen

    def _chosen(self, decoder: Decoder, index: Tensor) -> Reading:
        self._leave_step()
        chosen = object.__new__(Reading)
        chosen._begin(decoder, 0)
        mask = self._complete_mask(self._length)[index]
        # Columns that are padding in each of these sequences are dropped.
        columns = int(mask.sum(1).max())
        chosen._set_mask(mask[:, mask.shape[1] - columns :])
        chosen._ids, chosen._cache = self._ids[index][:, -columns:], None
        if self._cache is not None:
            chosen._cache = selected_rows(self._cache, self._new_cache(), index, columns)
        chosen.logits = self.logits[index]
        chosen.log_probs = None
        return chosen

    def join(self, other: Reading) -> None:
        """Append the sequences of another reading of the same models, which must not be used any more."""
        self._leave_step()
        other._leave_step()
        columns = max(self._length, other._length)
        masks = (
            nn.functional.pad(one._complete_mask(one._length), (columns - one._length, 0)) for one in (self, other)
        )
        self._set_mask(self._joined(*masks))
        if self._cache is not None:
            self._cache = joined_rows(self._cache, other._cache, self._new_cache(), columns, self._decoder.models)
        else:
            ids = (nn.functional.pad(one._ids, (columns - one._ids.shape[1], 0)) for one in (self, other))
            self._ids = self._joined(*ids)
        self.logits = self._joined(self.logits, other.logits)
        self.log_probs = None

    def _joined(self, *parts: Tensor) -> Tensor:
        """Append rows of sequences, for each model."""
        by_model = [part.unflatten(0, (self._decoder.models, -1)) for part in parts]
        return torch.cat(by_model, dim=1).flatten(0, 1)

    def _rows(self, sequences: Sequence[int]) -> Tensor:
        """Return the rows of sequences, for each model."""
        batch = len(self.logits) // self._decoder.models
        first = torch.arange(self._decoder.models, device=self._device) * batch
        return (first[:, None] + torch.as_tensor(list(sequences), device=self._device)).flatten()

    def _complete_mask(self, columns: int) -> Tensor:
        """Return the mask of this many columns: tokens that were appended are never padding."""
        missing = columns - self._mask.shape[1]
        if missing > 0:
            self._mask = nn.functional.pad(self._mask, (0, missing), value=True)
        return self._mask

    def _set_mask(self, mask: Tensor) -> None:
        self._mask, self._length = mask, mask.shape[1]
        self._padded = not bool(mask.all())

    def _append(self, tokens: Tensor, keep: int) -> Tensor:
        tokens = self._of_models(tokens.to(self._device))
        if self._padded:
            self._complete_mask(self._length + tokens.shape[1])
        logits = self._forward(tokens, keep)
        self.logits = logits[:, -1]
        return logits

    def _read(self, ids: Tensor, score: bool) -> Tensor | None:
        """Append prompts; return float32 [models x batch, tokens - 1] of them with `score`, otherwise None."""
        if not score:
            few = self._decoder.keeps_few_logits
            for piece in ids.split(self._columns(ids, MAX_STATES if few else MAX_LOGITS, few), dim=1):
                self.logits = self._forward(piece, keep=1)[:, -1]
            return None
        scores = self._decoder.state_scores
        return self._read_logits(ids) if scores is None else self._read_states(ids, scores)

    def _columns(self, ids: Tensor, most: int, of_states: bool) -> int:
        """Return how many tokens of each prompt to read at once: with at most this many numbers in memory."""
        width = self._decoder.hidden if of_states else self._decoder.vocabulary
        return max(1, most // (len(ids) * width))

    def _read_states(self, ids: Tensor, scores: StateScores) -> Tensor:
        """Append prompts and score them from their hidden states; only the last tokens' logits are formed."""
        begin, batch = self._length, len(ids) // self._decoder.models
        pieces = []
        # Without a KV cache every piece would read all tokens before it again.
        columns = ids.shape[1] if self._cache is None else self._columns(ids, MAX_STATES, True)
        for first in range(0, ids.shape[1], columns):
            piece = ids[:, first : first + columns]
            place = self._appended(piece, keep=piece.shape[1])
            states = scores.states(place.ids, mask=place.mask, positions=place.positions, cache=self._cache)
            states = states[:, -piece.shape[1] :]
            targets = ids[:batch, first + 1 : first + 1 + piece.shape[1]]
            before = slice(begin + first, begin + first + targets.shape[1])
            mask = self._mask[:batch, before] if self._padded else None
            pieces.append(scores.log_probs(states[:, : targets.shape[1]], targets, mask))
        self.logits = scores.logits(states[:, -1])
        return torch.cat(pieces, dim=1)

    def _read_logits(self, ids: Tensor) -> Tensor:
        """Append prompts and score them from their logits."""
        begin = self._length
        pieces = []
        columns = self._columns(ids, MAX_LOGITS, False)
        for first in range(0, ids.shape[1], columns):
            piece = ids[:, first : first + columns]
            logits = self._forward(piece, keep=0)
            self.logits = logits[:, -1]
            targets = ids[:, first + 1 : first + 1 + piece.shape[1]]
            logits = logits[:, : targets.shape[1]]
            log_probs = logits.gather(2, targets[:, :, None]).squeeze(2) - logits.logsumexp(2)
            pieces.append(log_probs.clamp_(max=0.0))
        # Nothing predicts the first token of a sequence.
        return torch.cat(pieces, dim=1).masked_fill_(~self._mask[:, begin:-1], 0.0)

    def _forward(self, ids: Tensor, keep: int) -> Tensor:
        place = self._appended(ids, keep)
        return self._decoder.logits(
            place.ids, mask=place.mask, positions=place.positions, cache=self._cache, keep=place.keep
        )

    def _appended(self, ids: Tensor, keep: int) -> _Inputs:
        """Append tokens and return a model's inputs: without a cache, also all tokens before them."""
        begin, end = self._length, self._length + ids.shape[1]
        self._length = end
        if self._cache is None:  # every token is read again
            self._ids = torch.cat([self._ids, ids], dim=1)
            begin, ids, keep = 0, self._ids, keep or ids.shape[1]
        mask = self._mask[:, :end].long() if self._padded else None
        if mask is not None:
            positions = (mask.cumsum(1) - 1)[:, begin:]
        else:
            positions = torch.arange(begin, end, device=self._device).expand(len(ids), -1)
        if self._padded or end > self._decoder.positions:
            # Finished sequences are fed along with the others; their positions must stay valid.
            positions = positions.clamp(0, self._decoder.positions - 1)
        return _Inputs(ids, mask, positions, keep)
