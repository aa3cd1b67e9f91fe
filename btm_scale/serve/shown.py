"""What logs and messages show of URLs and of failed requests: no password."""

from __future__ import annotations

import aiohttp


def shown_url(url: str) -> str:
    """Return a URL without its user and password."""
    return url.rpartition("@")[2]


def shown_failure(error: Exception | str) -> str:
    """Return why a request failed. aiohttp's messages may have the URL of a proxy, with its password."""
    if isinstance(error, aiohttp.ClientResponseError):
        return f"{type(error).__name__}: status {error.status}, {error.message}"
    if isinstance(error, aiohttp.InvalidURL):  # its message is the URL
        return type(error).__name__
    return str(error) or type(error).__name__
