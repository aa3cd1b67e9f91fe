"""How engines are reached: proxies, redirects, and connections on which nothing happens."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.raw_engine import OK, Listener

from btm_scale.errors import ConfigError
from btm_scale.serve import engine_client
from btm_scale.serve.engine_client import EngineClient, EngineDown, open_session
from btm_scale.serve.engines_file import RemoteExpert, load_engines
from btm_scale.serve.hosts import proxy_of

PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


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
        async with open_session(seconds) as session:
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
        ("law: {url: 'http://me:canary@gpu1/v1', api_key_variable: HOME}", "A request has one Authorization"),
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

    async def asked_twice() -> None:
        async with open_session(30.0) as session:
            client = EngineClient("law", RemoteExpert(url=f"http://{listener.address}/v1"), session)
            await client.ask({})
            await client.ask({})

    asyncio.run(asked_twice())
    assert len(listener.heads) == 2
    assert b"cookie" not in listener.heads[1].lower()


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
