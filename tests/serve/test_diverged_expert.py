"""An expert whose weights have NaN: its requests get status 503 and a sentence, and the others are answered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_vllm import FakeVllm
from helpers.raw_engine import served_by
from helpers.served_forest import Served, planner_of, running
from transformers import AutoModelForCausalLM

from btm_scale.serve.events import event_bytes
from btm_scale.serve.local_scores import LocalScores

ASK: dict[str, Any] = {"prompt": "ab", "max_tokens": 3}
ECHO: dict[str, Any] = {"echo": True, "logprobs": 1}


@pytest.fixture(scope="module")
def diverged(experts: dict[str, Path]) -> Iterator[Served]:
    planner, backend = planner_of(experts)
    with running(planner, backend) as server:
        with torch.inference_mode():
            backend._engine.shelf.take("expert1").model.get_output_embeddings().weight.fill_(math.nan)
        yield server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["expert1", "forest", "forest:mixture"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"logprobs": 1}, ECHO, {**ECHO, "logprobs": 0}, {**ECHO, "max_tokens": 0}, {"top_k": 2, "logprobs": 0}],
    ids=str,
)
def test_every_request_that_reads_it_is_unavailable(
    diverged: Served, settings: dict[str, Any], model: str, stream: bool
) -> None:
    answer = diverged.post("/v1/completions", {**ASK, **settings, "model": model, "stream": stream})
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert error["code"] == "service_unavailable"
    assert "logits contain NaN" in error["message"]


@pytest.mark.parametrize("trace", [False, True])
def test_its_posterior_is_unavailable(diverged: Served, trace: bool) -> None:
    answer = diverged.post("/v1/posterior", {"input": "ab", "trace": trace})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_unavailable")


def test_the_other_experts_are_answered(diverged: Served) -> None:
    assert diverged.post("/v1/completions", {**ASK, **ECHO, "model": "expert0"}).status_code == 200
    assert diverged.idle()


def test_no_event_of_a_stream_has_a_number_that_json_lacks() -> None:
    with pytest.raises(ValueError, match="JSON"):
        event_bytes({"logprob": math.nan})


def test_local_weights_that_score_with_nan_leave_their_expert_out(experts: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(experts["expert1"])
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(tmp_path)
    engines = [FakeVllm(path, name) for name, path in experts.items()]
    local = LocalScores({"expert1": tmp_path}, vocabulary=5)
    with engines[0].running(), engines[1].running(), served_by(*(one.url for one in engines), local=local) as server:
        answer = server.post("/v1/posterior", {"input": "ab"}).json()
    assert (answer["posterior"], answer["left_out"]) == ({"expert0": 1.0}, ["expert1"])
