"""A step of decoding by stacked experts with fixed shapes, or by transformers' models one by one; reading a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.generate.device_posterior import DevicePosterior
from btm_scale.generate.sampling import Sampling, from_mixture
from btm_scale.generate.together import Together
from btm_scale.model.decode_graph import DecodeStep
from btm_scale.model.hf_decoder import Decoder
from btm_scale.model.kv_buffers import empty_cache
from btm_scale.model.shape import ModelShape
from gpu_counting.cases import CASES, META
from gpu_counting.counter import Counts, counted


@dataclass(frozen=True)
class Decoding:
    """The next token of `batch` texts under a mixture of experts, with room for `columns` tokens per text."""

    preset: str
    experts: int
    batch: int
    columns: int

    @property
    def shape(self) -> ModelShape:
        return CASES[self.preset].shape


DECODINGS = {
    "8 x llama-1.3b, 1 text": Decoding("llama-1.3b", 8, 1, 1024),
    "8 x llama-1.3b, 32 texts": Decoding("llama-1.3b", 8, 32, 1024),
}


def stacked_counts(case: Decoding) -> Counts:
    """Return what a step does: the forward pass, which is one CUDA graph, sampling and the posterior."""
    together = Together([_decoder(case.shape) for _ in range(case.experts)])
    (part,) = together.parts
    cache = empty_cache(part.decoder.model)
    _fill(part.decoder, cache, case.experts)
    step = DecodeStep(part.decoder, cache, case.batch, case.columns)
    posterior = DevicePosterior(RunningPosterior(np.zeros(case.experts), case.batch), META)
    choose = from_mixture(Sampling())
    with torch.no_grad(), counted() as counts:
        step.run()
        logits = step.logits.view(case.experts, case.batch, -1)
        _, gains = choose(logits, posterior.log_weights(), None)  # type: ignore[arg-type]
        posterior.observe(gains)
    return counts


READINGS = {"8 x llama-1.3b, a prompt of 1,024 tokens": Decoding("llama-1.3b", 8, 1, 1024)}


def reading_counts(case: Decoding, *, from_logits: bool = False) -> Counts:
    """Return what it takes to read and score prompts of `columns` tokens under stacked experts.

    `from_logits`: by forming and normalizing all logits, as models do that the scoring kernel does not serve.
    """
    together = Together([_decoder(case.shape) for _ in range(case.experts)])
    (part,) = together.parts
    if from_logits:
        part.decoder.state_scores = None
    with counted() as counts:
        together.read([[0] * case.columns] * case.batch)
    return counts


def separate_counts(case: Decoding) -> Counts:
    """Return what the forward passes of transformers' own models do in a step, one after the other."""
    decoder = _decoder(case.shape)
    cache = _transformers_cache(decoder)
    _fill(decoder, cache, case.batch, case.columns - 1)
    positions = torch.zeros(case.batch, 1, dtype=torch.int64, device=META)
    with torch.no_grad(), counted() as one:
        decoder.logits(torch.zeros_like(positions), mask=None, positions=positions, cache=cache, keep=1)
    counts = Counts()
    for name in one.kernels:
        counts.kernels[name], counts.bytes[name] = one.kernels[name] * case.experts, one.bytes[name] * case.experts
    return counts


def _decoder(shape: ModelShape) -> Decoder:
    from transformers import AutoConfig, AutoModelForCausalLM

    from btm_scale.model.hf_config import config_json

    with META:
        config = AutoConfig.for_model(**config_json(shape, dtype="bfloat16", end_of_text=2))
        return Decoder(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


def _transformers_cache(decoder: Decoder) -> object:
    from btm_scale.model.hf_load import new_cache

    return new_cache(decoder.model)


def _fill(decoder: Decoder, cache: object, rows: int, columns: int = 8) -> None:
    """Read a few tokens, so that the cache has its shapes."""
    tokens = torch.zeros(rows, columns, dtype=torch.int64, device=META)
    with torch.no_grad():
        decoder.logits(tokens, mask=None, positions=tokens, cache=cache, keep=1)
