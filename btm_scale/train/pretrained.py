"""A pretrained model's weights as the seed LM's first."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from btm_scale.checkpoint.formats import open_model
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import ConfigError
from btm_scale.group import ExpertGroup
from btm_scale.model.gpt import ExpertModel
from btm_scale.model.weights import load_weights

# GPT-2's own files leave out the prefix that transformers gives its names.
_PREFIX = "transformer."


def load_pretrained(group: ExpertGroup, model: ExpertModel, directory: Path, tokenizer: Tokenizer) -> None:
    """Set every weight of a model that no engine has wrapped yet.

    Raises ConfigError if the tokenizer has tokens that the model has no rows for.
    """
    if tokenizer.vocab_size > model.shape.vocabulary:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, {directory} is a model of {model.shape.vocabulary}; a "
            "pretrained model keeps its own tokenizer: leave `tokenizer` out"
        )
    with open_model(directory) as weights:
        names = weights.specs().keys()

        def read(name: str) -> Tensor:
            return weights.read(name if name in names else name.removeprefix(_PREFIX))

        load_weights(model, read, group.tensor_rank, group.config.tensor)
