"""Throughput, latency and routing cost of `btm-scale serve`, as ratios of pairs within one run.

    python benchmarks/serve.py RUN [--rounds 5] [--again PART]

The server of the run's forest is a separate process, as is the engine behind the proxy. The two sides of each ratio
take turns, so that other load meets both alike; a ratio is the median over the rounds. Each part is written to
benchmarks/results/serve.json when it is complete, and a repeated command measures the parts that are not there.
Takes about 3 minutes on two idle cores.

- throughput: 16 clients at once over one after another, 64 tokens each, in tokens per second.
- lone: one client over `generate` in another process, in tokens per second.
- routing: seconds of `/v1/posterior` over those of reading the prompt once per expert, 255 tokens.
- proxy: a request through the server over a direct one, on an engine that answers after 50 milliseconds; and what the
  server adds to the slowest request that scores the prompt and the one that generates, in milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from environment import describe

from btm_scale.forest.forest import experts
from btm_scale.forest.open import open_folder
from btm_scale.generate.generator import Generator
from btm_scale.launch.local import free_port
from btm_scale.util.cores import wait_passively

RESULT = Path(__file__).parent / "results" / "serve.json"
CLIENTS, TOKENS = 16, 64
PROMPTS = ("import os\n", "def main(args):\n    ", "Permission is hereby granted", "template <typename T>\n")
PROXY_REQUESTS = 20  # per round


def main() -> None:
    """Measure the parts that the result lacks, and print and write each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--again", choices=PARTS, action="append", default=[])
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        result = json.loads(options.result.read_text())
    for name, measure in PARTS.items():
        if name not in result or name in options.again:
            environment = describe()
            result[name] = measure(options.run, options.rounds)
            print(name, json.dumps(result[name]), flush=True)
            result |= {"environment": environment, "clients": CLIENTS, "tokens": TOKENS}
            options.result.write_text(json.dumps(result, indent=1) + "\n")


@contextlib.contextmanager
def process(*command: object, ready: str) -> Iterator[psutil.Process]:
    """Run a command until the block ends; enter the block once `ready` answers."""
    child = subprocess.Popen([sys.executable, *map(str, command)])
    try:
        while not _answers(ready):
            if child.poll() is not None:
                raise SystemExit(f"{command[0]} has ended; its message is above")
            time.sleep(0.1)
        yield psutil.Process(child.pid)
    finally:
        child.terminate()
        child.wait()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url).status_code != 503
    except httpx2.TransportError:
        return False


@contextlib.contextmanager
def served(run: Path, *options: object) -> Iterator[tuple[str, psutil.Process]]:
    """Serve a run; yields its URL and the server's process."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ("-m", "btm_scale.cli", "serve", run, "--port", port, "--quiet", *options)
    with process(*arguments, ready=f"{url}/health") as server:
        yield url, server


def ask(client: httpx2.Client, url: str, number: int, **changes: Any) -> int:
    """Return the number of tokens of an answer."""
    body = {"model": "forest", "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": TOKENS, **changes}
    answer = client.post(f"{url}/v1/completions", json=body, timeout=600)
    answer.raise_for_status()
    tokens: int = answer.json()["usage"]["completion_tokens"]
    return tokens


def throughput(run: Path, rounds: int) -> dict[str, Any]:
    """All clients at once over one after another."""
    rates: dict[str, list[float]] = {"one_after_another": [], "at_once": []}
    cpu_rates: dict[str, list[float]] = {name: [] for name in rates}
    with served(run) as (url, server), httpx2.Client() as client, ThreadPoolExecutor(CLIENTS) as pool:

        def one(number: int) -> int:
            return ask(client, url, number)

        ways = {"one_after_another": lambda: map(one, range(CLIENTS)), "at_once": lambda: pool.map(one, range(CLIENTS))}
        sum(ways["at_once"]())
        for _ in range(rounds):
            for name, way in ways.items():
                before, begin = _cpu_seconds(server), time.perf_counter()
                tokens = sum(way())
                rates[name].append(tokens / (time.perf_counter() - begin))
                cpu_rates[name].append(tokens / (_cpu_seconds(server) - before))
    return {
        "tokens_per_second": rates,
        "tokens_per_processor_second_of_the_server": cpu_rates,
        "ratio": _ratio(rates["at_once"], rates["one_after_another"]),
    }


def lone(run: Path, rounds: int) -> dict[str, Any]:
    """One client over `generate` with the same method."""
    generator = Generator.of_run(*open_folder(run))
    rates: dict[str, list[float]] = {"generate": [], "serve": []}
    with served(run) as (url, _), httpx2.Client() as client:

        def generate(number: int) -> int:
            settings: dict[str, Any] = {"max_tokens": TOKENS, "random_seed": number}
            return len(generator.generate([PROMPTS[number % len(PROMPTS)]], **settings)[0].tokens)

        ways = {"generate": generate, "serve": lambda number: ask(client, url, number)}
        for way in ways.values():
            way(0)
        for _ in range(rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                tokens = sum(map(way, range(2 * len(PROMPTS))))
                rates[name].append(tokens / (time.perf_counter() - begin))
    return {"tokens_per_second": rates, "ratio": _ratio(rates["serve"], rates["generate"])}


def routing(run: Path, rounds: int) -> dict[str, Any]:
    """`/v1/posterior` of prompts that fill the context over reading them; none is in the prefix cache."""
    generator = Generator.of_run(*open_folder(run))
    decoders = [generator.shelf.take(name) for name in generator.names]
    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"read": [], "route": []}
    with served(run) as (url, _), httpx2.Client() as client:

        def read(ids: list[int]) -> None:
            for decoder in decoders:
                decoder.read([[generator.tokenizer.start, *ids]])

        def route(ids: list[int]) -> None:
            client.post(f"{url}/v1/posterior", json={"input": ids}, timeout=600).raise_for_status()

        for number in range(6 * rounds + 2):
            for name, way in (("read", read), ("route", route)):
                ids = random.integers(1, generator.tokenizer.vocab_size, size=generator.context - 1).tolist()
                begin = time.perf_counter()
                way(ids)
                if number >= 2:
                    seconds[name].append(time.perf_counter() - begin)
    return {"seconds": seconds, "ratio": _ratio(seconds["route"], seconds["read"])}


def proxy(run: Path, rounds: int) -> dict[str, Any]:
    """Requests through the server over direct ones."""
    config, run_dir = open_folder(run)
    generator = Generator.of_run(config, run_dir)
    names = list(experts(run_dir))
    prompt = [generator.tokenizer.start, *generator.tokenizer.encode(PROMPTS[0])]
    milliseconds: dict[str, list[float]] = {name: [] for name in ("score", "generate", "through", "routed")}
    port = free_port()
    engine = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "engines.yaml").write_text("".join(f"{name}: {engine}/v1\n" for name in names))
        stack.enter_context(process(Path(__file__).with_name("serve_engine.py"), port, ready=engine))
        url, _ = stack.enter_context(served(run, "--backend", folder / "engines.yaml"))
        client = stack.enter_context(httpx2.Client())

        def post(url: str, **body: Any) -> None:
            client.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()

        ways: dict[str, Callable[[], None]] = {
            "score": lambda: post(engine, prompt=prompt, max_tokens=1, prompt_logprobs=0),
            "generate": lambda: post(engine, prompt=prompt, max_tokens=20, stream=True),
            "through": lambda: post(url, prompt=PROMPTS[0], max_tokens=20, stream=True, model=names[0]),
            "routed": lambda: post(url, prompt=PROMPTS[0], max_tokens=20, stream=True, model="forest"),
        }
        for number in range(rounds * PROXY_REQUESTS + 2):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                if number >= 2:
                    milliseconds[name].append(1000 * (time.perf_counter() - begin))
    direct = map(sum, zip(milliseconds["score"], milliseconds["generate"], strict=True))
    added = [routed - both for routed, both in zip(milliseconds["routed"], direct, strict=True)]
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    return {
        "milliseconds": medians,
        "ratio": _ratio(milliseconds["through"], milliseconds["generate"]),
        "routing_adds_milliseconds": statistics.median(added),
    }


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median over pairs."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "throughput": throughput,
    "lone": lone,
    "routing": routing,
    "proxy": proxy,
}

if __name__ == "__main__":
    before = dict(os.environ)
    wait_passively(os.environ)  # as the server's threads do
    if dict(os.environ) != before:  # it counts when torch is imported
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
