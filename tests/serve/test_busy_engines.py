"""Engines that are busy, refuse one request or lose one connection stay in the posterior."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.fake_vllm import FakeVllm
from helpers.raw_engine import served_by
from helpers.served_forest import Served

from btm_scale.serve.engine_client import retry_after

POSTERIOR = ("/v1/posterior", {"input": "ab"})
TEXT = {"model": "expert0", "prompt": "ab", "max_tokens": 9, "temperature": 0}
SOON, LATE = {"Retry-After": "0.1"}, {"Retry-After": "30"}


@pytest.fixture(scope="module")
def running_engines(experts: dict[str, Path]) -> Iterator[list[FakeVllm]]:
    engines = [FakeVllm(path, name) for name, path in experts.items()]
    with engines[0].running(), engines[1].running():
        yield engines


@pytest.fixture
def engines(running_engines: list[FakeVllm]) -> list[FakeVllm]:
    for engine in running_engines:
        engine.requests.clear()
        engine.refusals, engine.stream_refusals, engine.breaks, engine.longest = [], [], 0, None
        engine.is_dead = False
    return running_engines


@pytest.fixture
def server(engines: list[FakeVllm]) -> Iterator[Served]:
    with served_by(*(engine.url for engine in engines)) as one:
        yield one


@pytest.fixture
def expected(server: Served) -> dict[str, Any]:
    """The posterior of all experts."""
    answer: dict[str, Any] = server.post(*POSTERIOR).json()
    assert answer["left_out"] == []
    return answer


def events(answer: httpx2.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("refusal", [(429, SOON), (503, SOON), (408, {}), (429, {})])
def test_an_engine_that_is_busy_for_a_moment_is_asked_again(
    server: Served, engines: list[FakeVllm], refusal: tuple[int, dict[str, str]], expected: dict[str, Any]
) -> None:
    engines[0].refusals, engines[0].stream_refusals = [refusal], [refusal]
    begin = time.monotonic()
    assert server.post(*POSTERIOR).json() == expected
    assert time.monotonic() - begin > float(refusal[1].get("Retry-After", 0.25)) - 0.01
    assert server.post("/v1/completions", TEXT).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_stays_busy_passes_its_429_on_and_is_not_left_out(
    server: Served, engines: list[FakeVllm], stream: bool, expected: dict[str, Any]
) -> None:
    for refused in (engines[0].refusals, engines[1].stream_refusals, engines[0].stream_refusals):
        refused.append((429, LATE))
        model = "forest" if refused is engines[0].refusals else f"expert{int(refused is engines[1].stream_refusals)}"
        answer = server.post("/v1/completions", {**TEXT, "temperature": 1, "model": model, "stream": stream})
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "30"), model
        assert answer.json()["error"]["code"] == "server_overloaded"
        assert server.post(*POSTERIOR).json() == expected
    assert server.idle()


def test_an_engine_that_answers_503_without_a_time_is_left_out(server: Served, engines: list[FakeVllm]) -> None:
    engines[0].refusals = [(503, {})]
    assert server.post(*POSTERIOR).json()["left_out"] == []
    engines[0].refusals = [(503, {})] * 2
    assert server.post(*POSTERIOR).json()["left_out"] == ["expert0"]


def test_a_stream_that_breaks_is_an_error_event_and_the_expert_stays(server: Served, engines: list[FakeVllm]) -> None:
    for _ in range(3):  # with a complete text after each
        engines[0].breaks = 1
        *texts, last = events(server.post("/v1/completions", {**TEXT, "stream": True}))
        assert len(texts) == 1
        assert last["error"]["code"] == "service_unavailable"
        assert server.post(*POSTERIOR).json()["left_out"] == []
        assert server.post("/v1/completions", TEXT).status_code == 200


def test_a_request_without_a_stream_is_repeated_when_its_engine_breaks_off(
    server: Served, engines: list[FakeVllm]
) -> None:
    complete = server.post("/v1/completions", TEXT).json()
    engines[0].breaks = 1
    answer = server.post("/v1/completions", TEXT).json()
    assert (answer["choices"], answer["usage"]) == (complete["choices"], complete["usage"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_of_which_nothing_was_seen_goes_to_another_expert(
    server: Served, engines: list[FakeVllm], stream: bool
) -> None:
    repeated = 0
    for seed in range(8):
        engines[0].stream_refusals = [(500, {})] * 2
        body = {"model": "forest", "prompt": "", "max_tokens": 3, "seed": seed, "stream": stream}
        answer = server.post("/v1/completions", body)
        assert answer.status_code == 200
        btm = (events(answer)[0] if stream else answer.json())["btm"]
        assert btm["expert"] == "expert1"
        if not engines[0].stream_refusals:  # expert0 was drawn first
            assert (btm["posterior"], btm["left_out"]) == ({"expert1": 1.0}, ["expert0"])
            repeated += 1
        server.backend._engines["expert0"]._down_until = 0.0
    assert 0 < repeated < 8


def test_an_engine_whose_streams_keep_breaking_is_left_out(server: Served, engines: list[FakeVllm]) -> None:
    engines[0].breaks = 2
    for _ in range(2):
        server.post("/v1/completions", {**TEXT, "stream": True})
    assert server.post(*POSTERIOR).json()["left_out"] == ["expert0"]


def test_requests_that_fail_at_the_same_time_are_one_failure(server: Served, engines: list[FakeVllm]) -> None:
    engines[0].is_dead = True
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.post(*POSTERIOR).json(), range(8)))
    assert all(answer["left_out"] == ["expert0"] for answer in answers)
    assert server.backend._engines["expert0"]._down_until < time.monotonic() + 6


def test_a_prompt_that_an_engine_does_not_read_is_refused_and_the_engine_stays(
    server: Served, engines: list[FakeVllm], expected: dict[str, Any]
) -> None:
    engines[0].longest = 4
    for model in ("forest", "expert0"):
        answer = server.post("/v1/completions", {"model": model, "prompt": "abcdab", "max_tokens": 1})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "engine_refused")
        assert (
            "'expert0' refused the request with status 400: This model's maximum context length is 4"
            in error["message"]
        )
    assert server.post(*POSTERIOR).json() == expected


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("soon", None), ("nan", None), ("inf", None), ("", None)],
)
def test_a_retry_after_header_is_read(value: str | None, seconds: float | None) -> None:
    assert retry_after(value) == seconds


def test_a_retry_after_header_may_be_a_date() -> None:
    assert retry_after(formatdate(time.time() + 20, usegmt=True)) == pytest.approx(20, abs=2)
    assert retry_after("Sun, 06 Nov 1994 08:49:37 GMT") == 0.0
