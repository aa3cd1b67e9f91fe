"""Errors in the form of OpenAI's API."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from btm_scale.serve.work import Busy


class ApiError(Exception):
    """An answer to the client that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}

    def response(self) -> JSONResponse:
        """Return the error as a response."""
        return JSONResponse({"error": self.error}, self.status, self.headers)


def overloaded(busy: Busy) -> ApiError:
    """Return the error of a server or engine without room for a request."""
    return ApiError(
        429,
        f"{busy} Retry later, or with fewer requests at a time.",
        kind="rate_limit_error",
        code="server_overloaded",
        headers={"Retry-After": str(math.ceil(busy.seconds))},
    )


def unavailable(message: str) -> ApiError:
    """Return the error of a server or expert that cannot answer now."""
    return ApiError(503, message, kind="server_error", code="service_unavailable", headers={"Retry-After": "2"})


def refused(message: str) -> ApiError:
    """Return the error of a request that an expert's engine does not accept."""
    return ApiError(400, message, code="engine_refused")


def internal() -> ApiError:
    """Return the error for a fault of the server, whose log has the details."""
    return ApiError(500, "The server failed to answer. Its log has the reason.", kind="server_error", code="internal")
