"""Train, score and decode with `meta` in place of a GPU, where a CPU tensor that meets a GPU tensor raises.

`run_on_meta.py SPEC.json`: the spec has `cases` (name: `family`, `recompute`, `documents`) and `result`. For
each case the script writes `training`, `scoring` and `decoding`, each an error's text or "", and of the training step
`calls` (operator: number) and `squares`, whether a tensor [..., length, length] of each head was made.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as fake_config
from helpers.worlds import fork_world, read_spec
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup
from btm_scale.evaluate.score import _log_probs
from btm_scale.generate.sampling import cut
from btm_scale.model.families import FAMILIES
from btm_scale.model.gpt import ExpertModel, build_model
from btm_scale.model.hf_config import config_json
from btm_scale.model.hf_decoder import Decoder
from btm_scale.model.shape import ModelShape

GPU = torch.device("meta")
BATCH, LENGTH, VOCABULARY = 2, 64, 129


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


def shape_of(family: str) -> ModelShape:
    traits = FAMILIES[family]
    sizes = {"layers": 2, "hidden": 96, "heads": 6, "kv_heads": 2 if traits.grouped else 6, "ffn": 112}
    window = {"window": 16} if traits.windowed else {}
    return ModelShape(family=family, positions=LENGTH, vocabulary=VOCABULARY, tied=True, **sizes, **window)


def tokens() -> torch.Tensor:
    return torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=GPU)


def train(model: ExpertModel) -> None:
    loss = model(tokens(), tokens())
    loss.backward()
    assert loss.device == GPU
    assert all(parameter.grad is not None and parameter.grad.device == GPU for parameter in model.parameters())


def score(group: ExpertGroup, model: ExpertModel) -> None:
    with torch.no_grad():
        assert _log_probs(group, model.eval(), tokens(), tokens()).device == GPU


def decode(shape: ModelShape) -> None:
    with torch.device(GPU):
        config = AutoConfig.for_model(**config_json(shape, dtype="bfloat16", end_of_text=2))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    decoder = Decoder(model)
    for lengths in ((8, 8, 8), (8, 5, 1)):
        for scores in (True, False):
            reading = decoder.read([[1] * length for length in lengths], score=scores)
            reading.feed(torch.zeros(3, dtype=torch.int64, device=GPU))
            reading.next_log_probs(torch.zeros(3, dtype=torch.int64, device=GPU))
            assert cut(reading.logits, 5, 0.9).device == GPU


def outcome(job: Callable[..., None], *arguments: Any) -> str:
    try:
        job(*arguments)
    except Exception:
        return traceback.format_exc(limit=-4)
    return ""


def run_case(group: ExpertGroup, family: str, recompute: Any, documents: bool) -> dict[str, Any]:
    shape = shape_of(family)
    model = build_model(shape, tensor=1, dtype=torch.bfloat16, on_cpu=True, recompute=recompute).to_empty(device=GPU)
    model.end_of_text = 2 if documents else None
    scores = BATCH * shape.heads * LENGTH * LENGTH
    with Operators(scores) as operators:
        training = outcome(train, model)
    return {
        "training": training,
        "scoring": outcome(score, group, model),
        "decoding": outcome(decode, shape),
        "calls": operators.calls,
        "squares": operators.squares,
    }


def run(spec: dict[str, Any]) -> None:
    group = ExpertGroup.join(Layout(precision="bf16"))
    torch.cuda.current_device = lambda: GPU  # type: ignore[assignment,return-value]
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
