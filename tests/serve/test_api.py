"""The official client against a served forest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from helpers.served_forest import CHAT, PRIOR, Served
from helpers.tiny_forest import POSITIONS, Letters, Oracle

from btm_scale.generate.generator import Generator
from btm_scale.generate.sampling import Sampling
from btm_scale.model.hf_decoder import Decoder
from btm_scale.serve.chat import ChatTemplate
from btm_scale.serve.schemas import ChatRequest, CompletionRequest

GREEDY: dict[str, Any] = {"model": "forest:mixture", "temperature": 0}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.client()


def greedy(experts: dict[str, Path], prompt: str, tokens: int) -> Any:
    prior = PRIOR[: len(experts)]
    generator = Generator(experts, Letters(), log_prior=prior, method="mixture", sampling=Sampling(temperature=0))
    return generator.generate([prompt], max_tokens=tokens)[0]


def test_the_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["forest", "forest:mixture", "expert0", "expert1", "seed"]
    assert client.models.retrieve("forest:mixture").id == "forest:mixture"
    with pytest.raises(openai.NotFoundError, match=r"'expert9' does not exist\. Did you mean 'expert"):
        client.models.retrieve("expert9")


@pytest.mark.parametrize("prompt", ["ab", "", "dcbacb", "bbbb"])
def test_greedy_decoding_of_the_mixture_equals_generate(
    client: openai.OpenAI, experts: dict[str, Path], prompt: str
) -> None:
    expected = greedy(experts, prompt, 9)
    answer = client.completions.create(prompt=prompt, max_tokens=9, **GREEDY)
    (choice,) = answer.choices
    assert choice.text == expected.text
    assert choice.finish_reason == ("stop" if expected.finished == "end" else "length")
    ended = expected.finished == "end"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        len(prompt),
        len(expected.tokens) + ended,
    )
    btm = answer.model_extra["btm"]
    assert (btm["method"], btm["expert"]) == ("mixture", None)
    assert btm["posterior"] == pytest.approx(expected.posterior, rel=1e-4)


def test_a_stream_has_the_text_of_the_complete_answer_and_its_usage(client: openai.OpenAI) -> None:
    settings = {**GREEDY, "prompt": ["ab", "d"], "max_tokens": 9, "n": 2}
    whole = client.completions.create(**settings)
    texts = [""] * 4
    reasons: list[str | None] = [None] * 4
    chunks = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
        assert chunk.usage is None
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert texts[0] == texts[1] != texts[2]
    assert chunks[0].model_extra["btm"]["method"] == "mixture"


def test_a_seed_repeats_and_every_choice_names_the_expert_that_wrote_it(client: openai.OpenAI) -> None:
    def ask(seed: int | None) -> list[tuple[str, str]]:
        answer = client.completions.create(model="forest", prompt="ab", max_tokens=12, n=12, seed=seed)
        assert answer.model_extra["btm"]["method"] == "expert"
        return [(choice.text, choice.model_extra["btm"]["expert"]) for choice in answer.choices]

    assert ask(5) == ask(5) != ask(6)
    assert {expert for _, expert in ask(5)} <= {"expert0", "expert1"}
    assert len({text for text, _ in ask(None)}) > 3


def test_a_single_expert_answers_by_name(client: openai.OpenAI, experts: dict[str, Path]) -> None:
    expected = greedy({"expert0": experts["expert0"]}, "ab", 6).text
    for name in ("expert0", "seed"):
        answer = client.completions.create(model=name, prompt="ab", temperature=0, max_tokens=6)
        assert answer.choices[0].text == expected
        assert answer.model_extra["btm"]["expert"] == name


def test_other_settings_of_the_forest_are_answered_by_the_mixture(client: openai.OpenAI) -> None:
    for settings in ({"temperature": 0.5}, {"top_p": 0.9}, {"extra_body": {"top_k": 2}}):
        answer = client.completions.create(model="forest", prompt="ab", max_tokens=2, **settings)
        assert answer.model_extra["btm"]["method"] == "mixture"


def test_a_text_ends_before_a_stop_string(client: openai.OpenAI, experts: dict[str, Path]) -> None:
    free = greedy(experts, "ab", 8).text
    stop = free[2:4]
    answer = client.completions.create(prompt="ab", max_tokens=8, stop=[stop, "dddd"], **GREEDY)
    assert answer.choices[0].text == free[: free.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_token_ids_are_a_prompt_and_may_include_the_start_of_the_document(client: openai.OpenAI) -> None:
    answers = [
        client.completions.create(prompt=prompt, max_tokens=8, echo=True, **GREEDY)
        for prompt in ("ab", [1, 2], [0, 1, 2])
    ]
    assert [answer.choices[0].text for answer in answers[:2]] == [answers[0].choices[0].text] * 2
    assert answers[2].choices[0].text == "." + answers[0].choices[0].text
    assert [answer.usage.prompt_tokens for answer in answers if answer.usage] == [2, 2, 3]


def test_log_probabilities_of_prompt_and_text_are_those_of_the_mixture(
    client: openai.OpenAI, experts: dict[str, Path]
) -> None:
    oracle = Oracle(experts)
    answer = client.completions.create(prompt="abca", max_tokens=3, echo=True, logprobs=2, **GREEDY)
    (choice,) = answer.choices
    assert choice.logprobs is not None
    tokens, values = choice.logprobs.tokens, choice.logprobs.token_logprobs
    top, offsets = choice.logprobs.top_logprobs, choice.logprobs.text_offset
    assert tokens is not None
    assert values is not None
    assert top is not None
    assert tokens[:4] == list("abca")
    assert offsets == list(range(len(tokens)))
    ids = [0, *Letters().encode("".join(tokens))]
    for position, (value, others) in enumerate(zip(values, top, strict=True), 1):
        expected = oracle.mixture_after(ids[:position], log_prior=PRIOR)
        assert value == pytest.approx(expected[ids[position]], abs=1e-4)
        assert set(np.argsort(-expected)[:2]) <= {Letters().encode(other)[0] for other in others}
        assert max(others.values()) == pytest.approx(expected.max(), abs=1e-4)
    # As lm-evaluation-harness reads them: the continuation is the prompt's end, the last token is generated.
    assert choice.text == "abca" + "".join(tokens[4:]).removesuffix(".")


@pytest.mark.parametrize("model", ["forest", "expert0"])
def test_a_prompt_whose_tokens_have_no_alternatives_is_read_once(
    model: str, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"model": model, "prompt": "abcab", "max_tokens": 2, "echo": True, "temperature": 0}
    expected = client.completions.create(logprobs=1, **settings).choices[0].logprobs
    lengths: list[int] = []
    logits = Decoder.logits

    def spy(self: Decoder, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        lengths.append(ids.shape[1])
        return logits(self, ids, **inputs)

    monkeypatch.setattr(Decoder, "logits", spy)
    found = client.completions.create(logprobs=0, **settings).choices[0].logprobs
    assert [length for length in lengths if length > 1] == [6]
    assert found is not None
    assert expected is not None
    assert found.tokens == expected.tokens
    assert found.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "asked", [{"logprobs": 0}, {"echo": True}, {"model": "expert1", "echo": True, "logprobs": 0}], ids=str
)
def test_the_first_chunk_of_a_stream_names_the_expert_and_has_the_echoed_prompt(
    client: openai.OpenAI, asked: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"model": "forest", "prompt": ["ab", "d"], "max_tokens": 4, "n": 2, "seed": 3, **asked}
    whole = client.completions.create(**settings)
    chunks: list[list[Any]] = [[] for _ in whole.choices]
    for chunk in client.completions.create(**settings, stream=True):
        chunks[chunk.choices[0].index].append(chunk)
    for choice, own in zip(whole.choices, chunks, strict=True):
        expert = choice.model_extra["btm"]["expert"]
        assert expert is not None
        assert [one.model_extra["btm"]["expert"] for one in (own[0], own[-1])] == [expert, expert]
        assert "".join(one.choices[0].text for one in own) == choice.text
        for name in ("tokens", "text_offset") if choice.logprobs is not None else ():
            found = [value for one in own for value in getattr(one.choices[0].logprobs, name)]
            assert found == getattr(choice.logprobs, name)


def test_the_first_token_given_has_no_log_probability_if_it_starts_the_document(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt=[0, 1, 2], max_tokens=0, echo=True, logprobs=1, **GREEDY)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == [".", "a", "b"]
    assert answer.choices[0].logprobs.token_logprobs[0] is None  # type: ignore[index]


def test_chats_use_the_template_and_stream(client: openai.OpenAI) -> None:
    chat: list[Any] = [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
    ]
    settings: dict[str, Any] = {**GREEDY, "messages": chat, "max_completion_tokens": 7}
    plain = client.completions.create(prompt="abca", max_tokens=7, **GREEDY)
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content) == ("assistant", plain.choices[0].text)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    first = choice.logprobs.content[0]
    assert first.logprob == max(other.logprob for other in first.top_logprobs)
    assert len(first.top_logprobs) == 3
    chunks = list(client.chat.completions.create(**settings, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].text
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    with pytest.raises(openai.BadRequestError, match="refuses these messages: no tools") as refused:
        client.chat.completions.create(model="forest", messages=[{"role": "tool", "content": "a", "tool_call_id": "x"}])
    assert refused.value.param == "messages"


def test_a_chat_stops_at_the_end_of_the_turn_that_its_template_writes(served: Served) -> None:
    template = CHAT.replace("{{ message.content }}", "{{ message.content }}{{ 'cd' if message.role == 'assistant' }}")
    planner = replace(served.planner, chat=ChatTemplate(template, {}))
    chat = {"model": "forest", "messages": [{"role": "user", "content": "ab"}], "stop": "b"}
    [job] = planner.chat_completion(ChatRequest.model_validate(chat))
    assert job.stop == ("b", "cd")
    [job] = planner.completion(CompletionRequest.model_validate({"model": "forest", "prompt": "ab", "stop": "b"}))
    assert job.stop == ("b",)


def test_the_posterior_of_a_text_is_returned_as_it_grows(served: Served, experts: dict[str, Path]) -> None:
    answer = served.post("/v1/posterior", {"input": "abcd", "trace": True}).json()
    assert answer["tokens"] == 4
    assert sum(answer["posterior"].values()) == pytest.approx(1)
    assert answer["trace"][0] == pytest.approx({"expert0": 0.8, "expert1": 0.2})
    assert answer["trace"][-1] == pytest.approx(answer["posterior"])
    log_probs = Oracle(experts).log_probs([0, 1, 2, 3, 4])
    joint = PRIOR + log_probs[:, np.arange(4), [1, 2, 3, 4]].sum(1)
    expected = np.exp(joint) / np.exp(joint).sum()
    assert list(answer["posterior"].values()) == pytest.approx(expected, rel=1e-4)


def test_a_text_ends_when_the_context_is_full_and_a_longer_prompt_is_an_error(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="a" * (POSITIONS - 1), max_tokens=50, **GREEDY)
    assert answer.choices[0].finish_reason in ("length", "stop")
    with pytest.raises(
        openai.BadRequestError, match=f"is {POSITIONS} tokens, but the prompt has {POSITIONS + 1}"
    ) as long:
        client.completions.create(prompt="a" * POSITIONS, **GREEDY)
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"presence_penalty": 0.5}, "unsupported_parameter", "presence_penalty"),
        ({"suffix": "end"}, "unsupported_parameter", "suffix"),
        ({"best_of": 4}, "unsupported_parameter", "best_of"),
        ({"extra_body": {"min_p": 0.1}}, "unsupported_parameter", "min_p"),
        ({"extra_body": {"temprature": 0.1}}, "unknown_parameter", "temprature"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"top_p": 1.5}, "invalid_value", "top_p"),
        ({"n": 17}, "too_many_choices", "n"),
        ({"logprobs": 21}, "invalid_value", "logprobs"),
        ({"prompt": [9]}, None, "prompt"),
        ({"prompt": []}, None, "prompt"),
        ({"prompt": {"text": "a"}}, "invalid_value", "prompt"),
        ({"max_tokens": "8"}, "invalid_value", "max_tokens"),
        ({"stop": ""}, "invalid_value", "stop"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_parameter(
    client: openai.OpenAI, change: dict[str, Any], code: str | None, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": "forest", "prompt": "ab", **change})
    assert (refused.value.code, refused.value.param, refused.value.type) == (code, param, "invalid_request_error")


def test_parameters_that_change_nothing_are_ignored(client: openai.OpenAI) -> None:
    harmless = {"user": "me", "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "suffix": None}
    answer = client.completions.create(prompt="ab", max_tokens=5, **GREEDY, **harmless)  # type: ignore[call-overload]
    assert answer.choices[0].text == client.completions.create(prompt="ab", max_tokens=5, **GREEDY).choices[0].text


def test_unknown_models_and_urls_are_reported(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="a")
    assert unknown.value.code == "model_not_found"
    assert served.post("/v1/embeddings", {}).json()["error"]["message"] == "Unknown URL: POST /v1/embeddings"
    assert served.post("/v1/models", {}).status_code == 405
