"""Experts with a vocabulary of five tokens, small enough to enumerate every text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from btm_scale.data.tokenizer import Tokenizer
from btm_scale.forest.posterior.mixture import mixture_log_probs

LETTERS = ".abcd"  # the first is the end of a document
POSITIONS = 24


class Letters(Tokenizer):
    """One token per letter."""

    digest = "letters"
    vocab_size = len(LETTERS)
    eos = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        return [np.array([LETTERS.index(letter) for letter in text], dtype=np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[token] for token in ids)


def write_experts(folder: Path, count: int = 2, family: str = "llama") -> dict[str, Path]:
    """Write random models whose weights are large enough for distinct predictions; `unlike` mixes families."""
    experts = {}
    for number in range(count):
        torch.manual_seed(number)
        experts[f"expert{number}"] = folder / f"{family}{number}"
        _model(("llama", "gpt2")[number % 2] if family == "unlike" else family).save_pretrained(
            experts[f"expert{number}"]
        )
    return experts


def _model(family: str) -> Any:
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
        config: Any = GPT2Config(
            vocab_size=len(LETTERS), bos_token_id=0, eos_token_id=0, initializer_range=0.5, **sizes
        )
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


class Oracle:
    """The expected results: the same experts in float64, without a cache."""

    def __init__(self, experts: dict[str, Path]) -> None:
        self._models = [AutoModelForCausalLM.from_pretrained(path).double().eval() for path in experts.values()]

    @torch.no_grad()
    def log_probs(self, ids: Sequence[int]) -> np.ndarray:
        """Return the log-probabilities of each next token in nats: [experts, tokens, vocabulary]."""
        inputs = torch.tensor([list(ids)])
        return np.stack([model(inputs).logits[0].log_softmax(-1).numpy() for model in self._models])

    def mixture_after(self, ids: Sequence[int], **settings: Any) -> np.ndarray:
        """Return the mixture's log-probabilities of the next token after a text in nats: [vocabulary]."""
        scores = self.log_probs(ids)
        past = np.stack([expert[np.arange(len(ids) - 1), ids[1:]] for expert in scores])
        rows = [np.concatenate([past, scores[:, -1, token : token + 1]], axis=1) for token in range(scores.shape[2])]
        return np.array([mixture_log_probs(row, np.zeros(1, np.int64), **settings)[-1] for row in rows])

    def continuations(self, ids: Sequence[int], length: int, **settings: Any) -> dict[tuple[int, ...], float]:
        """Return the probability of every continuation of `length` tokens, or fewer if it ends the document."""
        texts = {(): 1.0}
        for _ in range(length):
            longer = {}
            for text, probability in texts.items():
                if text[-1:] == (0,):
                    longer[text] = probability
                    continue
                following = np.exp(self.mixture_after([*ids, *text], **settings))
                longer |= {(*text, token): probability * following[token] for token in range(len(following))}
            texts = longer
        return texts
