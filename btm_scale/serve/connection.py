"""A connection that ends if its client stalls: it sends no request, or does not read the answer.

One whose client only stops sending stays until the answer is complete.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

STALLED_SECONDS = 60.0
_PROBE_SECONDS = (0.01, 1.0)  # the first and the longest wait between probes; doubled each time


class Connection(H11Protocol):
    """uvicorn's connection, with time limits that uvicorn lacks. The limit on a body is in `read_body`."""

    seconds = STALLED_SECONDS
    _head: asyncio.TimerHandle | None = None  # until the head of a request is complete
    _unread: asyncio.TimerHandle | None = None  # until the client reads
    _probe: asyncio.TimerHandle | None = None  # while the client may have left
    _is_half_closed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the head of a request."""
        super().connection_made(transport)
        self._head = self._abort_later()

    def data_received(self, data: bytes) -> None:
        """Pass data on; a head that comes in pieces must be complete in time, however many there are."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting_for_head()
        elif self._head is None:
            self._head = self._abort_later()

    def on_response_complete(self) -> None:
        """Stop waiting: between two requests, uvicorn's time limit applies."""
        self._stop_waiting_for_head()
        super().on_response_complete()  # begins the next request, if the client has sent it already
        if self._is_half_closed and self.cycle.response_complete:
            self.transport.close()
        elif self._is_half_closed:
            self._send_probe(_PROBE_SECONDS[0])

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays: a client that waits for its answer need not send any more."""
        waits = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        # Without HTTP/1.1 nothing can be sent that shows whether the client has left, and most have.
        self._is_half_closed = waits and self.conn.their_http_version == b"1.1"
        if self._is_half_closed:
            self._send_probe(_PROBE_SECONDS[0])
        return self._is_half_closed

    def _send_probe(self, wait: float) -> None:
        """Until the answer begins, send what clients skip: one that has left answers with a reset."""
        if self._probe is not None:
            self._probe.cancel()
        if not (self.cycle.response_started or self.transport.is_closing()):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._probe = self.loop.call_later(wait, self._send_probe, min(2 * wait, _PROBE_SECONDS[1]))

    def pause_writing(self) -> None:
        """Wait for the client, whose buffers are full."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self._abort_later()

    def resume_writing(self) -> None:
        """Continue to write."""
        self._stop_waiting_for_client()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._stop_waiting_for_head()
        self._stop_waiting_for_client()
        if self._probe is not None:
            self._probe.cancel()
        super().connection_lost(exc)

    def _abort_later(self) -> asyncio.TimerHandle:
        # Not `close`, which would wait until the client has read everything.
        return self.loop.call_later(self.seconds, self.transport.abort)

    def _stop_waiting_for_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _stop_waiting_for_client(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
