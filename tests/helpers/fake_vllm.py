"""An engine that answers as vLLM does, written from the documentation and schemas of vLLM 0.28.

`/v1/completions` with a list of token ids, `prompt_logprobs`, `stream` with `stream_options`, `temperature`, `top_k`,
`seed`, `stop`, `skip_special_tokens`, `logprobs` and `echo`.
`prompt_logprobs` has one entry per token of the prompt: null, and then {id: {logprob, rank, decoded_token}}, with
-9999.0 for minus infinity. Streams cannot have them, and max_tokens must be at least 1.
Special tokens are left out of the text, in which `stop` is searched, unless `skip_special_tokens` is false.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM

from btm_scale.serve.server import bind, url_of
from helpers.tiny_forest import Letters


@dataclass
class FakeVllm:
    """One engine; `latency` in seconds per token.

    `dies_after`: the tokens of a stream after which its connection ends, and it answers 500 to all that follows.
    `breaks`: streams that end after a token, as with a connection that is reset. `refusals` and `stream_refusals`: the
    next answers to other requests and to those for streams, (status, headers). `longest`: prompt in tokens. `special`:
    the texts of special tokens. `default_top_k`: of requests without one, as vLLM takes it from generation_config.json.
    `refuses_top_p`: a top_p of 1, as TGI does.
    """

    directory: Path
    name: str
    latency: float = 0.0
    dies_after: int | None = None
    has_prompt_logprobs: bool = True  # not so SGLang, which has `echo` with `logprobs`
    echoes: bool = True
    breaks: int = 0
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    stream_refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    longest: int | None = None
    special: str = ""
    default_top_k: int = -1
    refuses_top_p: bool = False
    is_dead: bool = False
    requests: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(self.directory).eval()

    @torch.no_grad()
    def _log_probs(self, ids: list[int]) -> torch.Tensor:
        return self._model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if body["model"] != self.name:
            message = f"The model `{body['model']}` does not exist."
            return JSONResponse({"error": {"message": message, "type": "NotFoundError", "code": 404}}, 404)
        if body["max_tokens"] < 1:
            return JSONResponse({"error": {"message": "max_tokens must be at least 1", "code": 400}}, 400)
        if self.is_dead:
            return JSONResponse({"error": {"message": "EngineCore encountered an issue.", "code": 500}}, 500)
        refusals = self.stream_refusals if body.get("stream") else self.refusals
        if refusals:
            status, headers = refusals.pop(0)
            return JSONResponse({"error": {"message": "Too many requests.", "code": status}}, status, headers)
        await asyncio.sleep(self.latency)
        ids = body["prompt"]
        if self.longest is not None and len(ids) > self.longest:
            message = f"This model's maximum context length is {self.longest} tokens."
            return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": 400}}, 400)
        if self.refuses_top_p and body.get("top_p") == 1:
            message = "`top_p` must be > 0.0 and < 1.0"
            return JSONResponse({"error": f"Input validation error: {message}", "error_type": "validation"}, 422)
        if body.get("stream"):
            return StreamingResponse(self._stream(ids, body), media_type="text/event-stream")
        choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        if "prompt_logprobs" in body and self.has_prompt_logprobs:
            choice["prompt_logprobs"] = self._prompt_logprobs(ids, body["prompt_logprobs"])
        if body.get("echo") and self.echoes:
            scores = self._log_probs(ids)
            first: dict[str, list[Any]] = {"tokens": [Letters().decode(ids[:1])], "token_logprobs": [None]}
            rest = self._logprobs(scores[:-1], ids[1:], body["logprobs"])
            choice["logprobs"] = {name: first.get(name, [None]) + values for name, values in rest.items()}
        return JSONResponse({"object": "text_completion", "model": self.name, "choices": [choice]})

    def _prompt_logprobs(self, ids: list[int], top: int) -> list[Any]:
        scores = self._log_probs(ids)
        rows: list[Any] = [None]
        for place, token in enumerate(ids[1:]):
            row = {}
            for one in {token: None, **dict.fromkeys(scores[place].topk(top).indices.tolist())}:
                value = max(float(scores[place, one]), -9999.0)
                rank = int((scores[place] > scores[place, one]).sum()) + 1
                row[str(one)] = {"logprob": value, "rank": rank, "decoded_token": Letters().decode([one])}
            rows.append(row)
        return rows

    @staticmethod
    def _logprobs(scores: torch.Tensor, tokens: list[int], top: int) -> dict[str, list[Any]]:
        """The object `logprobs` of tokens with these scores [tokens, vocabulary]."""

        def by_text(row: torch.Tensor, chosen: int) -> dict[str, float]:
            largest = row.topk(top).indices.tolist()
            return {Letters().decode([one]): float(row[one]) for one in [*largest, chosen]}

        return {
            "tokens": [Letters().decode([token]) for token in tokens],
            "token_logprobs": [float(row[token]) for row, token in zip(scores, tokens, strict=True)],
            "top_logprobs": [by_text(row, token) for row, token in zip(scores, tokens, strict=True)],
            "text_offset": list(range(len(tokens))),
        }

    async def _stream(self, ids: list[int], body: dict[str, Any]) -> AsyncIterator[str]:
        random = torch.Generator().manual_seed(body["seed"]) if "seed" in body else torch.default_generator
        written, text, sent, stops = 0, "", 0, body.get("stop", [])
        held_back = max((len(stop) - 1 for stop in stops), default=0)
        hidden = self.special if body.get("skip_special_tokens", True) else ""
        breaks_after = 1 if self.breaks else None
        self.breaks = max(0, self.breaks - 1)
        for _ in range(body["max_tokens"]):
            if written == self.dies_after:
                self.is_dead = True
                raise ConnectionError("killed")
            if written == breaks_after:
                raise ConnectionError("reset")
            await asyncio.sleep(self.latency)
            scores = self._log_probs(ids)[-1]
            temperature = body["temperature"]
            top_k = body.get("top_k", self.default_top_k)
            if top_k > 0:
                scores = scores.masked_fill(scores < scores.topk(min(top_k, len(scores))).values[-1], -float("inf"))
            token = (
                int(scores.argmax())
                if not temperature
                else int(torch.multinomial((scores / temperature).softmax(0), 1, generator=random))
            )
            ids, written = [*ids, token], written + 1
            reason = "stop" if token == Letters.eos else "length" if written == body["max_tokens"] else None
            letter = "" if token == Letters.eos else Letters().decode([token])
            text += "" if letter in hidden else letter
            found = [place for place in map(text.find, stops) if place >= 0]
            if found:
                text, reason = text[: min(found)], "stop"
            new = text[sent : len(text) if reason else max(sent, len(text) - held_back)]
            sent += len(new)
            log_probs = self._logprobs(scores[None], [token], body["logprobs"]) if "logprobs" in body else None
            yield self._event([{"index": 0, "text": new, "logprobs": log_probs, "finish_reason": reason}])
            if reason == "stop":
                break
        yield self._event([], usage={"prompt_tokens": 0, "completion_tokens": written})
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[Any], **more: Any) -> str:
        chunk = {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": choices, **more}
        return f"data: {json.dumps(chunk)}\n\n"

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeVllm]:
        """Serve on a free port."""
        listener = bind("127.0.0.1", 0)
        self.url = f"{url_of(listener)}/v1"
        app = Starlette(routes=[Route("/v1/completions", self.completions, methods=["POST"])])
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join()
