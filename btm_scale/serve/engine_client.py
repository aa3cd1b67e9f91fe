"""Requests to one engine: which of its failures are worth another attempt, and what the others mean."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from btm_scale.serve.engine_answers import read_answer, read_reason
from btm_scale.serve.engines_file import RemoteExpert
from btm_scale.serve.work import Busy, Refused

logger = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds that a request waits in all for an engine that is busy
_FIRST_WAIT = 0.25  # seconds, if the engine does not say how long; doubled each time
_BUSY = (408, 425, 429)  # and 503 with Retry-After
_ABOUT_THE_REQUEST = (400, 413, 422)  # other refusals, such as of a key, concern all requests


class EngineDown(Exception):  # noqa: N818 (it names a state)
    """An engine cannot be reached, or failed; the message may be shown to the client."""


class EngineClient:
    """Sends requests to the expert `name` at `place`."""

    def __init__(self, name: str, place: RemoteExpert, client: httpx2.AsyncClient) -> None:
        self._name, self._client = name, client
        self._model = place.model or name
        self._url = httpx2.URL(f"{place.url.rstrip('/')}/completions")
        self._headers = {"Content-Type": "application/json", **place.headers}

    async def ask(self, body: dict[str, Any]) -> bytes:
        """Return the body of the answer. Raises EngineDown, Busy or Refused, and ValueError if it is too large."""
        for is_last in (False, True):
            response = await self.open(body)
            try:
                return await read_answer(response)
            except httpx2.TimeoutException as error:  # the client waits already
                raise self.down(error) from None
            except httpx2.HTTPError as error:
                if is_last:
                    raise self.down(error) from None
            finally:
                await response.aclose()
        raise AssertionError("the last attempt returns or raises")

    async def open(self, body: dict[str, Any]) -> httpx2.Response:
        """Return a response with status 200, whose body is not read yet. Raises EngineDown, Busy or Refused.

        The request is sent again if the connection fails, as one that was idle may, if the engine answers with 5xx,
        and as long as the engine is busy, up to `PATIENCE`.
        """
        content = json.dumps({"model": self._model, **body}, separators=(",", ":")).encode()
        failures, waited, wait = 0, 0.0, _FIRST_WAIT
        while True:
            request = self._client.build_request("POST", self._url, content=content, headers=self._headers)
            try:
                response = await self._client.send(request, stream=True)
            except httpx2.TimeoutException as error:
                raise self.down(error) from None
            except httpx2.HTTPError as error:
                failures += 1
                if failures > 1:
                    raise self.down(error) from None
                continue
            status, after = response.status_code, retry_after(response.headers.get("retry-after"))
            if status == 200:
                return response
            reason = await read_reason(response)
            await response.aclose()
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
        """Return the error of an engine that does not answer."""
        text = str(reason) or type(reason).__name__
        return EngineDown(f"The engine of '{self._name}' does not answer: {text}.")


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
