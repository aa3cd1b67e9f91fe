"""Decode with transformers: a prompt is read once, then the text continues token by token from the KV cache.

transformers is used here because its caches support every family on CPU and GPU; training uses Megatron-core.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btm_scale.errors import CheckpointError, LaunchError, UserError
from btm_scale.model.decode_graph import DecodeSteps
from btm_scale.model.float32_head import Float32Head
from btm_scale.model.hf_load import load_causal_lm, require_causal_lm
from btm_scale.model.reading import Prefix, Reading
from btm_scale.model.scored_texts import scored
from btm_scale.model.state_scores import StateScores, state_scores_of
from btm_scale.util.devices import usable_gpus

# The names of a model's longest sequence in config.json; models without any read sequences of every length.
_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "context_length")
UNLIMITED = 2**31 - 1
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


class Decoder:
    """A causal language model, or several stacked ones; `read` starts a batch of sequences."""

    def __init__(self, model: Any, *, vocabulary: int | None = None, models: int = 1) -> None:
        """Wrap a transformers model; head rows from `vocabulary` on are padding and never a token.

        `models`: how many models `stack_models` made it from.
        """
        self.model, self.models = model.eval(), models
        self.vocabulary = vocabulary or model.config.get_text_config().vocab_size
        self.positions = positions_of(model.config.get_text_config())  # maximum sequence length in tokens
        self.hidden: int = getattr(model.config.get_text_config(), "hidden_size", self.vocabulary)
        self._takes = inspect.signature(model.forward).parameters
        self.steps: DecodeSteps | None = None  # whose CUDA graphs continue texts
        if self.has_cache and self._can_use_steps():
            self.steps = DecodeSteps(self)
        self.weights_version = 0  # how often the weights have moved; a step is valid for one version
        self._pads = False  # whether a recurrent model was seen to leave padding out
        head = model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            model.set_output_embeddings(Float32Head(head))

    @classmethod
    def load(cls, directory: Path, *, vocabulary: int | None = None, device: str = "cpu") -> Decoder:
        """Load a Hugging Face directory in the dtype of its weights. Raises `CheckpointError` if it cannot be read."""
        return cls(load_causal_lm(directory).to(device), vocabulary=vocabulary)

    @property
    def has_cache(self) -> bool:
        """Whether the model continues from a KV cache; those with a recurrent state read all tokens for each next."""
        return "past_key_values" in self._takes and not self._is_recurrent

    def _can_use_steps(self) -> bool:
        """Whether steps have a GPU, and attention that takes a mask of any columns."""
        masks = {"attention_mask", "position_ids"} <= set(self._takes)
        is_gpu = self.model.device.type == "cuda"
        return is_gpu and masks and getattr(self.model.config, "_attn_implementation", "") == "sdpa"

    def before_weights_move(self) -> None:
        """Drop the steps: their CUDA graphs read the weights where they are now."""
        self.weights_version += 1
        if self.steps is not None:
            self.steps = DecodeSteps(self)

    @functools.cached_property
    def state_scores(self) -> StateScores | None:
        """What scores text from hidden states with one launch for all models; None where logits are formed instead."""
        return state_scores_of(self)

    @property
    def keeps_few_logits(self) -> bool:
        """Whether the model computes logits of the last tokens only, if it is asked for no others."""
        return "logits_to_keep" in self._takes

    @property
    def rounding(self) -> float:
        """How much log-probabilities may differ between two ways to compute them."""
        return _ROUNDING[next(self.model.parameters()).dtype]

    @property
    def can_join_batches(self) -> bool:
        """Whether rows of a batch are independent of each other; some recurrent models read padding."""
        return not self._is_recurrent

    @property
    def _is_recurrent(self) -> bool:
        return bool(getattr(self.model, "_is_stateful", False))

    def logits(self, ids: Tensor, *, mask: Tensor | None, positions: Tensor, cache: Any, keep: int) -> Tensor:
        """Return float32 [models x batch, kept, vocabulary], of all tokens or the last `keep`, after the cache's."""
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

    def score(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the log-probabilities in nats of texts from their second tokens on, which are not continued.

        float32 [models x texts, longest text - 1], left-padded with 0.
        """
        if self._is_recurrent and not self._pads:
            log_probs = self.read(texts).log_probs
            assert log_probs is not None
            return log_probs
        return scored(self, texts)

    def resume(self, prefixes: Sequence[Prefix], prompt: Sequence[int], kept: int) -> Reading:
        """Start a sequence that begins with `kept` tokens of each model's prefix, and has at least one more.

        Only the tokens after them are read. The reading has scores if the prefixes have.
        """
        return Reading.resumed(self, prefixes, prompt, kept)

    def _require_padding(self, prompts: Sequence[Sequence[int]], reading: Reading) -> None:
        """Raise UserError if padding before the shortest prompt has changed what follows it: some states read it."""
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) == max(lengths):
            return
        shortest = lengths.index(min(lengths))
        alone = Reading(self, [prompts[shortest]], False).logits[0].log_softmax(0)
        if not torch.allclose(reading.logits[shortest].log_softmax(0), alone, rtol=self.rounding, atol=self.rounding):
            raise UserError(
                f"A model of type '{self.model.config.model_type}' reads padding, so it cannot continue prompts of "
                "different lengths together. Give one prompt at a time."
            )
        self._pads = True


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
