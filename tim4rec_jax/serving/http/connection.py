"""A connection with limits, so that no client can starve the others.

uvicorn trusts clients to be quick and modest. What is added here are limits of time for headers,
bodies and the reading of answers, limits of length, a limit of connections, and the `Admission` of
requests: the application is called when a request has arrived whole and its turn has come.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from tim4rec_jax.serving.http.admission import (
    USUAL_SECONDS,
    Admission,
    Room,
    address_of,
    greed_after,
)
from tim4rec_jax.serving.http.answers import BUSY, Answer, refusal
from tim4rec_jax.serving.http.metrics import Metrics
from tim4rec_jax.serving.http.schema import MAX_BODY

# In seconds: from the connection or the first byte to the last header, from there to the last byte
# of the body, from an answer to the next request, and for which a client may not read its answer.
_HEAD_SECONDS, _BODY_SECONDS, IDLE_SECONDS, _STALLED_SECONDS = 10, 20, 60, 30
_LAST_SECONDS = 1  # in which the client of a refused request can read why
_MAX_URL, _MAX_HEAD, _MAX_HEADERS = 8 << 10, 32 << 10, 100  # in bytes, bytes, and number
_MAX_AHEAD = 32  # requests that a client may send before it has got the first answer
MAX_CONNECTIONS = 4096
# Clients that ask for HTTP/2 in this header (Java, curl --http2) go on with HTTP/1.1. The parser
# would take their body, and all later requests, for the other protocol's. A JSON text cannot hold
# it, because it has no end of a line before a word.
_UPGRADE = re.compile(rb"(\r\n)upgrade:", re.IGNORECASE)
_LONG_HEAD = 431, "too_large", f"a request may have {_MAX_HEADERS} headers of {_MAX_HEAD:,} bytes"
_LONG_BODY = 413, "too_large", f"a request may have {MAX_BODY:,} bytes"
_AHEAD = 503, "unavailable", f"more than {_MAX_AHEAD} requests wait on this connection"


class Connection(HttpToolsProtocol):
    """A connection with limits.

    Attributes:
        address: what stands for the client among all clients.
        half_closed: whether the client sends no more; it may have left, or may wait for answers.
        greed: which share of its time the client waits for answers, `None` before the first one;
            see `Admission`.
    """

    # Until when the client must have gone on; `None` while the service has its turn.
    deadline: float | None = None
    # Whether a part of the headers, or all of them and a part of the body, has arrived.
    in_head = in_body = False
    head_bytes = 0
    excess: tuple[int, str, str] | None = None  # what is too long about the request
    refused = False
    half_closed = False
    unread_since: float | None = None  # since when the client has not read its answer
    address = ""
    greed: float | None = None
    # When the request that is answered had arrived, and when the one before was answered.
    asked = answered = 0.0
    # The request to be answered next, and whether only a part of it has arrived.
    _current: RequestResponseCycle | None = None
    _incomplete = False

    def __init__(self, admission: Admission, metrics: Metrics, *args: Any, **kwargs: Any):
        """Prepares a connection.

        Args:
            admission: decides whose turn it is.
            metrics: counts the requests that do not get as far as the application.
            *args: see `HttpToolsProtocol`.
            **kwargs: likewise.
        """
        super().__init__(*args, **kwargs)
        self.admission, self.metrics = admission, metrics

    def connection_made(self, transport: Any) -> None:
        """Waits for a request; where there are too many connections, another one is ended."""
        super().connection_made(transport)
        self.address = address_of(self.client[0]) if self.client else ""
        self.answered = self.loop.time()
        self.deadline = self.answered + _HEAD_SECONDS
        if len(self.connections) > MAX_CONNECTIONS:
            connections: set[Any] = self.connections
            waiting = [one for one in connections if one.deadline is not None]
            # The one whose client had to go on first.
            min(waiting, key=lambda one: one.deadline).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Lets go of the last request."""
        super().connection_lost(exc)
        # A cycle of references would stay until Python searches all objects for such cycles. That
        # takes milliseconds, in which nobody is answered.
        self.pipeline.clear()
        self.cycle = self.scope = self._current = None  # type: ignore[assignment]

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more, but may still read: what has arrived whole is answered."""
        self.half_closed = True
        if (self.in_head or self.in_body) and not self.refused:
            self.refuse(400, "invalid_request", "the request ended before it was whole")
            return True
        last = self._last()
        if last is not None:
            last.keep_alive = False
        return last is not None

    def _last(self) -> RequestResponseCycle | None:
        """The last request that has arrived whole, if it is not answered yet."""
        last = self.pipeline[0][0] if self.pipeline else self._current
        return None if last is None or last.response_complete or self._incomplete else last

    def data_received(self, data: bytes) -> None:
        """Takes a part of a request."""
        if self.refused:
            return
        if b"pgrade" in data:
            data = _UPGRADE.sub(rb"\1x-asked:", data)
        super().data_received(data)
        if self.in_head:
            self.head_bytes += len(data)
            if self.head_bytes > _MAX_HEAD:
                self.refuse(*_LONG_HEAD)

    def on_message_begin(self) -> None:
        """A request begins."""
        if self.refused:
            raise ConnectionError  # ends the parsing of what has arrived
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
        """All headers have arrived."""
        self.in_head, self.in_body = False, True
        if len(self.pipeline) >= _MAX_AHEAD:
            self.excess = self.excess or _AHEAD
        length = next((value for name, value in self.headers if name == b"content-length"), b"0")
        if len(length) > 18 or int(length) > MAX_BODY:
            self.excess = self.excess or _LONG_BODY
        if self.excess:
            self.refuse(*self.excess)
            return
        self.deadline = self.loop.time() + _BODY_SECONDS
        super().on_headers_complete()
        self.scope["tim4rec.connection"] = self  # type: ignore[typeddict-unknown-key]
        if self.expect_100_continue and not self.pipeline:
            self.cycle.waiting_for_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Is called when the answers to all earlier requests are written."""
        del app
        self._current, self._incomplete = cycle, cycle.more_body
        if not self._incomplete:
            self._enter(cycle)

    def on_body(self, body: bytes) -> None:
        """A part of the body has arrived."""
        if not self.refused:
            self.cycle.body += body
            if len(self.cycle.body) > MAX_BODY:
                self.refuse(*_LONG_BODY)

    def on_message_complete(self) -> None:
        """The whole request has arrived."""
        self.in_body, self.deadline = False, None
        if not self.refused:
            super().on_message_complete()
            if self._incomplete and not self.cycle.more_body:
                self._incomplete = False
                self._enter(self.cycle)

    def _enter(self, cycle: RequestResponseCycle) -> None:
        self.asked = self.loop.time()
        self.admission.room(cycle.scope["path"]).enter(self, cycle)

    def start(self, cycle: RequestResponseCycle, room: Room) -> None:
        """Calls the application for a request, whose room is left in the end."""

        def done(task: asyncio.Task) -> None:
            self.tasks.discard(task)
            room.leave(self)

        app: Any = self.app
        task = self.loop.create_task(cycle.run_asgi(app))
        self.tasks.add(task)
        task.add_done_callback(done)

    def busy(self, cycle: RequestResponseCycle, room: Room) -> None:
        """Answers that there is no time for a request."""
        now = self.loop.time()
        self.metrics.request(room.name, BUSY.status, now - self.asked)
        # That the refusal was held back does not make the client greedy.
        self.greed = greed_after(self.greed, USUAL_SECONDS, self.asked - self.answered)
        self.asked = now
        if cycle is self._current:
            self.respond(BUSY)

    def respond(self, answer: Answer) -> None:
        """Writes an answer at once, which takes a third of the time of ASGI's two messages."""
        cycle = self._current
        if cycle is None or cycle.disconnected or self.transport.is_closing():
            return
        headers = [*cycle.default_headers]
        if not cycle.keep_alive:
            headers.append((b"connection", b"close"))
        body = b"" if cycle.scope["method"] == "HEAD" else answer.body
        self.transport.write(_bytes(answer, headers, body))
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()

    def on_response_complete(self) -> None:
        """The answer is written."""
        now = self.loop.time()
        if now > self.asked:
            self.greed = greed_after(self.greed, now - self.asked, self.asked - self.answered)
        self.answered = now
        super().on_response_complete()
        assert self._current is not None
        if self._current.response_complete and not (self.in_head or self.in_body):
            self.deadline = now + IDLE_SECONDS

    def is_alive(self) -> bool:
        """Whether somebody waits for the answer."""
        return not self.transport.is_closing()

    def check_time(self, now: float) -> None:
        """Ends the connection if its client is too slow, in writing or in reading."""
        if self.deadline is not None and now > self.deadline:
            if self.in_head or self.in_body:
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

    def _unsupported_upgrade_warning(self) -> None:
        """The parser has stopped, because the request asks for another protocol."""
        self.refuse(400, "invalid_request", "send the request without the header Upgrade")

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP."""
        self.refuse(400, "invalid_request", msg)

    def refuse(self, status: int, kind: str, message: str) -> None:
        """Ends the connection with an error, or after the answers to earlier requests."""
        if self.refused:
            return
        self.refused, self.deadline = True, None
        if self.pipeline and self.pipeline[0][0].more_body:  # this is what is refused
            self.pipeline.popleft()
        if last := self._last():
            last.keep_alive = False
            return
        answer = refusal(status, kind, message)
        self.transport.write(_bytes(answer, [(b"connection", b"close")], answer.body))
        # What the client still sends is not read but thrown away. To close at once could make it
        # lose the answer.
        self.transport.write_eof()
        self.loop.call_later(_LAST_SECONDS, self.transport.abort)


def _bytes(answer: Answer, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    lines = [b"%b: %b\r\n" % header for header in (*answer.all_headers(), *headers)]
    return b"".join([STATUS_LINE[answer.status], *lines, b"\r\n", body])
