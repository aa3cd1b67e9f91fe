"""The engine's thread behind an asynchronous interface: a backend of models in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from btm_scale.serve.engine import Engine
from btm_scale.serve.work import Delta, Event, Failed, Job, Routed


class LocalBackend:
    """Answers jobs with models in this process."""

    def __init__(self, engine: Engine, preload: Sequence[str] = ()) -> None:
        """`preload`: models to load before the first request."""
        self._engine, self._preload = engine, preload
        self.context, self.max_copies = engine.context, engine.max_rows
        self.is_ready = False
        self._inboxes: dict[Job, tuple[int, asyncio.Queue[tuple[int, Event]]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Load the models and start the engine. Raises CheckpointError or ForestError."""
        self._loop = asyncio.get_running_loop()
        # Not in a thread of asyncio's, for which the loop would wait when a signal ends the server.
        await asyncio.wrap_future(self._engine.start(self._deliver, self._preload))
        self.is_ready = True

    async def stop(self) -> None:
        """End the engine once its jobs are complete."""
        await asyncio.to_thread(self._engine.stop)

    def can_mix(self, names: Sequence[str]) -> str | None:
        """See Backend."""
        if self._engine.shelf.fit(names):
            return None
        return f"A mixture needs all {len(names)} experts in memory, which exceeds the server's --max-memory."

    def load(self) -> dict[str, int]:
        """See Backend."""
        return self._engine.load()

    async def stream(self, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Event]]:
        """See Backend."""
        inbox: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        left = [max(1, job.copies) for job in jobs]
        self._inboxes |= {job: (number, inbox) for number, job in enumerate(jobs)}
        try:
            self._engine.submit(jobs)
            while any(left):
                number, event = await inbox.get()
                if isinstance(event, Failed):
                    left[number] = 0
                elif (isinstance(event, Routed) and jobs[number].copies == 0) or (
                    isinstance(event, Delta) and event.finished
                ):
                    left[number] -= 1
                yield number, event
        finally:
            for job in jobs:
                job.cancelled = True
                self._inboxes.pop(job, None)

    def _deliver(self, events: list[tuple[Job, Event]]) -> None:
        """Pass events on; called in the engine's thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ended without waiting
            self._loop.call_soon_threadsafe(self._sort, events)

    def _sort(self, events: list[tuple[Job, Event]]) -> None:
        for job, event in events:
            if job in self._inboxes:
                number, inbox = self._inboxes[job]
                inbox.put_nowait((number, event))
