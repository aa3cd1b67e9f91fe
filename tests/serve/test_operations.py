"""Keys, limits, hang-ups, and the end of the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.served_forest import Served, planner_of, running
from helpers.server_process import server_process
from helpers.tiny_forest import POSITIONS

from btm_scale.errors import LaunchError, UserError
from btm_scale.serve.connection import Connection
from btm_scale.serve.gate import MAX_BODY, is_loopback
from btm_scale.serve.server import bind, make_server, url_of

ASK = {"model": "forest", "prompt": "ab", "max_tokens": 8}


def error_of(response: httpx2.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def send_raw(url: str, data: bytes, *, wait: float = 0.0) -> None:
    """Send bytes and leave."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(data)
        time.sleep(wait)


def request_bytes(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"model": "forest", "model": "seed", "prompt": "a"}', "appears twice"),
        (b'{"model": "forest", "prompt": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 5000, "not valid JSON|nested too deeply"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_bad_json_is_refused(served: Served, body: bytes, reason: str) -> None:
    response = httpx2.post(f"{served.url}/v1/completions", content=body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "invalid_json"
    assert any(part in error["message"] for part in reason.split("|"))


def test_a_large_body_is_refused_with_and_without_its_length(served: Served) -> None:
    content = json.dumps({**ASK, "prompt": "a" * MAX_BODY}).encode()
    for sent in (content, iter([content[:MAX_BODY], content[MAX_BODY:]])):
        response = httpx2.post(f"{served.url}/v1/completions", content=sent)
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"


def test_a_full_queue_answers_429_with_retry_after(experts: dict[str, Path]) -> None:
    planner, backend = planner_of(experts, max_rows=2, max_waiting=2)
    with running(planner, backend) as server, ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: server.post("/v1/completions", {**ASK, "n": 2}), range(24)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers} == {200, 429}
        assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
        assert error_of(refused[0])["code"] == "server_overloaded"
        assert server.idle()


def test_clients_that_leave_free_their_slots(experts: dict[str, Path]) -> None:
    planner, backend = planner_of(experts, max_rows=4, max_waiting=40)
    slow = threading.Event()
    step = backend._engine._step

    def slowly(names: tuple[str, ...]) -> None:
        slow.wait(0.05)
        step(names)

    backend._engine._step = slowly
    with running(planner, backend) as server:
        for stream in (False, True):
            body = {**ASK, "prompt": "abcd", "model": "forest:mixture", "max_tokens": 18, "n": 4, "stream": stream}
            for _ in range(3):
                send_raw(server.url, request_bytes(body), wait=0.2)
        server.await_hang_ups(6)
        slow.set()
        assert server.idle()
        assert server.post("/v1/completions", ASK).status_code == 200


def test_what_runs_is_completed_when_the_server_ends(experts: dict[str, Path]) -> None:
    planner, backend = planner_of(experts)
    step = backend._engine._step

    def slowly(names: tuple[str, ...]) -> None:
        time.sleep(0.03)
        step(names)

    backend._engine._step = slowly
    listener = bind("127.0.0.1", 0)
    url = url_of(listener)
    server, _ = make_server(planner, backend)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    while httpx2.get(f"{url}/health").status_code != 200:
        time.sleep(0.01)
    body = {**ASK, "prompt": "a", "n": 8, "max_tokens": 20, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.should_exit = True
        assert [line for line in lines if line][-1] == "data: [DONE]"
    thread.join(30)
    assert not thread.is_alive()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")


def test_health_is_503_while_models_are_loaded_and_a_damaged_one_ends_the_server(experts: dict[str, Path]) -> None:
    planner, backend = planner_of(experts)
    seen: list[int] = []
    listener = bind("127.0.0.1", 0)
    url = url_of(listener)
    server, failures = make_server(planner, backend)

    def preload(names: list[str]) -> None:
        seen.append(httpx2.get(f"{url}/health").status_code)
        seen.append(httpx2.post(f"{url}/v1/completions", json=ASK).status_code)
        raise UserError("The weights are damaged.")

    backend._engine.preload = preload
    asyncio.run(server.serve(sockets=[listener]))
    assert seen == [503, 503]
    assert [str(error) for error in failures] == ["The weights are damaged."]


def test_a_signal_ends_the_server_while_models_are_loaded(experts: dict[str, Path]) -> None:
    planner, backend = planner_of(experts)
    loading, release = threading.Event(), threading.Event()

    def preload(names: list[str]) -> None:
        loading.set()
        release.wait(60)

    backend._engine.preload = preload
    server, failures = make_server(planner, backend)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bind("127.0.0.1", 0)])))
    thread.start()
    try:
        assert loading.wait(30)
        server.should_exit = True  # as uvicorn does on SIGINT and SIGTERM
        thread.join(30)
        assert not thread.is_alive()
        assert failures == []
    finally:
        release.set()
        backend._engine.stop()
        thread.join()


def test_prompts_are_logged_only_on_request(experts: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    for log_requests in (False, True):
        caplog.clear()
        with (
            caplog.at_level(logging.INFO, "btm_scale"),
            running(*planner_of(experts), log_requests=log_requests) as one,
        ):
            one.post("/v1/completions", {**ASK, "prompt": "abcdabcd"})
        assert "completion_tokens=" in caplog.text
        assert ("abcdabcd" in caplog.text) == log_requests


def test_metrics_count_requests_tokens_and_texts(experts: dict[str, Path]) -> None:
    with running(*planner_of(experts)) as server:
        for _ in range(3):
            server.post("/v1/completions", {**ASK, "temperature": 0, "model": "expert1"})
        server.post("/v1/completions", {"model": "none"})
        lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
    assert 'btm_scale_requests_total{route="/v1/completions",status="200"} 3.0' in lines
    assert 'btm_scale_requests_total{route="/v1/completions",status="400"} 1.0' in lines
    assert 'btm_scale_texts_total{expert="expert1"} 3.0' in lines
    assert "btm_scale_prompt_tokens_total 6.0" in lines
    assert 'btm_scale_load{state="running"} 0.0' in lines
    own = [line for line in lines if not line.startswith(("#", "btm_scale_"))]
    assert own == []


def test_metrics_count_no_expert_for_a_text_without_a_token(experts: dict[str, Path]) -> None:
    planner, backend = planner_of(experts)
    begun, gate = threading.Event(), threading.Event()

    def held(names: tuple[str, ...], step: Any = backend._engine._step) -> None:
        begun.set()
        gate.wait(10)
        step(names)

    backend._engine._step = held
    with running(planner, backend) as server:
        body = {**ASK, "echo": True, "stream": True, "logprobs": 0, "n": 4}
        with ThreadPoolExecutor(1) as pool:
            left = pool.submit(send_raw, server.url, request_bytes(body), wait=0.3)
            assert begun.wait(20)
            left.result()
        server.await_hang_ups(1)
        gate.set()
        assert server.idle()
        lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
    assert [line for line in lines if line.startswith("btm_scale_texts_total{")] == []


def test_an_address_that_is_taken_is_reported() -> None:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with pytest.raises(LaunchError, match=rf"Cannot listen on 127\.0\.0\.1:{port}: .*in use"):
        bind("127.0.0.1", port)
    listener.close()
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0")] == [True, True, True, False]


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "no such host"])
def test_an_invalid_host_is_reported(host: str) -> None:
    with pytest.raises(LaunchError, match=rf"Cannot listen on {host}: .*\. Correct --host"):
        bind(host, 0)


def test_small_answers_are_not_held_back_until_the_client_acknowledges_earlier_ones(experts: dict[str, Path]) -> None:
    sockets: list[socket.socket] = []
    made = Connection.connection_made

    def connection_made(self: Connection, transport: asyncio.Transport) -> None:
        sockets.append(transport.get_extra_info("socket"))
        made(self, transport)

    with pytest.MonkeyPatch.context() as patch, running(*planner_of(experts)) as server:
        patch.setattr(Connection, "connection_made", connection_made)
        with httpx2.Client() as client:
            client.get(f"{server.url}/health")
            assert sockets[-1].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_page_names_the_models_and_allows_no_foreign_script(served: Served) -> None:
    response = httpx2.get(served.url)
    assert "<option>forest:mixture</option>" in response.text
    policy = response.headers["Content-Security-Policy"]
    nonce = policy.partition("'nonce-")[2].partition("'")[0]
    assert response.text.count(f'<script nonce="{nonce}"') == 2
    assert "default-src 'none'" in policy


def test_a_storm_of_requests_leaves_no_trace(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with storm(served.url) as send:
        send(range(150))
    assert served.idle()
    assert "Traceback" not in caplog.text
    assert served.post("/v1/completions", ASK).status_code == 200


@pytest.mark.full
def test_a_storm_of_2000_requests_leaves_the_servers_memory_as_it_was(tmp_path: Path) -> None:
    with server_process(tmp_path) as server, storm(server.url) as send:
        send(range(200))
        assert server.idle()
        before = server.memory()
        send(range(200, 2_000))
        assert server.idle()
        assert server.memory() - before < 10e6
        assert httpx2.post(f"{server.url}/v1/completions", json=ASK, timeout=60).status_code == 200
    assert "Traceback" not in server.log.read_text()


@contextlib.contextmanager
def storm(server: str) -> Iterator[Callable[[Iterable[int]], None]]:
    """Yield a function that sends requests of every kind, eight at once, one for each of its numbers."""

    def one(number: int) -> None:
        dice = random.Random(number)
        body = {**ASK, "n": dice.choice([1, 2]), "stream": dice.random() < 0.5, "max_tokens": dice.randint(0, 20)}
        match dice.randrange(6):
            case 0:
                send_raw(server, request_bytes({**body, "max_tokens": 20}), wait=dice.random() / 20)
            case 1:
                send_raw(server, request_bytes(body)[: dice.randrange(10, 120)])
            case 2:
                client.post(url, content=b'{"model": ' + b"[" * dice.randrange(2000))
            case 3:
                client.post(url, json={**body, "prompt": "a" * dice.choice([POSITIONS, 5_000_000])})
            case 4:
                with client.stream("POST", url, json={**body, "stream": True}) as response:
                    for _ in response.iter_raw(16):
                        time.sleep(dice.random() / 200)
                        if dice.random() < 0.05:
                            break
            case _:
                assert client.post(url, json=body).status_code in (200, 429)

    def send(numbers: Iterable[int]) -> None:
        list(pool.map(one, numbers))

    url = f"{server}/v1/completions"
    # One client: a new one for each request would load certificates each time.
    with httpx2.Client(timeout=60) as client, ThreadPoolExecutor(8) as pool:
        yield send
