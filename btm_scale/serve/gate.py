"""What every request passes: the API key, the limit on the body, and the count of answers."""

from __future__ import annotations

import asyncio
import re
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from btm_scale.serve.api_errors import ApiError
from btm_scale.serve.hosts import is_loopback
from btm_scale.serve.keys import Keys
from btm_scale.serve.metrics import Metrics

MAX_BODY = 4 << 20  # bytes
_MAX_DROPPED = 64 << 20  # bytes of a body that is too large
BODY_SECONDS = 60.0
_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/posterior", "/v1/models", "/health", "/metrics", "/")


class Gate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, keys: Keys | None, metrics: Metrics, only_local: bool) -> None:
        self._app, self._keys, self._metrics, self._only_local = app, keys, metrics, only_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request without a key or from a foreign page, or pass it on and count its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 499

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # Before keys are checked. Base URLs that end with a slash give `/v1//models` or `/v1/models/`.
        path, headers = re.sub("/{2,}", "/", scope["path"]).rstrip("/") or "/", Headers(scope=scope)
        scope["path"] = path
        route = path if path in _ROUTES else "other"
        try:
            if path.startswith("/v1/") and self._keys and not self._keys.accept(headers.get("authorization")):
                await _unauthorized().response()(scope, receive, counted)
            elif self._only_local and (foreign := _foreign(headers)):
                await _forbidden(foreign).response()(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        except ClientDisconnect:
            pass
        except Exception:  # answered outside of this middleware, with status 500 if no answer has begun
            status = 500 if status == 499 else status
            raise
        finally:
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - begin)


def _foreign(headers: Headers) -> str:
    """Return the Host or Origin header of a request from another site's page, or "" if both are local.

    A browser sends such requests even to a server that listens on loopback alone; where the site's name resolves to
    this machine (DNS rebinding), its page could read the answers too.
    """
    authorities = {"Host": headers.get("host"), "Origin": headers.get("origin")}
    for name, value in authorities.items():
        if value is not None and not _is_local(value.partition("://")[2] or value):
            return f"{name}: {value[:100]}"
    return ""


def _is_local(authority: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{authority}").hostname or "")
    except ValueError:
        return False


async def read_body(request: Request) -> bytes:
    """Return the body. Raises ApiError if it is too large or too slow, ClientDisconnect if the client leaves.

    A body that is somewhat too large is read and dropped: a connection that is closed with unread bytes is reset, and
    the client may lose the answer.
    """
    length = request.headers.get("content-length", "0")
    declared = int(length) if length.isdecimal() else 0
    if declared > _MAX_DROPPED:
        raise _too_large()
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size > _MAX_DROPPED:
                    break
                if max(size, declared) <= MAX_BODY:
                    body += piece
                else:
                    body.clear()
    except TimeoutError:
        raise _too_slow() from None
    if size > MAX_BODY:
        raise _too_large()
    return bytes(body)


def _too_large() -> ApiError:
    return ApiError(
        413,
        f"The body is larger than {MAX_BODY >> 20} MiB. Send a shorter prompt.",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def _too_slow() -> ApiError:
    return ApiError(
        408,
        f"The body did not arrive within {BODY_SECONDS:g} seconds. Send it again, or a shorter one.",
        code="request_timeout",
        headers={"Connection": "close"},
    )


def _forbidden(header: str) -> ApiError:
    return ApiError(
        403,
        f"The request has {header!r}, and a server without API keys answers only requests to localhost. Set "
        "--api-key-file to serve other names.",
        code="foreign_request",
    )


def _unauthorized() -> ApiError:
    return ApiError(
        401,
        "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
