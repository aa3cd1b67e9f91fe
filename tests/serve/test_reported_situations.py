"""What users of other OpenAI-compatible servers, and of the proxies before and behind them, run into."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from helpers.raw_engine import raw_engine, served_by
from helpers.served_forest import Served, planner_of, running
from helpers.tiny_forest import POSITIONS, Letters

from btm_scale.serve.engines_file import RemoteExpert
from btm_scale.serve.gate import MAX_BODY
from btm_scale.serve.keys import Keys
from btm_scale.serve.remote import RemoteBackend
from btm_scale.serve.server import make_server
from btm_scale.serve.work import Job

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "expert0", "prompt": "ab", "max_tokens": 3, "temperature": 0}


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def head_of(body: bytes, *more: str) -> bytes:
    lines = [f"POST {COMPLETIONS} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *more]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


# Clients


def test_a_base_url_that_ends_with_a_slash_is_accepted_and_passes_no_key(experts: dict[str, Path]) -> None:
    with running(*planner_of(experts), keys=Keys(["key"])) as server, httpx2.Client() as http:
        paths = ("/v1//models", "//v1/models", "/v1/models/", "/v1/models//forest/")
        for path in paths:
            assert http.get(server.url + path, headers={"Authorization": "Bearer key"}).status_code == 200, path
            assert http.get(server.url + path).status_code == 401, path
        for base in ("/v1/", "//v1//"):
            client = openai.OpenAI(base_url=server.url + base, api_key="key", max_retries=0)
            assert client.completions.create(**ASK).choices


def test_a_front_end_that_sends_every_sampler_it_knows_is_answered_if_they_are_off(served: Served) -> None:
    off = {
        **{"min_p": 0, "typical_p": 1.0, "tfs": 1.0, "top_a": 0, "mirostat_mode": 0, "repetition_penalty": 1.0},
        **{"xtc_probability": 0, "dry_multiplier": 0.0, "smoothing_factor": 0, "dynamic_temperature": False},
        **{"skip_special_tokens": True, "ignore_eos": False, "early_stopping": False, "stop_token_ids": []},
        **{"include_stop_str_in_output": False, "cache_prompt": True, "grammar": "", "top_k": -1, "seed": None},
    }
    plain = served.post(COMPLETIONS, ASK).json()["choices"]
    assert served.post(COMPLETIONS, {**ASK, **off}).json()["choices"] == plain
    for on in ({"xtc_probability": 0.5}, {"stop_token_ids": [1]}, {"skip_special_tokens": False}):
        assert served.post(COMPLETIONS, {**ASK, **on}).json()["error"]["param"] == next(iter(on))


def test_an_editor_that_stops_at_many_strings_is_answered(served: Served) -> None:
    stop = [
        f"\n{word}{end}" for word in ("class", "def", "import", "return", "if", "for") for end in (" ", ":", "(", "\n")
    ]
    assert served.post(COMPLETIONS, {**ASK, "stop": stop}).status_code == 200


def test_an_earlier_answer_is_sent_back_with_all_its_fields(served: Served) -> None:
    client = served.client()
    history: list[Any] = [{"role": "user", "content": "ab"}]
    settings: dict[str, Any] = {"model": "expert0", "max_tokens": 2, "temperature": 0}
    history.append(client.chat.completions.create(messages=history, **settings).choices[0].message.model_dump())
    assert {"refusal", "tool_calls"} <= set(history[1])
    history.append({"role": "user", "content": "c"})
    assert client.chat.completions.create(messages=history, **settings).choices
    history[1]["tool_calls"] = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    with pytest.raises(openai.BadRequestError, match="'tool_calls' is not supported"):
        client.chat.completions.create(messages=history, **settings)


def test_a_body_that_begins_with_a_byte_order_mark_is_read(served: Served) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(ASK).encode()
    assert httpx2.post(served.url + COMPLETIONS, content=body).status_code == 200


def test_curl_waits_for_100_continue_before_a_large_body(served: Served) -> None:
    body = json.dumps(ASK).encode()
    with connected(served.url) as client:
        client.sendall(head_of(body, "Expect: 100-continue"))
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        client.sendall(body)
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_wrong_key_with_a_large_body_is_answered_on_a_connection_that_stays(experts: dict[str, Path]) -> None:
    with running(*planner_of(experts), keys=Keys(["key"])) as server, connected(server.url) as client:
        for key, status in (("wrong", b"401"), ("wrong", b"401"), ("key", b"200")):
            body = json.dumps({**ASK, "user": "x" * (0 if key == "key" else MAX_BODY - 1000)}).encode()
            client.sendall(head_of(body, f"Authorization: Bearer {key}") + body)
            answer = client.recv(1 << 16)
            while b"}" not in answer:
                answer += client.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_sends_nothing_more_still_gets_all_its_answers(
    experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    planner, backend = planner_of(experts)

    def slowly(names: tuple[str, ...], step: Any = backend._engine._step) -> None:
        time.sleep(0.05)
        step(names)

    monkeypatch.setattr(backend._engine, "_step", slowly)
    body = json.dumps({**ASK, "stream": stream}).encode()
    with running(planner, backend) as server, connected(server.url) as client:
        client.sendall((head_of(body) + body) * 2)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := client.recv(1 << 16):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 100 ")  # which every client skips
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert answer.count(b"data: [DONE]" if stream else b'"finish_reason"') == 2


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_leaves_while_it_waits_is_noticed(
    experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    planner, backend = planner_of(experts)
    gate = threading.Event()

    def held(names: tuple[str, ...], step: Any = backend._engine._step) -> None:
        gate.wait(20)
        step(names)

    monkeypatch.setattr(backend._engine, "_step", held)
    body = json.dumps(ASK).encode()
    with running(planner, backend) as server:
        with connected(server.url) as client:
            client.sendall(head_of(body).replace(b"HTTP/1.1", f"HTTP/{version}".encode()) + body)
            time.sleep(0.1)
        server.await_hang_ups(1)
        gate.set()
        assert server.idle()


# Proxies and load balancers in front


def test_nginx_does_not_hold_a_stream_back(served: Served) -> None:
    answer = served.post(COMPLETIONS, {**ASK, "stream": True})
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["Cache-Control"] == "no-cache"


def test_a_load_balancer_asks_with_head(served: Served) -> None:
    answer = httpx2.head(f"{served.url}/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_connection_that_a_proxy_keeps_for_90_seconds_is_not_closed_by_the_server(
    experts: dict[str, Path],
) -> None:
    server, _ = make_server(*planner_of(experts))
    assert server.config.timeout_keep_alive > 90


# Engines behind, and what is between


SCORES = b'{"choices": [{"prompt_logprobs": [null, {"1": {"logprob": -1.0}}, {"2": {"logprob": -2.0}}]}]}'


def event(text: str, reason: str = "null", before: str = "data: ", end: str = "\n\n") -> bytes:
    return f'{before}{{"choices": [{{"text": "{text}", "finish_reason": {reason}}}], "usage": null}}{end}'.encode()


@pytest.mark.parametrize(
    "stream",
    [
        event("a", before="data:") + event("b", '"length"', before="data:"),
        event("a", end="\r\n\r\n") + event("b", '"length"', end="\r\n\r\n") + b"data: [DONE]\r\n\r\n",
        b": ping\n\nevent: message\nid: 1\n" + event("a") + b": ping\n\nretry: 10\n" + event("b", '"length"'),
        event("a", '""') + event("b", '"length"') + b'data: {"choices": [], "error": null}\n\ndata: [DONE]',
        event("a") + event("b", '"eos_token"') + event("") + b"data: [DONE]\n\n",
    ],
    ids=["no space", "CRLF", "comments and other fields", "empty reasons", "a reason before the last event"],
)
def test_streams_of_events_in_every_style_are_read(stream: bytes) -> None:
    with raw_engine(SCORES, stream) as url, served_by(url) as server:
        answer = server.post(COMPLETIONS, ASK).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "ab"
    assert answer["usage"]["completion_tokens"] == 2  # although the engine counts none
    assert choice["finish_reason"] == ("stop" if b"eos_token" in stream else "length")


def test_a_stream_that_a_proxy_cuts_into_pieces_inside_of_characters_is_put_together() -> None:
    stream = event("ü") + event("😀 日本", '"stop"') + b"data: [DONE]\n\n"
    pieces = [stream[place : place + 3] for place in range(0, len(stream), 3)]
    with raw_engine(SCORES, pieces) as url, served_by(url) as server:
        assert server.post(COMPLETIONS, ASK).json()["choices"][0]["text"] == "ü😀 日本"


@pytest.mark.parametrize("last", ['""', '"abort"'])
def test_a_stream_that_ends_without_a_reason_or_is_aborted_is_not_complete(last: str) -> None:
    with raw_engine(SCORES, event("a") + event("", last) + b"data: [DONE]\n\n") as url, served_by(url) as server:
        answer = server.post(COMPLETIONS, ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_unavailable")


def test_an_engine_on_this_machine_is_reached_although_the_environment_names_a_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def routed(*urls: str) -> Any:
        places = {f"expert{number}": RemoteExpert(url=url) for number, url in enumerate(urls)}
        backend = RemoteBackend(places, Letters().decode, np.log([0.5, 0.5]), context=POSITIONS)
        await backend.start()
        events = [one async for _, one in backend.stream([Job([0, 1, 2], tuple(places), copies=0)])]
        await backend.stop()
        return events[0]

    with raw_engine(SCORES, b"") as url:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", "example.org")
        assert asyncio.run(routed(url, url.replace("127.0.0.1", "localhost"))).left_out == ()


@pytest.fixture
def closing_engine() -> Iterator[tuple[str, list[int]]]:
    """An engine that closes a connection just when its second request arrives; its URL, and requests by connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen: list[int] = []

    def answer(client: socket.socket) -> None:
        number = len(seen)
        seen.append(0)
        with client:
            while True:
                head = b""
                while not (b"\r\n\r\n" in head and head.endswith(b"}")):
                    piece = client.recv(1 << 16)
                    if not piece:
                        return
                    head += piece
                seen[number] += 1
                if seen[number] > 1:
                    return
                body = SCORES if b'"stream"' not in head else event("a", '"stop"')
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", seen
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_a_request_on_an_idle_connection_that_the_engine_closes_is_sent_again(
    closing_engine: tuple[str, list[int]],
) -> None:
    url, seen = closing_engine
    with served_by(url) as server:
        for _ in range(3):
            assert server.post(COMPLETIONS, ASK).json()["choices"][0]["text"] == "a"
    assert max(seen) == 2  # connections were used again
