"""What every request passes first: host, token, length of the body. All are counted and timed.

The few requests that make most of the load are answered here, without FastAPI. It describes them,
but its way to them takes longer than the rest of the work of the event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tim4rec_jax.serving.http.answers import ENDING, Answer, TooLarge, answer_to, refusal
from tim4rec_jax.serving.http.metrics import Metrics
from tim4rec_jax.serving.http.micro_batcher import ClientLeft

_OPEN = ("/", "/health", "/ready")  # answered without a token: they tell nothing about users

# Answers a request, given its scope and a function that reads its body.
Endpoint = Callable[[Scope, Callable[[], Awaitable[bytes]]], Awaitable[Answer]]


class Guard:
    """Refuses requests before anything is computed for them, and counts all."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        max_body: int,
        token: str | None,
        hosts: Collection[str] | None,
        endpoints: Mapping[tuple[str, str], Endpoint],
    ):
        """Wraps an application.

        Args:
            app: the application.
            metrics: counts the requests.
            max_body: how many bytes a request may have.
            token: what callers must send as bearer token; `None` asks for none.
            hosts: the names that callers may use for the service, without ports; `None` allows all.
            endpoints: by method and path, what is answered without the application.
        """
        self.app, self.metrics, self.max_body = app, metrics, max_body
        self.endpoints = endpoints
        self.expected = None if token is None else b"Bearer " + token.encode()
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, received, status = time.perf_counter(), 0, 500
        path = scope["path"]
        endpoint = self.endpoints.get((scope["method"], path))

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
            answer = self._refusal(scope)
            if answer is None and endpoint:
                try:
                    answer = await endpoint(scope, lambda: _body(limited))
                except Exception as error:
                    answer = answer_to(error)
                except asyncio.CancelledError:  # the service ends and has waited long enough
                    answer = ENDING
            if answer is None:
                await self.app(scope, limited, watched)
            else:
                status = answer.status
                await _send(answer, scope, send)
        finally:
            if not endpoint:  # a path that somebody made up would be a metric of its own
                path = getattr(scope.get("route"), "path", "other")
            self.metrics.request(path, status, time.perf_counter() - start)

    def _refusal(self, scope: Scope) -> Answer | None:
        """The refusal of a request, if there is a reason for one."""
        raw_path = scope.get("raw_path") or b""
        if b"%" in raw_path and not _is_utf8(unquote_to_bytes(raw_path)):
            # Otherwise it would stand for another address, with marks in the place of these bytes.
            return refusal(400, "invalid_request", "the address is no UTF-8")
        headers = dict(scope["headers"])  # of several with one name, the last
        host = headers.get(b"host")
        if sum(name == b"host" for name, _ in scope["headers"]) > 1:
            return refusal(400, "invalid_request", "the header Host is there twice")
        if host is None:
            if scope["http_version"] != "1.0":
                return refusal(400, "invalid_request", "the header Host is missing")
        elif self.hosts is not None and _host(host) not in self.hosts:
            return refusal(400, "invalid_request", "this service has another host name")
        if self.expected is not None and scope["path"] not in _OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                message = "send the header Authorization: Bearer with the token of the service"
                answer = refusal(401, "unauthorized", message)
                return answer._replace(headers=[(b"www-authenticate", b"Bearer")])
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_body:
            return answer_to(TooLarge(self.max_body))
        return None


def _host(header: bytes) -> str:
    """The name in a Host header, without its port."""
    text = header.decode("latin-1").lower()
    name, colon, port = text.rpartition(":")
    return name if colon and port.isdigit() else text


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


async def _body(receive: Receive) -> bytes:
    message = await receive()
    parts = [message.get("body", b"")]
    while message.get("more_body"):
        message = await receive()
        parts.append(message.get("body", b""))
    if message["type"] == "http.disconnect":
        raise ClientLeft
    return b"".join(parts)


async def _send(answer: Answer, scope: Scope, send: Send) -> None:
    """Sends an answer, through the connection itself where it is one of ours."""
    if connection := scope.get("tim4rec.connection"):
        await connection.flow.drain()
        connection.respond(answer)
        return
    headers = answer.all_headers()
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})
