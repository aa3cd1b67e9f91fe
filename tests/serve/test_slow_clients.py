"""Clients that send slowly, or do not read: they end in time and hold nothing."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.served_forest import Served, planner_of, running

from btm_scale.serve import gate
from btm_scale.serve.connection import Connection

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n"


@pytest.fixture(scope="module")
def impatient(experts: dict[str, Path]) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch, running(*planner_of(experts)) as server:
        patch.setattr(gate, "BODY_SECONDS", 0.4)
        patch.setattr(Connection, "seconds", 0.4)
        yield server


@contextlib.contextmanager
def connected(server: Served) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect((host, int(port)))
        yield client


def trickle(client: socket.socket, data: bytes) -> bytes:
    """Send data byte by byte until the server answers; return the answer, up to the end of the connection."""
    client.setblocking(False)
    answer = b""
    for byte in data:
        with contextlib.suppress(BlockingIOError):
            if (piece := client.recv(65536)) == b"":
                return answer
            answer += piece
        with contextlib.suppress(OSError):
            client.send(bytes([byte]))
        time.sleep(0.05)
    raise AssertionError(f"the server waits, after {answer!r}")


def test_a_body_that_comes_slowly_is_refused(impatient: Served) -> None:
    with connected(impatient) as client:
        client.sendall(HEAD)
        answer = trickle(client, b" " * 40)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer


def ask_for_health(client: socket.socket) -> None:
    """Send a request, and read its complete answer, which may come in pieces."""
    client.sendall(HEALTH)
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):
        piece = client.recv(65536)
        assert piece, answer
        answer += piece
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("before", [False, True], ids=["first request", "second request"])
def test_a_head_that_comes_slowly_ends_the_connection(impatient: Served, before: bool) -> None:
    with connected(impatient) as client:
        if before:
            ask_for_health(client)
        with contextlib.suppress(ConnectionResetError):
            assert trickle(client, HEAD) == b""


def test_a_client_that_does_not_read_its_answers_is_disconnected(impatient: Served) -> None:
    requests = 4000
    with connected(impatient) as client:
        client.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * requests)
        time.sleep(0.8)
        client.settimeout(10)
        answers = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(1 << 20):
                answers += piece
    assert 0 < answers.count(b"HTTP/1.1 200 ") < requests


def test_a_client_within_the_limits_is_answered(impatient: Served) -> None:
    with connected(impatient) as client:
        for _ in range(3):
            ask_for_health(client)
            time.sleep(0.3)  # together, longer than one request may take
    assert impatient.idle()
