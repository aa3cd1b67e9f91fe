"""Train, score and decode with `meta` in place of a GPU, where a CPU tensor that meets a GPU tensor raises.

`run_on_meta.py SPEC.json`: the spec has `cases` (name: `family`, `recompute`, `documents`) and `result`. For
each case the script writes `training` (but for mixtures, which are not trained), `scoring`, `decoding` and `serving`,
each an error's text or "", and of the training step `calls` (operator: number) and `squares`, whether a tensor
[..., length, length] of each head was made.
"""

from __future__ import annotations

import contextlib
import json
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx.experimental._config as fake_config
from helpers.worlds import fork_world, read_spec
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup
from btm_scale.evaluate.score import _log_probs
from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.generate.running_batch import Row, RunningBatch
from btm_scale.generate.sampling import Sampling, cut, token_log_probs
from btm_scale.generate.together import Together
from btm_scale.model import gpt
from btm_scale.model.families import READABLE
from btm_scale.model.gpt import ExpertModel
from btm_scale.model.hf_config import config_json
from btm_scale.model.hf_decoder import Decoder
from btm_scale.model.shape import ModelShape

GPU = torch.device("meta")
BATCH, LENGTH, VOCABULARY = 2, 64, 129
EXPERTS, TOP_K = 4, 2


class Operators(TorchDispatchMode):
    """Counts the calls of each operator, and notices scores of all heads."""

    def __init__(self, scores: int) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.squares = False
        self._scores = scores

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.calls[operator.overloadpacket._qualified_op_name] += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-2:] == (LENGTH, LENGTH):
                self.squares = self.squares or tensor.numel() >= self._scores
        return result


class HostReads(TorchDispatchMode):
    """Answers what the host reads, and what depends on values: every expert of a mixture gets as many tokens."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        source, aten = args[0] if args else None, torch.ops.aten
        if isinstance(source, torch.Tensor) and source.is_meta:
            if operator is aten.masked_select.default:
                return source.new_empty(source.numel() * TOP_K // EXPERTS)
            if operator is aten._local_scalar_dense.default:
                return 1
            if operator is aten._to_copy.default and str((kwargs or {}).get("device")) == "cpu":
                tokens = 0 if source.is_floating_point() else BATCH * LENGTH * TOP_K // EXPERTS
                return torch.full(source.shape, tokens, dtype=source.dtype)
        return operator(*args, **(kwargs or {}))


def shape_of(family: str) -> ModelShape:
    traits = READABLE[family]
    sizes = {"layers": 2, "hidden": 96, "heads": 6, "kv_heads": 2 if traits.grouped else 6, "ffn": 112}
    extra = ({"window": 16} if traits.windowed else {}) | (
        {"experts": EXPERTS, "top_k": TOP_K, "shared_ffn": 24 * traits.shared_expert} if traits.mixture else {}
    )
    return ModelShape(family=family, positions=LENGTH, vocabulary=VOCABULARY, tied=True, **sizes, **extra)


def tokens() -> torch.Tensor:
    return torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=GPU)


def train(model: ExpertModel) -> None:
    # The host reads the length of the longest document.
    with contextlib.nullcontext() if model.end_of_text is None else HostReads():
        loss = model(tokens(), tokens())
    loss.backward()
    assert loss.device == GPU
    assert all(parameter.grad is not None and parameter.grad.device == GPU for parameter in model.parameters())


def score(group: ExpertGroup, model: ExpertModel) -> None:
    with torch.no_grad(), HostReads():
        assert _log_probs(group, model.eval(), tokens(), tokens()).device == GPU


def decoder_of(shape: ModelShape) -> Decoder:
    with torch.device(GPU):
        config = AutoConfig.for_model(**config_json(shape, dtype="bfloat16", end_of_text=2))
        return Decoder(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


def decode(shape: ModelShape) -> None:
    decoder = decoder_of(shape)
    for lengths in ((8, 8, 8), (8, 5, 1)):
        for scores in (True, False):
            reading = decoder.read([[1] * length for length in lengths], score=scores)
            reading.feed(torch.zeros(3, dtype=torch.int64, device=GPU))
            assert token_log_probs(reading.logits[None], torch.zeros(3, dtype=torch.int64, device=GPU)).device == GPU
            assert cut(reading.logits, 5, 0.9).device == GPU


def serve(shape: ModelShape) -> None:
    """Continue texts of two experts that join and leave, each with its own sampling, as a server does."""
    together, batch = Together([decoder_of(shape) for _ in range(2)]), RunningBatch(torch.Generator())
    rows = [
        Row(Sampling(temperature=0.0), top=3),
        Row(Sampling(0.7, top_k=5, top_p=0.9), random=torch.Generator()),
        Row(),
    ]
    with HostReads():
        for prompts in ([[1] * 8, [1] * 5, [1]], [[1] * 12, [1] * 2, [1] * 2]):
            batch.join(together.read(prompts), RunningPosterior(np.log([0.5, 0.5]), len(prompts)), rows)
            for kept in (slice(None), slice(0, 2)):
                sampled, alternatives = batch.sample()
                assert sampled.device == GPU
                assert alternatives[0] is not None
                batch.advance(sampled, list(range(len(batch.rows)))[kept])


def outcome(job: Callable[..., None], *arguments: Any) -> str:
    try:
        job(*arguments)
    except Exception:
        return traceback.format_exc(limit=-4)
    return ""


def run_case(group: ExpertGroup, family: str, recompute: Any, documents: bool) -> dict[str, Any]:
    shape = shape_of(family)
    model = gpt.build_model(shape, tensor=1, dtype=torch.bfloat16, on_cpu=False, recompute=recompute)
    model = model.to_empty(device=GPU)
    model.end_of_text = 2 if documents else None
    scores = BATCH * shape.heads * LENGTH * LENGTH
    with Operators(scores) as operators:
        training = "" if shape.experts else outcome(train, model)
    return {
        "training": training,
        "scoring": outcome(score, group, model),
        "decoding": outcome(decode, shape),
        # Neither matters to transformers.
        "serving": outcome(serve, shape) if recompute == "none" and not documents else "",
        "calls": operators.calls,
        "squares": operators.squares,
    }


def run(spec: dict[str, Any]) -> None:
    group = ExpertGroup.join(Layout(precision="bf16"))
    torch.cuda.current_device = lambda: GPU  # type: ignore[assignment,return-value]
    gpt.gpu = lambda: torch.device("cpu")  # from where `to_empty` moves it
    torch.nn.init.normal_ = lambda weight, *_, **__: weight
    # `meta` has no values: whatever the host asks about one, such as whether a log-probability is NaN, is false.
    torch.Tensor.__bool__ = lambda _: False  # type: ignore[method-assign,assignment,return-value]
    # As many documents as tokens: their number is a value, too.
    with fake_config.patch(meta_nonzero_assume_all_nonzero=True):
        results = {name: run_case(group, **case) for name, case in spec["cases"].items()}
    Path(spec["result"]).write_text(json.dumps(results))
    group.leave()


if __name__ == "__main__":
    fork_world(1, run, read_spec())
