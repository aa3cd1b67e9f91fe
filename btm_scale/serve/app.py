"""The routes of the server."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from btm_scale.serve.answers import Answer, ChatAnswer, CompletionAnswer, posterior_answer
from btm_scale.serve.api_errors import ApiError, internal, overloaded, refused, unavailable
from btm_scale.serve.events import Events, EventStream, event_bytes, resumed, unless_hung_up, until_first_token
from btm_scale.serve.gate import Gate, read_body
from btm_scale.serve.keys import Keys
from btm_scale.serve.metrics import Metrics
from btm_scale.serve.page import page
from btm_scale.serve.planner import Planner
from btm_scale.serve.pools import Pool
from btm_scale.serve.schemas import ChatRequest, CompletionRequest, PosteriorRequest, parsed
from btm_scale.serve.work import Backend, BackendError, Busy, Delta, Event, Failed, Job, Refused, Routed

logger = logging.getLogger(__name__)

MOST_BODIES = MOST_CHATS = 64  # that wait for a thread
_MOST_ANSWERS = 1 << 16  # more than any backend's queue, which limits them
_INLINE_BYTES = 4096  # a body of this size is handled faster than a thread takes over
_INLINE_SCORES = 256  # and so are this many log-probabilities

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Service:
    """The handlers of the routes."""

    def __init__(self, planner: Planner, metrics: Metrics, name: str, *, log_requests: bool) -> None:
        self._planner, self._metrics, self._name, self._log_requests = planner, metrics, name, log_requests
        self._backend: Backend = planner.backend
        # Apart from one another, since rendering a chat may take seconds, however short it is.
        self._bodies, self._chats = Pool("body", 2, max_waiting=MOST_BODIES), Pool("chat", 2, max_waiting=MOST_CHATS)
        self._answers = Pool("answer", 2, max_waiting=_MOST_ANSWERS)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        content = await read_body(request)
        size = len(content)
        body = await self._computed(size, partial(parsed, CompletionRequest), content)
        self._require_ready()
        jobs = await self._computed(size, self._planner.completion, body)
        echoed = await self._computed(size, self._echoed, body) if body.echo else ()
        answer = CompletionAnswer(body.model, jobs, self._planner.tokenizer, echoed=echoed, stream=body.stream)
        return await self._answer(request, jobs, answer, body)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        content = await read_body(request)
        body = await self._computed(len(content), partial(parsed, ChatRequest), content)
        self._require_ready()
        jobs = await unless_hung_up(request, self._chats.run(self._planner.chat_completion, body))
        if jobs is None:
            return self._hung_up()
        answer = ChatAnswer(body.model, jobs, self._planner.tokenizer, stream=body.stream)
        return await self._answer(request, jobs, answer, body)

    async def posterior(self, request: Request) -> Response:
        """POST /v1/posterior."""
        content = await read_body(request)
        body = await self._computed(len(content), partial(parsed, PosteriorRequest), content)
        self._require_ready()
        if body.messages:
            job = await unless_hung_up(request, self._chats.run(self._planner.posterior, body))
        else:
            job = await self._computed(len(content), self._planner.posterior, body)
        if job is None:
            return self._hung_up()
        async with contextlib.aclosing(self._events([job])) as events:
            routed = await unless_hung_up(request, anext(events))
        if routed is None:
            return self._hung_up()
        found = routed[1]
        assert isinstance(found, Routed)
        count = len(found.trace or ()) * len(found.weights)
        return await self._formatted(count, lambda: JSONResponse(posterior_answer(job, found)))

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        catalog = self._planner.catalog
        return JSONResponse({"object": "list", "data": [catalog.card(name) for name in catalog.names]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        return JSONResponse(self._planner.catalog.card(request.path_params["name"]))

    async def health(self, request: Request) -> Response:
        """GET /health: 503 while models are loaded."""
        ready = self._backend.is_ready
        return JSONResponse({"status": "ok" if ready else "loading"}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        """GET /: a page to try the forest."""
        return page(self._name, self._planner.catalog)

    async def _answer(
        self, request: Request, jobs: list[Job], answer: Answer, body: CompletionRequest | ChatRequest
    ) -> Response:
        begin = time.perf_counter()
        events = self._events(jobs)
        ended = False
        try:
            # Errors before the first token still have a status; after it, a stream has begun.
            begun = await unless_hung_up(request, until_first_token(events))
            if begun is None:
                return self._hung_up()
            everything = resumed(begun, events)
            if body.stream:
                chunks = self._chunks(everything, answer, begin, usage=body.stream_options.include_usage)
                ended = True
                return EventStream(chunks, events, self._hung_up, partial_done=lambda: self._done(answer))
            if await unless_hung_up(request, self._collect(everything, answer, begin)) is None:
                return self._hung_up()
        finally:
            if not ended:
                await events.aclose()
        self._done(answer)
        return await self._formatted(answer.total_cost, lambda: JSONResponse(answer.complete()))

    async def _events(self, jobs: list[Job]) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield the events of jobs. Raises ApiError instead of a failure."""
        try:
            async with contextlib.aclosing(self._backend.stream(jobs)) as events:  # type: ignore[type-var]
                async for number, event in events:
                    if isinstance(event, Failed):
                        raise _api_error(event.error)
                    yield number, event
        except Busy as error:
            raise overloaded(error) from None

    async def _collect(self, events: Events, answer: Answer, begin: float) -> bool:
        async for _ in self._received(events, answer, begin):
            pass
        return True

    async def _chunks(self, events: Events, answer: Answer, begin: float, *, usage: bool) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._received(events, answer, begin, {"usage": None} if usage else {}):
                yield chunk
        except ApiError as error:
            yield event_bytes({"error": error.error})
            return
        except ValueError:  # a number that JSON lacks, such as NaN
            logger.exception("a stream failed")
            yield event_bytes({"error": internal().error})
            return
        if usage:
            yield event_bytes(answer.usage_chunk())
        yield b"data: [DONE]\n\n"

    async def _received(
        self, events: Events, answer: Answer, begin: float, more: Mapping[str, Any] = MappingProxyType({})
    ) -> AsyncIterator[bytes]:
        """Record events, and yield their chunks, each with `more`."""

        def chunk_of(number: int, event: Delta) -> bytes | None:
            chunk = answer.add(number, event)
            return None if chunk is None else event_bytes({**chunk, **more})

        seen = False
        async for number, event in events:
            if isinstance(event, Routed):
                await self._formatted(answer.cost(number, event), answer.route, number, event)
            elif isinstance(event, Delta):
                if not seen:
                    self._metrics.first_token.observe(time.perf_counter() - begin)
                    seen = True
                chunk = await self._formatted(answer.cost(number, event), chunk_of, number, event)
                if chunk is not None:
                    yield chunk

    def _done(self, answer: Answer) -> None:
        usage = answer.usage()
        self._metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self._metrics.tokens.labels(answer.model).inc(usage["completion_tokens"])
        experts = [choice.generated_by for choice in answer.choices if choice.generated_by is not None]
        for expert in experts:
            self._metrics.drawn.labels(expert).inc()
        logger.info(
            "%s %s prompt_tokens=%d completion_tokens=%d experts=%s",
            answer.id,
            answer.model,
            usage["prompt_tokens"],
            usage["completion_tokens"],
            ",".join(experts),
        )
        if self._log_requests:
            for choice in answer.choices:
                prompt = self._planner.tokenizer.decode(choice.job.prompt[1:])
                logger.info("%s prompt=%r text=%r", answer.id, prompt, choice.text)

    async def _computed(self, size: int, function: Callable[[Argument], Result], argument: Argument) -> Result:
        """Return `function(argument)`, computed in a thread unless the request's body of `size` bytes is small."""
        return function(argument) if size <= _INLINE_BYTES else await self._bodies.run(function, argument)

    async def _formatted(self, count: int, function: Callable[..., Result], *arguments: object) -> Result:
        """Return `function(*arguments)`, computed in a thread unless it formats few log-probabilities."""
        return function(*arguments) if count <= _INLINE_SCORES else await self._answers.run(function, *arguments)

    def _echoed(self, body: CompletionRequest) -> list[str]:
        decode = self._planner.tokenizer.decode
        return [text if isinstance(text, str) else decode(text) for text in body.prompts]

    def _hung_up(self) -> Response:
        self._metrics.hang_ups.inc()
        return Response(status_code=499)

    def _require_ready(self) -> None:
        if not self._backend.is_ready:
            raise unavailable("The server is loading its models. Retry in a few seconds.")


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, Busy):
        return overloaded(error)
    if isinstance(error, Refused):
        return refused(str(error))
    return unavailable(str(error)) if isinstance(error, BackendError) else internal()


async def _busy(request: Request, error: Exception) -> Response:
    assert isinstance(error, Busy)
    return overloaded(error).response()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = "Unknown URL" if status == 404 else "Method not allowed"
    return ApiError(status, f"{what}: {request.method:.20} {request.url.path:.200}").response()


async def _fault(request: Request, error: Exception) -> Response:
    return internal().response()


def make_app(
    planner: Planner,
    *,
    name: str = "forest",
    keys: Keys | None = None,
    log_requests: bool = False,
    only_local: bool = False,
    lifespan: Any = None,
) -> Starlette:
    """Return the ASGI application.

    `name`: of the run, for the page. `only_local`: answer requests to localhost only.
    """
    metrics = Metrics(planner.backend)
    service = Service(planner, metrics, name, log_requests=log_requests)
    routes = [
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/posterior", service.posterior, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        Route("/", service.page),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={ApiError: _refused, Busy: _busy, 404: _no_route, 405: _no_route, Exception: _fault},
    )
    app.add_middleware(Gate, keys=keys, metrics=metrics, only_local=only_local)
    return app
