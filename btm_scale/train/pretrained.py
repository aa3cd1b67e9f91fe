"""A pretrained model's weights as the seed LM's first."""

from __future__ import annotations

from pathlib import Path

from btm_scale.checkpoint.formats.gpt2_names import with_head_names
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.distributed.group import ExpertGroup
from btm_scale.errors import ConfigError
from btm_scale.model.gpt import ExpertModel
from btm_scale.model.hf_weights import load_weights


def load_pretrained(group: ExpertGroup, model: ExpertModel, directory: Path, tokenizer: Tokenizer) -> None:
    """Set every weight of a model that no engine has wrapped yet.

    Raises ConfigError if the tokenizer has tokens that the model has no rows for.
    """
    if tokenizer.vocab_size > model.shape.vocabulary:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, {directory} is a model of {model.shape.vocabulary}; a "
            "pretrained model keeps its own tokenizer: leave `tokenizer` out"
        )
    with with_head_names(open_model(directory)) as weights:
        load_weights(model, weights.read, group.tensor_rank, group.config.tensor)
