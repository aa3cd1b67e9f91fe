"""Every invalid value of every parameter is an error in the API's form, and nothing stays behind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.served_forest import Served

COMPLETIONS, CHAT, POSTERIOR = "/v1/completions", "/v1/chat/completions", "/v1/posterior"
VALID: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "forest", "prompt": "ab", "max_tokens": 2},
    CHAT: {"model": "forest", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 2},
    POSTERIOR: {"input": "ab"},
}
HUGE = 10**30
NOT_NUMBERS = ["1", [1], {}, True]
NEITHER: dict[str, list[Any]] = {
    "model": [1, ["forest"], "a" * 400, "a" * 5000],
    "n": [0, -1, HUGE, 10**4299, 1.5, *NOT_NUMBERS],
    "temperature": [-0.1, float("nan"), float("inf"), *NOT_NUMBERS],
    "top_p": [0, -1, 1.1, float("nan"), *NOT_NUMBERS],
    "top_k": [-2, 1.5, *NOT_NUMBERS],
    "stop": [1, [1], [""], ["a"] * 65, "a" * 1001, {}],
    "seed": [1 << 63, -(1 << 63) - 1, HUGE, 1.5, *NOT_NUMBERS],
    "stream": ["yes", 1, []],
    "stream_options": [1, {"include_usage": "yes"}],
}
BAD: dict[str, dict[str, list[Any]]] = {
    COMPLETIONS: {
        **NEITHER,
        "prompt": [1, [], [-1], [5], [HUGE], [1.5], [True], ["a", 1], [[1], "a"], [["a"]], [None], ["a"] * 17, {}],
        "max_tokens": [-1, 1.5, *NOT_NUMBERS],
        "logprobs": [-1, 21, HUGE, *NOT_NUMBERS],
        "echo": [1, "yes"],
    },
    CHAT: {
        **NEITHER,
        "messages": [
            *(1, "ab", [], ["ab"], [{}], [{"content": "a"}], [{"role": 1}], [{"role": "tool", "content": "a"}]),
            *([{"role": "user", "content": one}] for one in (1, ["a"], [{"type": "image_url"}], [{"type": "text"}])),
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}],
            [{"role": "user", "content": "a" * 30}],
        ],
        "max_tokens": [0, -1, *NOT_NUMBERS],
        "max_completion_tokens": [0, "1"],
        "logprobs": [1, "yes"],
        "top_logprobs": [-1, 21, 3, "1"],
    },
    POSTERIOR: {
        "input": [1, ["a"], [9], [-1], [HUGE], {}, None, "a" * 30],
        "messages": [[{"role": "user", "content": "a"}], []],
        "trace": [1, "yes"],
        "model": ["forest"],
    },
}


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=served.url, timeout=60) as one:
        yield one


def refusal(client: httpx2.Client, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    # json.dumps writes NaN, Infinity, and numbers of any length.
    response = client.post(path, content=json.dumps(body))
    error = response.json().get("error", {})
    assert set(error) == {"message", "type", "param", "code"}, (path, body, response.text)
    assert "Traceback" not in error["message"]
    assert len(error["message"]) < 1000, body
    return response.status_code, error


@pytest.mark.parametrize("path", BAD)
def test_every_bad_value_is_refused_and_its_parameter_is_named(
    served: Served, client: httpx2.Client, path: str
) -> None:
    for name, values in BAD[path].items():
        for value in values:
            status, error = refusal(client, path, {**VALID[path], name: value})
            assert status == (404 if name == "model" and path != POSTERIOR and len(str(value)) == 400 else 400), value
            assert error["type"] == "invalid_request_error"
            named = ("messages", "prompt", None) if name in ("messages", "input", "top_logprobs") else (name,)
            assert error["param"] in (name, *named), (name, value, error)
    assert served.idle()
    assert client.post(path, json=VALID[path]).status_code == 200


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (COMPLETIONS, {"stop": [""]}, "Invalid value for 'stop.0': String should have at least 1 character."),
        (COMPLETIONS, {"stop": ["a"] * 65}, "Invalid value for 'stop': List should have at most 64 items"),
        (COMPLETIONS, {"prompt": [[1], [2.5]]}, "Invalid value for 'prompt.1.0': Input should be a valid integer."),
        (COMPLETIONS, {"prompt": ["a", 1]}, "Invalid value for 'prompt.1': Input should be a valid string."),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages.0.content.0.text'"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs needs logprobs: true."),
        (
            COMPLETIONS,
            {"n": 10**4299, "prompt": ["a", "b"]},
            "Invalid value for 'n': Input should be less than or equal",
        ),
        (POSTERIOR, {"input": None}, "Send either 'input' or 'messages'."),
    ],
)
def test_the_message_is_about_the_wrong_part_of_the_value(
    client: httpx2.Client, path: str, change: dict[str, Any], message: str
) -> None:
    _, error = refusal(client, path, {**VALID[path], **change})
    assert message in error["message"]
    assert not error["message"].startswith("Value error")


@pytest.mark.parametrize("path", BAD)
def test_a_body_that_is_not_an_object_of_the_api_is_refused(client: httpx2.Client, path: str) -> None:
    for content in (b"", b"null", b"1", b'"a"', b"[]", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\0"):
        response = client.post(path, content=content)
        assert response.status_code == 400, content[:20]
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_unusual_values_that_are_allowed_are_answered(client: httpx2.Client) -> None:
    for change in (
        {"max_tokens": HUGE},
        {"top_k": HUGE, "model": "expert0"},
        {"temperature": 1e-300},
        {"temperature": 1e300},
        {"top_p": 1e-300},
        {"seed": -1},
        {"logprobs": 0},
        {"echo": True, "max_tokens": 0},
        {"stop": ["x", "y", "z", "ü", "\n"]},
        {"stop": []},
        {"n": 2, "stream": True, "logprobs": 1, "echo": True},
        {"prompt": [[]]},
        {"prompt": ["", "a"]},
        {"prompt": ""},
    ):
        response = client.post(COMPLETIONS, json={**VALID[COMPLETIONS], **change})
        assert response.status_code == 200, (change, response.text)


def test_other_methods_and_paths_are_refused_in_the_same_form(client: httpx2.Client) -> None:
    for method, path, status in (
        ("GET", COMPLETIONS, 405),
        ("DELETE", CHAT, 405),
        ("POST", "/health", 405),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/models/a/b", 404),
        ("GET", "/v1/%ff", 404),
        ("POST", "/", 405),
        ("GET", "/v1/models/" + "forest" * 5000, 404),
        ("GET", "/" + "a" * 30_000, 404),
    ):
        response = client.request(method, path)
        assert response.status_code == status, (method, path[:50])
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 1000, path[:50]


def test_the_docs_list_every_code_of_an_error() -> None:
    root = Path(__file__).parents[2]
    lines = [line for file in (root / "btm_scale" / "serve").glob("*.py") for line in file.read_text().splitlines()]
    codes = {
        code for line in lines if "code=" in line for code in re.findall(r'"([a-z_]+)"', line.partition("code=")[2])
    }
    assert {"internal", "invalid_value", "missing_required_parameter"} <= codes
    page = (root / "docs" / "serving.md").read_text()
    assert [code for code in sorted(codes) if f"`{code}`" not in page] == []
