"""The page at `/`, in which one can try the forest."""

from __future__ import annotations

import json
import secrets
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.responses import HTMLResponse

from btm_scale.serve.catalog import Catalog


def page(name: str, catalog: Catalog) -> HTMLResponse:
    """Return the page of a run."""
    nonce = secrets.token_urlsafe(16)
    settings = json.dumps({"models": catalog.names, "experts": catalog.experts}).replace("<", "\\u003c")
    content = _template().render(
        name=name, models=catalog.names, settings=settings, nonce=nonce, css=_file("page.css"), js=_file("page.js")
    )
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    return HTMLResponse(content, headers=headers)


@cache
def _template() -> Any:
    from jinja2 import Environment

    return Environment(autoescape=True).from_string(_file("page.html.jinja"))


@cache
def _file(name: str) -> str:
    return files("btm_scale.serve").joinpath(name).read_text(encoding="utf-8")
