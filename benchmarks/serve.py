"""Throughput, latency and routing cost of `btm-scale serve`, as ratios within one run.

    python benchmarks/serve.py RUN

Starts a server of the run's forest in a separate process, and writes benchmarks/results/serve.json:
16 clients at once over one after another; a lone request over `generate`; routing a prompt over reading it once per
expert; and a request through the remote backend over a direct one, on an engine that takes 50 ms per token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
import uvicorn
from environment import describe
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from btm_scale.forest.forest import experts
from btm_scale.forest.open import open_folder
from btm_scale.generate.generator import Generator
from btm_scale.serve.app import make_app
from btm_scale.serve.catalog import Catalog
from btm_scale.serve.engines_file import RemoteExpert
from btm_scale.serve.planner import Planner
from btm_scale.serve.remote import RemoteBackend
from btm_scale.serve.server import bind, url_of

RESULT = Path(__file__).parent / "results" / "serve.json"
CLIENTS, TOKENS, REPEATS = 16, 64, 2
PROMPTS = ("import os\n", "def main(args):\n    ", "Permission is hereby granted", "template <typename T>\n")


def main() -> None:
    """Measure, print and write."""
    run = Path(sys.argv[1])
    result: dict[str, Any] = {"environment": describe(), "clients": CLIENTS, "tokens": TOKENS}
    with served(run) as url:
        for name, measure in (
            ("throughput", lambda: throughput(url)),
            ("lone_request", lambda: lone(url, run)),
            ("routing", lambda: routing(url, run)),
        ):
            result[name] = measure()
            print(name, json.dumps(result[name], indent=1), flush=True)
    result["proxy"] = proxy(run)
    print("proxy", json.dumps(result["proxy"], indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


@contextlib.contextmanager
def served(run: Path) -> Iterator[str]:
    """Serve a run in another process."""
    with contextlib.closing(bind("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "btm_scale.cli", "serve", str(run), "--port", str(port), "--quiet"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _is_ready(url):
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.TransportError:
        return False


def ask(client: httpx2.Client, url: str, number: int, **changes: Any) -> int:
    """Return the number of tokens of an answer."""
    body = {"model": "forest", "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": TOKENS, **changes}
    answer = client.post(f"{url}/v1/completions", json=body, timeout=600)
    answer.raise_for_status()
    tokens: int = answer.json()["usage"]["completion_tokens"]
    return tokens


def rate(do: Callable[[], int]) -> float:
    """Tokens per second."""
    begin = time.perf_counter()
    return do() / (time.perf_counter() - begin)


def throughput(url: str) -> dict[str, Any]:
    """One after another, and all at once; alternating, and the median of each."""
    found: dict[str, list[float]] = {"one_after_another": [], "at_once": []}
    with httpx2.Client() as client, ThreadPoolExecutor(CLIENTS) as pool:
        ask(client, url, 0)
        for _ in range(REPEATS):
            found["one_after_another"].append(rate(lambda: sum(ask(client, url, n) for n in range(CLIENTS))))
            found["at_once"].append(rate(lambda: sum(pool.map(lambda n: ask(client, url, n), range(CLIENTS)))))
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    return {"tokens_per_second": medians, "speedup": medians["at_once"] / medians["one_after_another"]}


def lone(url: str, run: Path) -> dict[str, float]:
    """Tokens per second of one client, over those of `generate` with the same method in this process."""
    generator = Generator.of_run(*open_folder(run))

    def generate() -> int:
        done = [generator.generate([prompt], max_tokens=TOKENS, random_seed=n) for n, prompt in enumerate(PROMPTS * 2)]
        return sum(len(one[0].tokens) for one in done)

    generate()
    rates: dict[str, list[float]] = {"generate": [], "serve": []}
    with httpx2.Client() as client:
        for _ in range(REPEATS):
            rates["generate"].append(rate(generate))
            rates["serve"].append(rate(lambda: sum(ask(client, url, n) for n in range(len(PROMPTS) * 2))))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {**medians, "ratio": medians["serve"] / medians["generate"]}


def routing(url: str, run: Path) -> dict[str, float]:
    """Seconds of /v1/posterior for a prompt that fills the context, over reading it once per expert."""
    generator = Generator.of_run(*open_folder(run))
    random = np.random.default_rng(0)
    ids = random.integers(generator.tokenizer.vocab_size, size=generator.context - 1).tolist()
    decoders = [generator.shelf.take(name) for name in generator.names]

    def read() -> None:
        for decoder in decoders:
            decoder.read([[generator.tokenizer.eos, *ids]])

    with httpx2.Client() as client:

        def route() -> None:
            client.post(f"{url}/v1/posterior", json={"input": ids}, timeout=600).raise_for_status()

        seconds = {name: _median_seconds(do) for name, do in (("read", read), ("route", route))}
    return {**seconds, "ratio": seconds["route"] / seconds["read"]}


def _median_seconds(do: Callable[[], None]) -> float:
    do()
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        do()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def proxy(run: Path) -> dict[str, float]:
    """Milliseconds that the remote backend adds, on an engine of 50 ms per request and token."""
    config, run_dir = open_folder(run)
    generator = Generator.of_run(config, run_dir)
    names = list(experts(run_dir))
    torch.set_num_threads(1)

    async def completions(request: Request) -> Response:
        body = await request.json()
        await asyncio.sleep(0.05)
        if not body.get("stream"):
            rows = [None, *({str(token): {"logprob": -1.0}} for token in body["prompt"][1:])]
            choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": rows}
            return JSONResponse({"choices": [choice]})
        return StreamingResponse(_slow_text(body["max_tokens"]), media_type="text/event-stream")

    with _app(Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])) as engine:
        places = {name: RemoteExpert(url=f"{engine}/v1") for name in names}
        backend = RemoteBackend(
            places, generator.tokenizer.decode, lambda texts: np.zeros(len(names)), context=generator.context
        )
        planner = Planner(Catalog(tuple(names)), backend, generator.tokenizer, None)
        asyncio.run(backend.start())
        with _app(make_app(planner)) as router, httpx2.Client() as client:
            prompt = [generator.tokenizer.eos, *generator.tokenizer.encode(PROMPTS[0])]
            direct_body = {"prompt": prompt, "max_tokens": 20, "stream": True}

            def direct() -> None:
                client.post(f"{engine}/v1/completions", json=direct_body, timeout=60)

            def through() -> None:
                ask(client, router, 0, max_tokens=20, model=names[0])

            def route() -> None:
                client.post(f"{router}/v1/posterior", json={"input": PROMPTS[0]}, timeout=60)

            seconds = {"direct": _median_seconds(direct), "through": _median_seconds(through)}
            scoring = _median_seconds(route)
    added = (scoring - 0.05) * 1000
    return {**seconds, "ratio": seconds["through"] / seconds["direct"], "routing_adds_milliseconds": added}


async def _slow_text(tokens: int) -> Any:
    for number in range(tokens):
        await asyncio.sleep(0.05)
        reason = "length" if number == tokens - 1 else None
        yield f"data: {json.dumps({'choices': [{'index': 0, 'text': 'x', 'finish_reason': reason}]})}\n\n"
    yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}\n\ndata: [DONE]\n\n"


@contextlib.contextmanager
def _app(app: Starlette) -> Iterator[str]:
    """Run an application in a thread."""
    listener = bind("127.0.0.1", 0)
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
