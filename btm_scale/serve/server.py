"""The server's process: from a run to a listening socket, and from SIGTERM to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from btm_scale.config.run import RunConfig
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import LaunchError, UserError
from btm_scale.forest.forest import require_experts
from btm_scale.forest.priors import log_prior_of, models_of, router_of
from btm_scale.generate.model_cache import shared_context
from btm_scale.run_dir import RunDir, finished_models
from btm_scale.serve.app import make_app
from btm_scale.serve.catalog import Catalog, catalog_of
from btm_scale.serve.chat import ChatTemplate
from btm_scale.serve.connection import Connection
from btm_scale.serve.engine import Engine
from btm_scale.serve.engines_file import load_engines
from btm_scale.serve.local import LocalBackend
from btm_scale.serve.local_scores import LocalScores
from btm_scale.serve.planner import Planner
from btm_scale.serve.prefixes import PrefixCache
from btm_scale.serve.prompt_reader import Prior
from btm_scale.serve.remote import RemoteBackend
from btm_scale.serve.work import Method

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 60  # a stream that takes longer is cut off on SIGTERM
PREFIX_BYTES = 256e6
# Longer than proxies and load balancers keep idle connections, mostly 60 or 90 seconds: a connection that the server
# closes first may be the one on which the next request is under way.
IDLE_SECONDS = 120


def prior_of(config: RunConfig, run: RunDir, names: Sequence[str], prior: str, domain: str | None = None) -> Prior:
    """Return the log prior over experts in nats, or the function from texts to their log priors."""
    log_prior = log_prior_of(config, run, names, prior, domain)
    return router_of(config, names, prior, None) or log_prior


def local_planner(
    config: RunConfig,
    run: RunDir,
    *,
    method: Method = "expert",
    prior: str = "cached",
    domain: str | None = None,
    max_bytes: float | None = None,
    device: str | None = None,
    max_rows: int = 32,
    max_waiting: int = 256,
    prefix_bytes: float = PREFIX_BYTES,
) -> tuple[Planner, LocalBackend]:
    """Return what answers a run's requests in this process. Raises UserError for invalid settings."""
    experts = list(require_experts(run))
    finished = finished_models(run)
    names = models_of(run, list(dict.fromkeys([*experts, *finished])))
    tokenizer = Tokenizer.load(run.tokenizer)
    engine = Engine(
        {name: run.model(name) for name in names},
        tokenizer,
        prior_of(config, run, experts, prior, domain),
        max_bytes=max_bytes,
        device=device,
        max_rows=max_rows,
        max_waiting=max_waiting,
        prefixes=PrefixCache(prefix_bytes),
    )
    backend = LocalBackend(engine, preload=experts)
    if method == "mixture" and (reason := backend.can_mix(experts)):
        raise UserError(f"{reason} Increase --max-memory, or use --method expert.")
    created = int(run.config.stat().st_mtime)
    catalog = catalog_of(experts, names, method, created)
    return Planner(catalog, backend, tokenizer, _chat_template(run)), backend


def remote_planner(
    config: RunConfig,
    run: RunDir,
    file: Path,
    *,
    prior: str = "cached",
    domain: str | None = None,
    max_bytes: float | None = None,
    max_waiting: int = 256,
) -> tuple[Planner, RemoteBackend]:
    """Return what answers a run's requests with the engines in a file. Raises UserError for invalid settings."""
    engines = load_engines(file, list(require_experts(run)))
    names = tuple(engines)
    tokenizer = Tokenizer.load(run.tokenizer)
    scoring = {name: engine.score for name, engine in engines.items() if engine.score is not None}
    backend = RemoteBackend(
        engines,
        tokenizer.decode,
        prior_of(config, run, names, prior, domain),
        context=shared_context({name: run.model(name) for name in names}, tokenizer),
        local=LocalScores(scoring, vocabulary=tokenizer.vocab_size, max_bytes=max_bytes),
        max_waiting=max_waiting,
    )
    catalog = Catalog(names, (), "expert", int(run.config.stat().st_mtime))
    return Planner(catalog, backend, tokenizer, _chat_template(run)), backend


def _chat_template(run: RunDir) -> ChatTemplate | None:
    template = ChatTemplate.of(run.tokenizer)
    if template is not None:
        template.start()
    return template


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens; clients that connect before the server starts wait for it.

    Raises LaunchError if the address cannot be used.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        # With the protocol, because asyncio sets TCP_NODELAY only on sockets that name it. Without, the body of an
        # answer, or the next token, may wait 40 milliseconds until the client acknowledges what was sent before.
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        reason = "it is not a host name" if isinstance(error, UnicodeError) else error.strerror or error
        raise LaunchError(f"Cannot listen on {host}: {reason}. Correct --host.") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()  # two processes may bind one port, and only one of them may listen
    except OSError as error:
        listener.close()
        raise LaunchError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port or --host."
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(planner: Planner, backend: Any, listener: socket.socket, **settings: Any) -> None:
    """Answer until SIGTERM or SIGINT, then complete what runs. Raises UserError if the models cannot be loaded.

    `settings`: of `make_app`. A second SIGINT ends the process at once.
    """
    server, failures = make_server(planner, backend, **settings)
    logger.info("Serving %s on %s", ", ".join(planner.catalog.names[:2]), url_of(listener))
    with _signals_that_return():
        asyncio.run(server.serve(sockets=[listener]))
    if failures:
        raise failures[0]


def make_server(planner: Planner, backend: Any, **settings: Any) -> tuple[uvicorn.Server, list[Exception]]:
    """Return a server, and the list to which it adds the error that ends it."""
    failures: list[Exception] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(backend, failures, stop))
        yield
        if not loading.done():
            loading.cancel()
        elif not failures:
            await backend.stop()

    def stop() -> None:
        server.should_exit = True

    app = make_app(planner, lifespan=lifespan, **settings)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            timeout_keep_alive=IDLE_SECONDS,
        )
    )
    return server, failures


async def _load(backend: Any, failures: list[Exception], stop: Callable[[], None]) -> None:
    """Load the models while /health answers 503."""
    try:
        await backend.start()
        logger.info("All models are loaded.")
    except Exception as error:
        failures.append(error)
        stop()


@contextlib.contextmanager
def _signals_that_return() -> Any:
    """uvicorn raises a signal again once it has drained; here the command returns instead."""
    if not hasattr(signal, "SIGTERM"):
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
