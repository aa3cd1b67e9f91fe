"""Engines that answer with given bytes, whatever they are."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from btm_scale.serve.catalog import Catalog
from btm_scale.serve.engines_file import RemoteExpert
from btm_scale.serve.planner import Planner
from btm_scale.serve.remote import RemoteBackend
from btm_scale.serve.server import bind, url_of
from helpers.served_forest import Served, running
from helpers.tiny_forest import POSITIONS, Letters


@contextlib.contextmanager
def raw_engine(answer: bytes, stream: bytes | Sequence[bytes]) -> Iterator[str]:
    """Answer requests with `answer`, and those for a stream with `stream`, or its pieces; yields the URL."""

    async def completions(request: Request) -> Response:
        body = await request.json()
        if not body.get("stream"):
            return Response(answer, media_type="application/json")
        return StreamingResponse(_pieces([stream] if isinstance(stream, bytes) else stream))

    listener = bind("127.0.0.1", 0)
    app = Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield f"{url_of(listener)}/v1"
    finally:
        server.should_exit = True
        thread.join()


async def _pieces(stream: Sequence[bytes]) -> AsyncIterator[bytes]:
    for piece in stream:
        yield piece
        await asyncio.sleep(0)


@contextlib.contextmanager
def served_by(*urls: str, **settings: Any) -> Iterator[Served]:
    """A server whose experts are behind these engines."""
    places = {f"expert{number}": RemoteExpert(url=url) for number, url in enumerate(urls)}
    prior = np.log(np.full(len(urls), 1 / len(urls)))
    backend = RemoteBackend(places, Letters().decode, prior, context=POSITIONS, **settings)
    with running(Planner(Catalog(tuple(places)), backend, Letters(), None), backend) as server:
        yield server


_PAUSE = 0.1  # seconds between the pieces of an answer
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Listener:
    """Answers each request, on its own connection, with the next of `answers`; keeps the heads of requests.

    An answer in pieces is sent with pauses, and the connection stays open.
    """

    def __init__(self, *answers: bytes | Sequence[bytes]) -> None:
        self.answers, self.heads = list(answers), list[bytes]()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # some systems shut down no socket that only listens
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client:
                received = b""
                while not _is_complete(received) and (piece := client.recv(1 << 16)):
                    received += piece
                self.heads.append(received.partition(b"\r\n\r\n")[0])
                self._answer(client, self.answers.pop(0))

    def _answer(self, client: socket.socket, answer: bytes | Sequence[bytes]) -> None:
        if isinstance(answer, bytes):
            client.sendall(answer)
            return
        for piece in answer:
            client.sendall(piece)
            time.sleep(_PAUSE)
        with contextlib.suppress(OSError):  # the connection stays open until the client hangs up
            client.recv(1)


def _is_complete(request: bytes) -> bool:
    return request.endswith(b"\r\n\r\n" if request.startswith(b"CONNECT ") else b"}")
