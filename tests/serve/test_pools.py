"""Slow chats and long answers are worked on beside the event loop, and nothing else waits for them."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.served_forest import planner_of, running

from btm_scale.serve import answers, app
from btm_scale.serve.pools import Pool
from btm_scale.serve.work import Busy

CHAT = {"model": "expert0", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 1}


def test_a_pool_refuses_work_beyond_its_queue_and_drops_what_nothing_waits_for() -> None:
    async def use() -> list[int]:
        pool, gate, started = Pool("test", 1, max_waiting=2), threading.Event(), list[int]()

        def work(number: int) -> int:
            started.append(number)
            gate.wait(10)
            return number

        tasks = [asyncio.ensure_future(pool.run(work, number)) for number in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(Busy):
            await pool.run(work, 3)
        tasks[1].cancel()
        await asyncio.sleep(0.01)
        tasks.append(asyncio.ensure_future(pool.run(work, 4)))
        await asyncio.sleep(0.01)
        gate.set()
        assert await asyncio.gather(tasks[0], tasks[2], tasks[3]) == [0, 2, 4]
        return started

    assert asyncio.run(use()) == [0, 2, 4]


def test_a_thread_that_cannot_start_takes_no_place_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    async def use() -> None:
        pool = Pool("test", 1, max_waiting=0)
        with monkeypatch.context() as patch:
            patch.setattr(ThreadPoolExecutor, "submit", refuse)
            with pytest.raises(RuntimeError):
                await pool.run(int)
        assert await pool.run(int) == 0

    asyncio.run(use())


def test_chats_that_are_slow_to_render_hold_up_no_text_and_a_full_queue_is_a_429(
    experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planner, backend = planner_of(experts)
    gate = threading.Event()

    def slowly(messages: Any) -> str:
        gate.wait(20)
        return "ab"

    monkeypatch.setattr(planner.chat, "render", slowly)
    monkeypatch.setattr(app, "MOST_CHATS", 10)
    with running(planner, backend) as server, ThreadPoolExecutor(20) as clients:
        chats = [clients.submit(server.post, "/v1/chat/completions", CHAT) for _ in range(20)]
        while sum(chat.done() for chat in chats) < 8:  # 2 are rendered, 10 wait
            time.sleep(0.01)
        long = {"model": "expert0", "prompt": ["ab"] * 16, "max_tokens": 1, "user": "x" * 20_000}
        assert server.post("/v1/completions", long).status_code == 200
        gate.set()
        statuses = [chat.result().status_code for chat in chats]
        assert sorted(statuses) == [200] * 12 + [429] * 8
        assert server.idle()


ECHO = {"model": "forest", "prompt": "abcdabcd", "max_tokens": 1, "echo": True, "logprobs": 20}


@pytest.mark.parametrize(
    ("where", "step", "path", "body"),
    [
        (answers.Answer, "route", "/v1/completions", ECHO),
        (answers.Answer, "complete", "/v1/completions", ECHO),
        (answers.Answer, "chunk", "/v1/completions", {**ECHO, "stream": True}),
        (app, "posterior_answer", "/v1/posterior", {"input": "abcdabcd", "trace": True}),
    ],
    ids=["prompt", "answer", "stream", "posterior"],
)
def test_log_probabilities_of_a_long_prompt_are_formatted_while_others_are_answered(
    experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, where: Any, step: str, path: str, body: Any
) -> None:
    format, begun, gate = getattr(where, step), threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> Any:
        begun.set()
        gate.wait(10)
        return format(*arguments)

    monkeypatch.setattr(where, step, slowly)
    monkeypatch.setattr(app, "_INLINE_SCORES", 10, raising=False)
    with running(*planner_of(experts)) as server, ThreadPoolExecutor(1) as clients:
        answer = clients.submit(server.post, path, body)
        assert begun.wait(20)
        assert httpx2.get(f"{server.url}/health", timeout=5).status_code == 200
        assert not answer.done()
        gate.set()
        assert answer.result().status_code == 200
