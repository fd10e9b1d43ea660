"""A connection with limits, so that no client can starve the others.

uvicorn trusts clients to be quick and modest. What is added here are limits of time for headers,
bodies and the reading of answers, limits of length for headers and addresses, and a limit of
connections.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tim4rec_jax.serving.http.guard import RETRY_AFTER
from tim4rec_jax.serving.http.schema import error_body

# In seconds: from the connection or the first byte to the last header, from there to the last byte
# of the body, from an answer to the next request, and for which a client may not read its answer.
_HEAD_SECONDS, _BODY_SECONDS, IDLE_SECONDS, _STALLED_SECONDS = 10, 20, 60, 30
_MAX_URL, _MAX_HEAD, _MAX_HEADERS = 8 << 10, 32 << 10, 100  # in bytes, bytes, and number
MAX_CONNECTIONS = 4096
_LONG_HEAD = 431, "too_large", f"a request may have {_MAX_HEADERS} headers of {_MAX_HEAD:,} bytes"


class Connection(HttpToolsProtocol):
    """A connection with limits."""

    # Until when the client must have gone on; `None` while the service has its turn.
    deadline: float | None = None
    # Whether a part of the headers, or all of them and a part of the body, has arrived.
    in_head = in_body = False
    head_bytes = 0
    excess: tuple[int, str, str] | None = None  # what is too long about the request
    refused = False
    unread_since: float | None = None  # since when the client has not read its answer

    def connection_made(self, transport: Any) -> None:
        """Waits for a request; where there are too many connections, another one is ended."""
        super().connection_made(transport)
        self.deadline = self.loop.time() + _HEAD_SECONDS
        if len(self.connections) > MAX_CONNECTIONS:
            connections: set[Any] = self.connections
            waiting = [one for one in connections if one.deadline is not None]
            # The one whose client had to go on first.
            min(waiting, key=lambda one: one.deadline).transport.abort()

    def data_received(self, data: bytes) -> None:
        """Takes a part of a request."""
        if self.refused:
            return
        super().data_received(data)
        if self.in_head:
            self.head_bytes += len(data)
            if self.head_bytes > _MAX_HEAD:
                self.refuse(*_LONG_HEAD)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.in_head, self.head_bytes, self.excess = True, 0, None
        self.deadline = self.loop.time() + _HEAD_SECONDS

    def on_url(self, url: bytes) -> None:
        """A part of the address has arrived."""
        super().on_url(url)
        if len(self.url) > _MAX_URL:
            self.excess = 414, "too_large", f"an address may have {_MAX_URL:,} bytes"

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header has arrived."""
        super().on_header(name, value)
        self.head_bytes += len(name) + len(value)
        if self.head_bytes > _MAX_HEAD or len(self.headers) > _MAX_HEADERS:
            self.excess = self.excess or _LONG_HEAD

    def on_headers_complete(self) -> None:
        """All headers have arrived, so the application is called."""
        self.in_head, self.in_body = False, True
        if self.excess:
            self.refuse(*self.excess)
            return
        self.deadline = self.loop.time() + _BODY_SECONDS
        self.scope["tim4rec.alive"] = self.is_alive  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body has arrived."""
        if not self.refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request has arrived."""
        self.in_body, self.deadline = False, None
        if not self.refused:
            super().on_message_complete()
            if self.cycle.response_complete:  # the answer did not wait for the body
                self.deadline = self.loop.time() + IDLE_SECONDS

    def on_response_complete(self) -> None:
        """The answer is written."""
        super().on_response_complete()
        if not (self.in_head or self.in_body):
            self.deadline = self.loop.time() + IDLE_SECONDS

    def is_alive(self) -> bool:
        """Whether somebody waits for the answer."""
        return not self.transport.is_closing()

    def check_time(self, now: float) -> None:
        """Ends the connection if its client is too slow, in writing or in reading."""
        if self.deadline is not None and now > self.deadline:
            if self.refused:
                self.transport.abort()
            elif self.in_head or self.in_body:
                self.refuse(408, "too_slow", "the request took too long to arrive")
            else:
                self.transport.close()
        if self.transport.get_write_buffer_size() == 0:
            self.unread_since = None
        elif self.unread_since is None:
            self.unread_since = now
        elif now - self.unread_since > _STALLED_SECONDS:
            self.transport.abort()

    def shutdown(self) -> None:
        """Ends the connection, after the answer to a request that has arrived whole."""
        if self.in_head or self.in_body:
            self.refuse(503, "unavailable", "the service is ending")
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP."""
        self.refuse(400, "invalid_request", msg)

    def refuse(self, status: int, kind: str, message: str) -> None:
        """Ends the connection with an error, unless an answer to another request is under way."""
        if self.refused:
            return
        self.refused, self.deadline = True, self.loop.time() + 1
        cycle = self.cycle
        if (
            cycle is None
            or cycle.response_complete
            or (self.in_body and not cycle.response_started)
        ):
            body = error_body(kind, message)
            head = (
                b"content-type: application/json\r\nx-content-type-options: nosniff\r\n"
                b"connection: close\r\nretry-after: %d\r\ncontent-length: %d\r\n\r\n"
            )
            self.transport.write(STATUS_LINE[status] + head % (RETRY_AFTER, len(body)) + body)
        self.transport.close()
