"""An engine that answers every request after 50 milliseconds, for the proxy's overhead in serve.py.

python benchmarks/serve_engine.py PORT

It is bare, because its own time per request would count as the proxy's: all experts ask it at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

SECONDS = 0.05


class Engine(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._received = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answer a request, once it is complete."""
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if len(body) < sum(map(int, lengths)):
            return
        self._received = b""
        loop = asyncio.get_running_loop()
        if not body:
            self._transport.write(_response(b"{}"))
        elif (request := json.loads(body)).get("stream"):
            loop.call_later(SECONDS, self._stream, request["max_tokens"])
        else:
            loop.call_later(SECONDS, self._transport.write, _response(_scores(request["prompt"])))

    def _stream(self, tokens: int, written: int = 0) -> None:
        """Write one event after another, as vLLM does."""
        if written == 0:
            self._transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        if written < tokens:
            reason = "length" if written == tokens - 1 else None
            self._write({"choices": [{"index": 0, "text": "x", "finish_reason": reason}]})
            asyncio.get_running_loop().call_soon(self._stream, tokens, written + 1)
        else:
            self._write({"choices": [], "usage": {"completion_tokens": tokens}})
            self._transport.write(_chunk(b"data: [DONE]\n\n") + _chunk(b""))

    def _write(self, event: Any) -> None:
        self._transport.write(_chunk(b"data: %s\n\n" % json.dumps(event).encode()))


def _scores(prompt: list[int]) -> bytes:
    rows = [None, *({str(token): {"logprob": -1.0, "rank": 1, "decoded_token": "x"}} for token in prompt[1:])]
    choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": rows}
    return json.dumps({"choices": [choice]}).encode()


def _response(content: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content


def _chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


async def main(port: int) -> None:
    """Serve until the process ends."""
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
