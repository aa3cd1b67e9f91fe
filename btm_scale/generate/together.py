"""Several models that read and continue the same texts: alike models as one stacked model, the others one by one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from btm_scale.model.hf_decoder import Decoder
from btm_scale.model.reading import Prefix, Reading
from btm_scale.model.stacked import are_alike, can_stack_model, stack_models, unstack_models

logger = logging.getLogger(__name__)

_TRIED = ([1, 0, 1, 1], [0, 1])  # prompts on which a stacked model is compared with its models


class Part(NamedTuple):
    """A decoder, and the numbers of the models that it computes."""

    decoder: Decoder
    models: tuple[int, ...]


class Together:
    """Models that read the same texts. Stacked models share their weights with the decoders they were made from."""

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        self.decoders = list(decoders)
        self.parts: list[Part] = []
        left = list(range(len(self.decoders)))
        while left:
            first = self.decoders[left[0]]
            alike = [number for number in left if number == left[0] or _are_alike(first, self.decoders[number])]
            left = [number for number in left if number not in alike]
            stack = _stacked([self.decoders[number] for number in alike])
            if stack is None:
                self.parts += [Part(self.decoders[number], (number,)) for number in alike]
            else:
                self.parts.append(Part(stack, tuple(alike)))

    def read(self, prompts: Sequence[Sequence[int]], *, score: bool = True) -> JointReading:
        """Start a batch of sequences from prompts of at least one token; with `score`, also score the prompts."""
        return JointReading(self, [part.decoder.read(prompts, score=score) for part in self.parts])

    def score(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the log-probabilities in nats of texts that are not continued, as `JointReading.scores`."""
        parts = [part.decoder.score(texts).unflatten(0, (part.decoder.models, -1)) for part in self.parts]
        order = torch.tensor([number for part in self.parts for number in part.models]).argsort()
        return torch.cat(parts)[order.to(parts[0].device)]

    def resume(self, prefixes: Sequence[Prefix], prompt: Sequence[int], kept: int) -> JointReading:
        """Start a sequence that begins with `kept` tokens of the prefix of each model, and has at least one more."""
        readings = [
            part.decoder.resume([prefixes[number] for number in part.models], prompt, kept) for part in self.parts
        ]
        return JointReading(self, readings)

    def unstack(self, kept: Sequence[Decoder]) -> None:
        """Give the models `kept` their own weights again, so that those of the others can be freed.

        This object must not be used any more.
        """
        stacks = [
            [self.decoders[number] for number in part.models if self.decoders[number] in kept]
            for part in self.parts
            if len(part.models) > 1
        ]
        # From here on the kept models alone hold the stacks, whose parameters are freed one by one. Readings of this
        # object have their own references.
        self.parts, self.decoders = [], []
        for members in stacks:
            _unstack(members)


class JointReading:
    """A batch of sequences under several models."""

    def __init__(self, together: Together, readings: Sequence[Reading]) -> None:
        self._parts, self._decoders = tuple(together.parts), together.decoders
        self._readings = list(readings)
        order = [number for part in self._parts for number in part.models]
        device = readings[0].logits.device
        self._order = None if order == sorted(order) else torch.tensor(order).argsort().to(device)

    @property
    def models(self) -> int:
        """Number of models."""
        return len(self._decoders)

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        return self._readings[0].logits.device

    @property
    def logits(self) -> Tensor:
        """float32 [models, batch, vocabulary] of the next token."""
        return self._by_model([reading.logits for reading in self._readings])

    @property
    def scores(self) -> Tensor | None:
        """float32 [models, batch, longest prompt - 1] in nats, as `Reading.log_probs`."""
        scores = [reading.log_probs for reading in self._readings if reading.log_probs is not None]
        return self._by_model(scores) if len(scores) == len(self._readings) else None

    def feed(self, tokens: Tensor) -> None:
        """Append one token, int64 [batch], to each sequence."""
        for reading in self._readings:
            reading.feed(tokens)

    def extend(self, tokens: Tensor) -> Tensor:
        """Append tokens, int64 [batch, count]; return the logits after each, [models, batch, count, vocabulary]."""
        return self._by_model([reading.extend(tokens) for reading in self._readings])

    def select(self, rows: Sequence[int]) -> JointReading:
        """Return a reading that continues these sequences, which may repeat; this one remains as it is."""
        return self._with([reading.select(rows) for reading in self._readings])

    def join(self, other: JointReading) -> None:
        """Append the sequences of another reading of the same models, which must not be used any more."""
        for reading, more in zip(self._readings, other._readings, strict=True):
            reading.join(more)

    def of_model(self, number: int) -> JointReading:
        """Return a reading of one model alone; this one remains as it is."""
        for part, reading in zip(self._parts, self._readings, strict=True):
            if number in part.models:
                decoder = self._decoders[number]
                alone = reading if len(part.models) == 1 else reading.of_model(part.models.index(number), decoder)
                return JointReading(Together([decoder]), [alone])
        raise IndexError(f"there is no model {number} of {self.models}")

    @property
    def prefix_bytes(self) -> int:
        """The memory that the `prefixes` of one sequence take."""
        return sum(reading.prefix_bytes for reading in self._readings)

    def prefixes(self, row: int, tokens: int) -> list[Prefix] | None:
        """Return what each model computed for a sequence of `tokens`, or None if one cannot resume from that."""
        found: dict[int, Prefix] = {}
        for part, reading in zip(self._parts, self._readings, strict=True):
            own = reading.prefixes(row, tokens)
            if own is None:
                return None
            found |= dict(zip(part.models, own, strict=True))
        return [found[number] for number in range(self.models)]

    def _with(self, readings: Sequence[Reading]) -> JointReading:
        other = object.__new__(JointReading)
        other._parts, other._decoders, other._order = self._parts, self._decoders, self._order
        other._readings = list(readings)
        return other

    def _by_model(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return [models, ...] in the order of the models, of each part's tensor [models x batch, ...]."""
        split = [
            tensor.unflatten(0, (part.decoder.models, -1)) for part, tensor in zip(self._parts, tensors, strict=True)
        ]
        joined = split[0] if len(split) == 1 else torch.cat(split)
        return joined if self._order is None else joined[self._order]


def _are_alike(one: Decoder, other: Decoder) -> bool:
    return one.vocabulary == other.vocabulary and are_alike(one.model, other.model)


def _stacked(decoders: Sequence[Decoder]) -> Decoder | None:
    """Return a decoder for all rows of models that are alike; None if they have no stacked form, or it differs."""
    if len(decoders) == 1 or not all(decoder.can_join_batches for decoder in decoders):
        return None
    if not can_stack_model(decoders[0].model):
        return None
    for decoder in decoders:
        decoder.before_weights_move()
    stack = Decoder(
        stack_models([decoder.model for decoder in decoders]), vocabulary=decoders[0].vocabulary, models=len(decoders)
    )
    if not _agrees(stack, decoders):
        del stack
        _unstack(decoders)
        logger.warning(
            "Models of type '%s' differ from their stacked form, so that each runs alone, which is slower.",
            decoders[0].model.config.model_type,
        )
        return None
    return stack


def _unstack(decoders: Sequence[Decoder]) -> None:
    for decoder in decoders:
        decoder.before_weights_move()
    unstack_models([decoder.model for decoder in decoders])


def _agrees(stack: Decoder, decoders: Sequence[Decoder]) -> bool:
    """Return whether a stacked model predicts what its models do, after a few tokens; False if it raises."""
    if next(stack.model.parameters()).is_meta:
        return True
    prompts = [[token % stack.vocabulary for token in prompt] for prompt in _TRIED]
    alone = [decoder.read(prompts, score=False) for decoder in decoders]
    expected = torch.cat([reading.logits for reading in alone]).log_softmax(1)
    rounding = decoders[0].rounding
    try:
        found = stack.read(prompts, score=False).logits.log_softmax(1)
        return torch.allclose(found, expected, rtol=rounding, atol=rounding, equal_nan=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that reads attributes of its layers, or mixes its rows
        logger.debug("A stacked forward pass failed: %s", str(error))  # the error itself would keep the stack in memory
        return False
