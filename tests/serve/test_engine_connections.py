"""How engines are reached: proxies, redirects, and connections on which nothing happens."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from helpers.raw_engine import OK, Listener

from btm_scale.errors import ConfigError
from btm_scale.serve import engine_client
from btm_scale.serve.engine_answers import read_events
from btm_scale.serve.engine_client import FAILURES, EngineClient, EngineDown, open_session
from btm_scale.serve.engines_file import RemoteExpert, load_engines
from btm_scale.serve.hosts import proxy_of
from btm_scale.serve.work import Refused

PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")
HANGS = 60.0  # seconds after which a test fails


@pytest.fixture(autouse=True)
def _without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener(OK) as one:
        yield one


def ask(url: str, body: dict[str, Any], *, seconds: float = 30.0, **place: Any) -> bytes:
    async def asked() -> bytes:
        async with asyncio.timeout(HANGS), open_session(seconds) as session:
            return await EngineClient("law", RemoteExpert(url=url, **place), session).ask(body)

    return asyncio.run(asked())


def test_an_engine_elsewhere_is_asked_through_the_proxy_of_the_environment(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{listener.address}")
    assert ask("http://engine.example:8001/v1", {}) == b"{}"
    assert listener.heads[0].startswith(b"POST http://engine.example:8001/v1/completions HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://engine.example/v1", "http://proxy:3128"),
        ("https://engine.example/v1", "http://other:8080"),
        ("http://gpu1.lab.example:8001/v1", None),
        ("http://user:password@gpu1.lab.example/v1", None),
        ("http://localhost:8001/v1", None),
        ("http://127.0.0.5:8001/v1", None),
        ("https://[::1]:8001/v1", None),
    ],
)
def test_the_proxy_is_that_of_the_scheme_and_of_no_host_in_no_proxy(
    url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "HTTP_PROXY": "proxy:3128",
        "ALL_PROXY": "http://other:8080",
        "NO_PROXY": ".lab.example",
    }.items():
        monkeypatch.setenv(name, value)
    assert proxy_of(url) == proxy


def test_a_proxy_that_is_not_http_is_refused_at_the_start(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy:1080")
    file = tmp_path / "engines.yaml"
    file.write_text("law: http://gpu1:8001/v1\n")
    with pytest.raises(ConfigError, match=r"a socks5 proxy for gpu1, .* Add gpu1 to NO_PROXY"):
        load_engines(file, ["law"])
    monkeypatch.setenv("NO_PROXY", "gpu1")
    assert load_engines(file, ["law"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("law: http://gpu1:99999/v1", "Port out of range"),
        ("law: http://:8001/v1", "A URL needs a host"),
        ("law: http://gpu1:0/v1", "its port is not 0"),
        ("law: {url: 'http://me:canary@gpu1/v1', api_key_variable: HOME}", "Set api_key_variable, or a user"),
    ],
)
def test_a_url_that_cannot_be_asked_is_refused_at_the_start(text: str, reason: str, tmp_path: Any) -> None:
    (tmp_path / "engines.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason) as raised:
        load_engines(tmp_path / "engines.yaml", ["law"])
    assert "canary" not in str(raised.value)
    assert "Value error" not in str(raised.value)


@pytest.mark.parametrize("key", ["canary\nX-Other: 1", "canary\N{EURO SIGN}", " \n"])
def test_a_key_that_no_header_may_have_is_refused_at_the_start(
    key: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAW_KEY", key)
    (tmp_path / "engines.yaml").write_text("law: {url: http://gpu1/v1, api_key_variable: LAW_KEY}")
    with pytest.raises(ConfigError, match=r"LAW_KEY (has characters|is not set)") as raised:
        load_engines(tmp_path / "engines.yaml", ["law"])
    assert "canary" not in str(raised.value)


def test_a_user_and_password_in_the_url_or_a_key_are_sent(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(f"http://me:secret@{listener.address}/v1", {})
    assert b"Authorization: Basic bWU6c2VjcmV0" in listener.heads[0]
    monkeypatch.setenv("LAW_KEY", "abc\n")  # as `$(cat key)` would not, but a file of secrets may
    listener.answers.append(OK)
    ask(f"http://{listener.address}/v1", {}, api_key_variable="LAW_KEY")
    assert b"Authorization: Bearer abc" in listener.heads[1]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_an_engine_that_redirects_is_down_and_its_target_gets_no_prompt(listener: Listener, status: int) -> None:
    with Listener(OK) as other:
        head = f"HTTP/1.1 {status} Moved\r\nLocation: http://{other.address}/v1/completions\r\n"
        listener.answers[:] = [f"{head}Content-Length: 0\r\n\r\n".encode()]
        with pytest.raises(EngineDown, match=f"status {status}"):
            ask(f"http://{listener.address}/v1", {"prompt": [1, 2]})
        assert other.heads == []


def test_no_cookie_of_an_engine_is_kept(listener: Listener) -> None:
    listener.answers[:] = [OK.replace(b"\r\n\r\n", b"\r\nSet-Cookie: a=b; Path=/\r\n\r\n"), OK]
    url = f"http://localhost:{listener.address.partition(':')[2]}/v1"  # aiohttp keeps no cookies of an IP address

    async def asked_twice() -> None:
        async with open_session(30.0) as session:
            client = EngineClient("law", RemoteExpert(url=url), session)
            await client.ask({})
            await client.ask({})

    asyncio.run(asked_twice())
    assert len(listener.heads) == 2
    assert b"cookie" not in listener.heads[1].lower()


@pytest.mark.parametrize("status", [407, 503])
def test_the_password_of_a_proxy_is_not_logged(
    status: int, listener: Listener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@{listener.address}")
    listener.answers[:] = [f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode()] * 2
    with pytest.raises(EngineDown) as raised:
        ask("https://me:canary@engine.example/v1", {})
    assert f"engine.example/v1/completions: ClientHttpProxyError: status {status}, No" in caplog.text
    assert not any(word in caplog.text + str(raised.value) for word in ("secret", "canary", "bWU6"))


def test_the_password_of_an_invalid_proxy_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy:none")
    with pytest.raises(EngineDown):
        ask("https://engine.example/v1", {})
    assert "engine.example/v1/completions: InvalidURL" in caplog.text
    assert "secret" not in caplog.text


BAD_CHUNK = (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: {}\n\r\n", b"zz\r\n")


def test_an_answer_with_an_invalid_chunk_is_a_failure_even_if_it_comes_later(listener: Listener) -> None:
    listener.answers[:] = [BAD_CHUNK] * 2
    with pytest.raises(EngineDown, match=r"time-out|the connection failed"):
        ask(f"http://{listener.address}/v1", {}, seconds=0.5)


def test_a_reason_with_an_invalid_chunk_is_not_waited_for(listener: Listener) -> None:
    listener.answers[:] = [(BAD_CHUNK[0].replace(b"200 OK", b"400 Bad"), BAD_CHUNK[1])]
    with pytest.raises(Refused, match=r"with status 400\.$"):
        ask(f"http://{listener.address}/v1", {}, seconds=0.5)


@pytest.mark.parametrize("pause", [0.0, 0.3], ids=["while-it-is-read", "between-two-reads"])
def test_a_stream_with_an_invalid_chunk_is_a_failure(pause: float, listener: Listener) -> None:
    listener.answers[:] = [BAD_CHUNK]

    async def read(response: aiohttp.ClientResponse) -> None:
        async for events in read_events(response, 0.5):
            assert events == [{}]
            await asyncio.sleep(pause)

    async def fail() -> None:
        async with asyncio.timeout(HANGS), open_session(0.5) as session:
            client = EngineClient("law", RemoteExpert(url=f"http://{listener.address}/v1"), session)
            response = await client.open({})
            with pytest.raises(FAILURES):
                await read(response)

    asyncio.run(fail())


def test_an_engine_that_does_not_read_a_prompt_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "_CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:  # the kernel accepts connections
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        begin = time.monotonic()
        with pytest.raises(EngineDown, match="time-out"):
            ask(url, {"prompt": "x" * (16 << 20)}, seconds=0.3)
        assert time.monotonic() - begin < 30


def test_messages_to_clients_do_not_name_the_address_of_an_engine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(EngineDown) as raised:
        ask(f"http://127.0.0.1:{port}/v1", {})
    assert str(raised.value) == "The engine of 'law' does not answer: cannot connect."
