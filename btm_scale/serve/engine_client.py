"""Requests to one engine: which of its failures are worth another attempt, and what the others mean."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from btm_scale.serve.engine_answers import read_answer, read_reason
from btm_scale.serve.engines_file import RemoteExpert
from btm_scale.serve.hosts import proxy_of
from btm_scale.serve.shown import shown_failure, shown_url
from btm_scale.serve.work import Busy, Refused

logger = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds that a request waits in all for an engine that is busy
_FIRST_WAIT = 0.25  # seconds, if the engine does not say how long; doubled each time
_BUSY = (408, 425, 429)  # and 503 with Retry-After
_CONNECT_SECONDS = 5.0
# Less than the 5 seconds after which uvicorn, and so vLLM, closes an idle connection: a request sent just then is lost.
_IDLE_SECONDS = 4.0
FAILURES = (aiohttp.ClientError, TimeoutError)  # of a request and of reading its answer
_ABOUT_THE_REQUEST = (400, 413, 422)  # other refusals, such as of a key, concern all requests


class EngineDown(Exception):  # noqa: N818 (it names a state)
    """An engine cannot be reached, or failed; the message may be shown to the client."""


def open_session(seconds: float) -> aiohttp.ClientSession:
    """Return the connections to all engines. An engine that sends nothing for this many seconds has failed."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_SECONDS, sock_read=seconds),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


class EngineClient:
    """Sends requests to the expert `name` at `place`."""

    def __init__(self, name: str, place: RemoteExpert, session: aiohttp.ClientSession) -> None:
        self._name, self._session = name, session
        self._model = place.model or name
        self._url = f"{place.url.rstrip('/')}/completions"
        self._headers = {"Content-Type": "application/json", **place.headers}
        self._proxy = proxy_of(self._url)
        self.answer_seconds: float = session.timeout.sock_read or math.inf
        """An engine that sends nothing for this long has failed."""
        # The session's time-out begins when a request is sent, which an engine that reads nothing never lets happen.
        self._open_seconds = _CONNECT_SECONDS + self.answer_seconds

    async def ask(self, body: dict[str, Any]) -> bytes:
        """Return the body of the answer. Raises EngineDown, Busy or Refused, and ValueError if it is too large."""
        for is_last in (False, True):
            response = await self.open(body)
            try:
                return await read_answer(response, self.answer_seconds)
            except FAILURES as error:
                if is_last or isinstance(error, TimeoutError):  # the client waits already
                    raise self.down(error) from None
            finally:
                response.close()
        raise AssertionError("the last attempt returns or raises")

    async def open(self, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """Return a response with status 200, whose body is not read yet. Raises EngineDown, Busy or Refused.

        The request is sent again if the connection fails, as one that was idle may, if the engine answers with 5xx,
        and as long as the engine is busy, up to `PATIENCE`.
        """
        content = json.dumps({"model": self._model, **body}, separators=(",", ":")).encode()
        failures, waited, wait = 0, 0.0, _FIRST_WAIT
        while True:
            try:
                async with asyncio.timeout(self._open_seconds):
                    response = await self._session.post(
                        self._url, data=content, headers=self._headers, proxy=self._proxy, allow_redirects=False
                    )
            except FAILURES as error:
                failures += 1
                if failures > 1 or isinstance(error, TimeoutError):
                    raise self.down(error) from None
                continue
            status, after = response.status, retry_after(response.headers.get("retry-after"))
            if status == 200:
                return response
            try:
                reason = await read_reason(response, self.answer_seconds)
            finally:
                response.close()
            if status in _BUSY or (status == 503 and after is not None):
                seconds = wait if after is None else after
                if waited + seconds > PATIENCE:
                    raise Busy(f"The engine of '{self._name}' is busy (status {status}).", max(seconds, 1.0))
                await asyncio.sleep(seconds)
                # An engine that says 0 is still asked a few times only.
                waited, wait = waited + max(seconds, wait), 2 * wait
            elif status >= 500:
                failures += 1
                if failures > 1:
                    raise self.down(f"status {status}")
            elif status in _ABOUT_THE_REQUEST:
                about = f": {reason.rstrip('.')}" if reason else ""
                raise Refused(f"The engine of '{self._name}' refused the request with status {status}{about}.")
            else:
                logger.warning("The engine of '%s' answered with status %d: %s", self._name, status, reason)
                raise EngineDown(f"The engine of '{self._name}' answered with status {status}.")

    def down(self, reason: Exception | str) -> EngineDown:
        """Return the error of an engine that does not answer, and log its address and reason for the operator."""
        logger.info("The engine of '%s' at %s: %s", self._name, shown_url(self._url), shown_failure(reason))
        return EngineDown(f"The engine of '{self._name}' does not answer: {described(reason)}.")


def described(error: Exception | str) -> str:
    """Return what failed, without the engine's address, which is not for clients."""
    if isinstance(error, TimeoutError):
        return "time-out"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "cannot connect"
    if isinstance(error, aiohttp.ClientError):
        return "the connection failed"
    return str(error) or type(error).__name__


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which has a number or a date; None if it has neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
