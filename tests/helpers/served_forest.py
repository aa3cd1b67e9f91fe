"""Servers of tiny forests on free ports of the loopback interface, each in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from openai import OpenAI

from btm_scale.serve.catalog import Catalog
from btm_scale.serve.chat import ChatTemplate
from btm_scale.serve.engine import Engine
from btm_scale.serve.local import LocalBackend
from btm_scale.serve.planner import Planner
from btm_scale.serve.server import bind, make_server, url_of
from helpers.tiny_forest import Letters

PRIOR = np.log([0.8, 0.2])
CHAT = "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
CHAT += "{{ message.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"


@dataclass
class Served:
    """A running server."""

    url: str
    planner: Planner
    backend: Any

    def client(self, **settings: Any) -> OpenAI:
        """The official client, without retries."""
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **settings})

    def post(self, path: str, body: Any, **settings: Any) -> httpx2.Response:
        """POST JSON as it is."""
        return httpx2.post(f"{self.url}{path}", json=body, timeout=60, **settings)

    def await_hang_ups(self, count: int) -> None:
        """Return once the server has noticed that this many clients left."""
        end = time.monotonic() + 20
        while f"btm_scale_hang_ups_total {count}.0" not in httpx2.get(f"{self.url}/metrics").text:
            assert time.monotonic() < end, "the server waits for a client that left"
            time.sleep(0.01)

    def idle(self) -> bool:
        """Whether every slot becomes free in time."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if self.backend.load() == {"running": 0, "waiting": 0}:
                return True
            time.sleep(0.01)
        return False


def planner_of(models: Mapping[str, Path], *, log_prior: np.ndarray = PRIOR, **settings: Any) -> tuple[Planner, Any]:
    """What answers the requests of a forest of `models`; `settings` are of the engine."""
    engine = Engine(models, Letters(), lambda texts: log_prior, **settings)
    backend = LocalBackend(engine, preload=list(models))
    experts = tuple(name for name in models if name.startswith("expert"))
    others = tuple(name for name in models if name not in experts)
    return Planner(Catalog(experts, others), backend, Letters(), ChatTemplate(CHAT, {})), backend


@contextlib.contextmanager
def running(planner: Planner, backend: Any, **settings: Any) -> Iterator[Served]:
    """Run a server for a while; `settings` are of the app."""
    listener = bind("127.0.0.1", 0)
    server, failures = make_server(planner, backend, **settings)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    url = url_of(listener)
    thread.start()
    try:
        while httpx2.get(f"{url}/health", timeout=60).status_code != 200:
            time.sleep(0.01)
        yield Served(url, planner, backend)
    finally:
        server.should_exit = True
        thread.join()
        assert failures == []
