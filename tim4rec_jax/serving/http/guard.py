"""What every request passes first: host, token, load, length of the body; counted and timed."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tim4rec_jax.serving.http.metrics import Metrics
from tim4rec_jax.serving.http.schema import error_body

RETRY_AFTER = 1  # seconds
_BUSY_SECONDS = 0.5  # how long a refusal for want of time is held back
_OPEN = ("/", "/health", "/ready")  # answered without a token: they tell nothing about users


class TooLarge(Exception):
    """The body is longer than the service takes."""

    def __init__(self, max_body: int):
        super().__init__(f"a request may have {max_body:,} bytes")


class Guard:
    """Refuses requests before anything is computed for them, and counts all."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        max_body: int,
        token: str | None,
        hosts: Collection[str] | None,
        busy: Callable[[str], bool],
    ):
        """Wraps an application.

        Args:
            app: the application.
            metrics: counts the requests.
            max_body: how many bytes a request may have.
            token: what callers must send as bearer token; `None` asks for none.
            hosts: the names that callers may use for the service, without ports; `None` allows all.
            busy: whether a request to this path would have to be refused for want of time.
        """
        self.app, self.metrics, self.max_body, self.busy = app, metrics, max_body, busy
        self.expected = None if token is None else b"Bearer " + token.encode()
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, received, status = time.perf_counter(), 0, 500

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body:
                raise TooLarge(self.max_body)
            return message

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            if refusal := self._refusal(scope):
                if refusal is BUSY:
                    # Clients that ask again at once would take the time of all others.
                    await asyncio.sleep(_BUSY_SECONDS)
                await _answer(watched, *refusal)
            else:
                await self.app(scope, limited, watched)
        finally:
            # A path that somebody made up would be a metric of its own.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.request(path, status, time.perf_counter() - start)

    def _refusal(self, scope: Scope) -> tuple | None:
        """Status, body and headers of a refusal, if there is a reason for one."""
        headers = dict(scope["headers"])  # of several with one name, the last
        host = headers.get(b"host")
        if host is None:
            if scope["http_version"] != "1.0":
                return 400, error_body("invalid_request", "the header Host is missing")
        elif self.hosts is not None and _host(host) not in self.hosts:
            return 400, error_body("invalid_request", "this service has another host name")
        path = scope["path"]
        if self.expected is not None and path not in _OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                message = "send the header Authorization: Bearer with the token of the service"
                challenge = [(b"www-authenticate", b"Bearer")]
                return 401, error_body("unauthorized", message), challenge
        if self.busy(path):
            return BUSY
        if headers.get(b"content-length", b"0").isdigit() and (
            int(headers.get(b"content-length", b"0")[:20]) > self.max_body
        ):
            return 413, error_body("too_large", str(TooLarge(self.max_body)))
        return None


_LATER = [(b"retry-after", str(RETRY_AFTER).encode())]
BUSY = 503, error_body("unavailable", "the service is too busy; try again later"), _LATER


def _host(header: bytes) -> str:
    """The name in a Host header, without its port."""
    text = header.decode("latin-1").lower()
    name, colon, port = text.rpartition(":")
    return name if colon and port.isdigit() else text


async def _answer(send: Send, status: int, body: bytes, headers=()) -> None:
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    start = {"type": "http.response.start", "status": status, "headers": [*fixed, *headers]}
    await send(start)
    await send({"type": "http.response.body", "body": body})
