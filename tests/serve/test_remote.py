"""A forest whose experts are served by other engines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from helpers.fake_vllm import FakeVllm
from helpers.served_forest import CHAT, PRIOR, Served, running
from helpers.tiny_forest import POSITIONS, Letters, write_experts

from btm_scale.errors import ConfigError
from btm_scale.serve.catalog import Catalog
from btm_scale.serve.chat import ChatTemplate
from btm_scale.serve.engines_file import RemoteExpert, load_engines
from btm_scale.serve.local_scores import LocalScores
from btm_scale.serve.planner import Planner
from btm_scale.serve.remote import RemoteBackend


@contextlib.contextmanager
def remote(
    engines: list[FakeVllm],
    log_prior: np.ndarray,
    local: dict[str, Path] | None = None,
    chat: str = CHAT,
    **settings: Any,
) -> Iterator[Served]:
    with contextlib.ExitStack() as stack:
        for engine in engines:
            stack.enter_context(engine.running())
        places = {f"expert{n}": RemoteExpert(url=one.url, model=one.name) for n, one in enumerate(engines)}
        scores = LocalScores(local or {}, vocabulary=Letters.vocab_size)
        backend = RemoteBackend(
            places, Letters().decode, lambda texts: log_prior, context=POSITIONS, local=scores, **settings
        )
        planner = Planner(Catalog(tuple(places)), backend, Letters(), ChatTemplate(chat, {}))
        yield stack.enter_context(running(planner, backend))


@pytest.fixture(scope="module")
def engines(experts: dict[str, Path]) -> list[FakeVllm]:
    return [FakeVllm(path, f"lora-{name}") for name, path in experts.items()]


@pytest.fixture(scope="module")
def server(engines: list[FakeVllm]) -> Iterator[Served]:
    with remote(engines, PRIOR) as one:
        yield one


def test_the_posterior_is_that_of_local_experts(server: Served, served: Served) -> None:
    for text in ("abcdab", "d", ""):
        answers = [one.post("/v1/posterior", {"input": text}).json() for one in (server, served)]
        assert answers[0]["posterior"] == pytest.approx(answers[1]["posterior"], rel=1e-4)
        assert answers[0]["left_out"] == []


def test_the_posterior_is_traced_as_that_of_local_experts(
    server: Served, served: Served, engines: list[FakeVllm]
) -> None:
    for text in ("abcdab", "d", ""):
        (found, expected) = (
            one.post("/v1/posterior", {"input": text, "trace": True}).json()["trace"] for one in (server, served)
        )
        assert len(found) == len(text) + 1
        for weights, others in zip(found, expected, strict=True):
            assert weights == pytest.approx(others, rel=1e-4)
    with remote([dataclasses.replace(engines[0], is_dead=True), engines[1]], PRIOR) as one:
        answer = one.post("/v1/posterior", {"input": "ab", "trace": True}).json()
    assert (answer["trace"], answer["left_out"]) == ([{"expert1": 1.0}] * 3, ["expert0"])


def test_a_prompt_leaves_room_for_the_token_that_an_engine_generates_when_it_scores(server: Served) -> None:
    answer = server.post("/v1/posterior", {"input": "a" * (POSITIONS - 1)})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert server.post("/v1/posterior", {"input": "a" * (POSITIONS - 2)}).json()["left_out"] == []


def test_the_drawn_expert_answers_and_streams(server: Served, engines: list[FakeVllm]) -> None:
    client = server.client()
    settings: dict[str, Any] = {"model": "forest", "prompt": "", "max_tokens": 9, "seed": 3, "n": 16}
    whole = client.completions.create(**settings, stop=["aaaa"])
    drawn = [choice.model_extra["btm"]["expert"] for choice in whole.choices]
    assert set(drawn) == {"expert0", "expert1"}
    texts = [""] * 16
    for chunk in client.completions.create(**settings, stop=["aaaa"], stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert whole.usage is not None
    ended = sum(choice.finish_reason == "stop" for choice in whole.choices)
    assert whole.usage.completion_tokens == sum(map(len, texts)) + ended
    assert engines[0].requests[-1]["stop"] == ["aaaa"]
    single = client.completions.create(model="expert1", prompt="ab", temperature=0, max_tokens=4)
    assert single.model_extra["btm"]["posterior"] == {"expert1": 1.0}


def test_every_choice_of_every_prompt_has_its_own_seed_which_repeats(server: Served, engines: list[FakeVllm]) -> None:
    def seeds(seed: int) -> list[int]:
        engines[0].requests.clear()
        body = {"model": "expert0", "prompt": ["ab", "ab"], "n": 3, "seed": seed, "max_tokens": 6}
        assert server.post("/v1/completions", body).status_code == 200
        return sorted(request["seed"] for request in engines[0].requests)

    assert seeds(5) == seeds(5)
    assert len({*seeds(5), *seeds(6)}) == 12
    assert all(0 <= seed < 1 << 63 for seed in seeds(-1))


def test_a_request_for_more_texts_than_may_ever_run_is_refused_for_good(engines: list[FakeVllm]) -> None:
    with remote(engines, PRIOR, max_waiting=4) as server:
        body = {"model": "expert0", "prompt": "ab", "max_tokens": 1}
        assert server.post("/v1/completions", {**body, "n": 4}).status_code == 200
        for many in ({"n": 5}, {"prompt": ["ab"] * 5}):
            answer = server.post("/v1/completions", {**body, **many})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_choices")
            assert "at most 4 texts" in answer.text


def test_what_engines_cannot_do_is_refused(server: Served) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="cannot be mixed"):
        client.completions.create(model="forest", prompt="a", temperature=0)
    with pytest.raises(openai.BadRequestError, match="cannot be mixed"):
        client.completions.create(model="forest", prompt="a", logprobs=1, echo=True)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_local_experts(server: Served, served: Served, stream: bool) -> None:
    def scored(there: Served, **settings: Any) -> list[Any]:
        found = []
        ask: dict[str, Any] = {"model": "expert1", "prompt": "abca", "max_tokens": 3, "temperature": 0, "logprobs": 2}
        answer: Any = there.client().completions.create(**{**ask, **settings}, stream=stream)
        for part in answer if stream else [answer]:
            scores = part.choices[0].logprobs
            found += list(
                zip(scores.tokens, scores.token_logprobs, scores.text_offset, scores.top_logprobs, strict=True)
            )
        return found

    for settings in ({}, {"echo": True}, {"echo": True, "max_tokens": 0, "prompt": [0, 1, 2]}):
        pairs = list(zip(scored(server, **settings), scored(served, **settings), strict=True))
        assert len(pairs) >= 3
        for (token, value, offset, top), (same, expected, place, others) in pairs:
            assert (token, offset) == (same, place)
            assert value == (None if expected is None else pytest.approx(expected, abs=1e-4))
            assert top == (None if others is None else pytest.approx(others, abs=1e-4))


def test_a_chat_has_the_log_probabilities_of_its_engine(server: Served, served: Served) -> None:
    body = {"model": "expert0", "messages": [{"role": "user", "content": "ab"}], "logprobs": True, "top_logprobs": 2}
    body |= {"max_tokens": 3, "temperature": 0}
    answers = [one.post("/v1/chat/completions", body).json()["choices"][0] for one in (server, served)]
    contents = [answer["logprobs"]["content"] for answer in answers]
    assert [one["token"] for one in contents[0]] == [one["token"] for one in contents[1]]
    values = [[one["logprob"] for one in content] for content in contents]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_a_chat_ends_at_a_special_token_that_its_template_writes(engines: list[FakeVllm]) -> None:
    turns = "{% for message in messages %}{{ message.content }}{{ 'X' if message.role == 'assistant' }}{% endfor %}"
    asked: dict[str, Any] = {"model": "expert0", "max_tokens": 12}
    with remote(engines, PRIOR) as server:
        for asked["seed"] in range(50):
            text = server.post("/v1/completions", {**asked, "prompt": "ab"}).json()["choices"][0]["text"]
            if len(set(text)) > 1:
                break
    end = next(letter for letter in text if letter != text[0])
    special = [dataclasses.replace(engine, special=end) for engine in engines]
    with remote(special, PRIOR, chat=turns.replace("X", end)) as server:
        messages = [{"role": "user", "content": "ab"}]
        (choice,) = server.post("/v1/chat/completions", {**asked, "messages": messages}).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text[: text.index(end)], "stop")


def test_engines_that_die_are_left_out_and_the_rest_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = write_experts(tmp_path, 3)
    engines = [FakeVllm(path, name) for name, path in paths.items()]
    certain = np.log([0.999, 0.0005, 0.0005])
    with remote(engines, certain) as server:
        for engine in engines[:2]:
            engine.dies_after = 1
        # The end of a document would come before the engine dies.
        body = {"model": "expert0", "prompt": "ab", "max_tokens": 9, "stream": True, "temperature": 0}
        events = [line for line in server.post("/v1/completions", body).text.splitlines() if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "service_unavailable"
        server.post("/v1/completions", {**body, "model": "expert1"})
        for _ in range(3):
            answer = server.post("/v1/completions", {"model": "forest", "prompt": "ab", "max_tokens": 3}).json()
            assert answer["btm"]["expert"] == "expert2"
            assert answer["btm"]["left_out"] == ["expert0", "expert1"]
        assert server.idle()


def test_an_engine_without_prompt_logprobs_is_scored_by_local_weights_or_left_out_with_the_reason(
    experts: dict[str, Path], served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    engines = [FakeVllm(path, name) for name, path in experts.items()]
    engines[0].has_prompt_logprobs = engines[0].echoes = False
    with remote(engines, PRIOR) as server:
        answer = server.post("/v1/posterior", {"input": "ab"}).json()
    assert answer["posterior"] == {"expert1": 1.0}
    assert answer["left_out"] == ["expert0"]
    assert "returned no prompt_logprobs" in caplog.text
    with remote(engines, PRIOR, {"expert0": experts["expert0"]}) as server:
        answer = server.post("/v1/posterior", {"input": "ab"}).json()
    assert answer["posterior"] == pytest.approx(
        served.post("/v1/posterior", {"input": "ab"}).json()["posterior"], rel=1e-4
    )


def test_an_engine_that_only_echoes_scores_is_asked_to(experts: dict[str, Path], served: Served) -> None:
    engines = [FakeVllm(path, name) for name, path in experts.items()]
    engines[1].has_prompt_logprobs = False
    with remote(engines, PRIOR) as server:
        for text in ("ab", "abcd"):
            answer = server.post("/v1/posterior", {"input": text}).json()
            expected = served.post("/v1/posterior", {"input": text}).json()
            assert answer["posterior"] == pytest.approx(expected["posterior"], rel=1e-4)
    assert ["echo" in request for request in engines[1].requests] == [False, True, True]


@pytest.mark.parametrize("top", [0, 2])
def test_a_prompt_is_echoed_with_the_scores_of_an_engine_that_echoes_it_or_refused(
    experts: dict[str, Path], served: Served, top: int
) -> None:
    engines = [FakeVllm(path, name, has_prompt_logprobs=False) for name, path in experts.items()]
    engines[1].echoes = False
    body = {"model": "expert0", "prompt": "abca", "max_tokens": 0, "echo": True, "logprobs": top}
    with remote(engines, PRIOR) as server:
        for _ in range(2):  # how the engine scores is not known yet, and known
            found, expected = (
                one.post("/v1/completions", body).json()["choices"][0]["logprobs"] for one in (server, served)
            )
            for key in ("tokens", "text_offset"):
                assert found[key] == expected[key]
            assert found["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-4)
            for row, same in zip(found["top_logprobs"] or (), expected["top_logprobs"] or (), strict=True):
                assert row == pytest.approx(same, abs=1e-4)
        refused = server.post("/v1/completions", {**body, "model": "expert1"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "engine_refused")
    assert "returns no log-probabilities of prompts. Leave echo or logprobs out" in refused.text


def test_an_engine_that_hangs_is_left_out_and_asked_again_later(
    experts: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    engines = [FakeVllm(path, name) for name, path in experts.items()]
    with remote(engines, PRIOR, answer_seconds=1.5) as server:
        engines[0].latency = 4.0
        for _ in range(2):
            answer = server.post("/v1/completions", {"model": "forest", "prompt": "ab"}).json()
            assert (answer["btm"]["expert"], answer["btm"]["left_out"]) == ("expert1", ["expert0"])
        assert len(engines[0].requests) == 1
        engines[0].latency = 0.0
        server.backend._engines["expert0"]._down_until = 0.0
        assert server.post("/v1/posterior", {"input": "ab"}).json()["left_out"] == []
    assert "engine of 'expert0' does not answer: time-out" in caplog.text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("expert7: http://host/v1", "Unknown expert 'expert7'"),
        ("expert0: ftp://host", "expert0.url: String should match"),
        ("expert0: {url: http://host/v1, port: 3}", "port: Extra inputs"),
        ("{}", "names no expert"),
        ("expert0: {url: http://host/v1, api_key_variable: ABSENT_KEY}", "ABSENT_KEY is not set"),
    ],
)
def test_a_wrong_file_of_engines_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "engines.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_engines(tmp_path / "engines.yaml", ["expert0", "expert1"])


def test_a_file_of_engines_gives_urls_names_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAW_KEY", "abc")
    file = tmp_path / "engines.yaml"
    file.write_text(
        "law: {url: http://a:1/v1, model: law-lora, api_key_variable: LAW_KEY}\n"
        "code: {url: http://b:2/v1, score: code}\n"
    )
    engines = load_engines(file, ["law", "code", "med"])
    assert engines["law"].headers == {"Authorization": "Bearer abc"}
    assert engines["code"] == RemoteExpert(url="http://b:2/v1", score=tmp_path / "code")


def test_the_defaults_of_an_engine_cut_nothing_off(experts: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    engines = [FakeVllm(path, name) for name, path in experts.items()]
    engines[0].default_top_k = 1
    engines[1].refuses_top_p = True
    texts: list[set[str]] = []
    with remote(engines, PRIOR) as server:
        for name in experts:
            body = {"model": name, "prompt": "ab", "max_tokens": 6}
            answers = [server.post("/v1/completions", {**body, "seed": seed}).json() for seed in range(8)]
            texts.append({answer["choices"][0]["text"] for answer in answers})
        limited = {"model": "expert0", "prompt": "ab", "max_tokens": 6, "top_k": 1}
        greedy = {
            server.post("/v1/completions", {**limited, "seed": seed}).json()["choices"][0]["text"] for seed in (1, 2)
        }
    assert all(len(found) > 3 for found in texts)
    assert len(greedy) == 1
    assert len([body for body in engines[1].requests if body.get("stream")]) == 9, "it is asked twice only once"
    assert caplog.text.count("Texts are sampled with its defaults") == 1


def test_an_engine_that_takes_samplers_is_not_asked_twice_about_a_request_that_it_refuses(
    experts: dict[str, Path],
) -> None:
    engine = FakeVllm(next(iter(experts.values())), "expert0")
    with remote([engine], PRIOR[:1]) as server:
        body = {"model": "expert0", "prompt": "ab", "max_tokens": 3}
        assert server.post("/v1/completions", body).status_code == 200
        engine.longest = 1
        engine.requests.clear()
        assert server.post("/v1/completions", body).status_code == 400
        assert len(engine.requests) == 1
