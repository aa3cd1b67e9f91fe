"""An engine that answers every request after 50 milliseconds, for the proxy's overhead in serve.py.

python benchmarks/serve_engine.py PORT
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

SECONDS = 0.05


async def completions(request: Request) -> Response:
    """Score a prompt, or stream a text, as vLLM does."""
    body = await request.json()
    await asyncio.sleep(SECONDS)
    if body.get("stream"):
        return StreamingResponse(_text(body["max_tokens"]), media_type="text/event-stream")
    rows = [None, *({str(token): {"logprob": -1.0}} for token in body["prompt"][1:])]
    choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": rows}
    return JSONResponse({"choices": [choice]})


def _text(tokens: int) -> Iterator[str]:
    for number in range(tokens):
        reason = "length" if number == tokens - 1 else None
        yield f"data: {json.dumps({'choices': [{'index': 0, 'text': 'x', 'finish_reason': reason}]})}\n\n"
    yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}\n\ndata: [DONE]\n\n"


if __name__ == "__main__":
    app = Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])
    uvicorn.run(app, port=int(sys.argv[1]), log_config=None, access_log=False)
