"""Answers as bytes, among them the answer to each kind of error."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.http.micro_batcher import ClientLeft, Overloaded
from tim4rec_jax.serving.http.schema import error_body
from tim4rec_jax.serving.stores import StoreError

RETRY_AFTER = 1  # seconds
_LATER = ((b"retry-after", str(RETRY_AFTER).encode()),)
_KINDS = {
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
}
_log = logging.getLogger("uvicorn.error")


class TooLarge(Exception):
    """The body is longer than the service takes."""

    def __init__(self, max_body: int):
        super().__init__(f"a request may have {max_body:,} bytes")


class Answer(NamedTuple):
    """An answer whose body is JSON.

    Attributes:
        status: the status code.
        body: the JSON.
        headers: those besides the type and the length of the body; names are in lower case.
    """

    status: int
    body: bytes
    headers: Sequence[tuple[bytes, bytes]] = ()

    def all_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers, with the type and the length of the body."""
        return [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(self.body)),
            (b"x-content-type-options", b"nosniff"),
            *self.headers,
        ]


def refusal(status: int, kind: str, message: str, field: str | None = None) -> Answer:
    """An answer with the body of `schema.ErrorBody`."""
    return Answer(status, error_body(kind, message, field), _LATER if status == 503 else ())


BUSY = refusal(503, "unavailable", "the service is too busy; try again later")
ENDING = refusal(503, "unavailable", "the service ends; try again later")


def answer_to(error: Exception) -> Answer:
    """The answer to a request that has raised an error."""
    match error:
        case RequestValidationError():
            wrong = error.errors()[0]  # its place begins with "query", "path" or the like
            return _wrong(wrong, wrong["loc"][1:])
        case ValidationError():
            quiet: Any = dict(include_url=False, include_input=False, include_context=False)
            wrong = error.errors(**quiet)[0]
            return _wrong(wrong, wrong["loc"])
        case StoreError():
            # The message has paths of this machine in it, which are the operator's business.
            _log.error("%s", error)
            message = "the store of users cannot be used now; nothing is wrong with the request"
            return refusal(503, "unavailable", message)
        case TooLarge():
            return refusal(413, "too_large", str(error))
        case UserError():
            return refusal(422, "refused", str(error))
        case Overloaded():
            return BUSY
        case ClientLeft() | ClientDisconnect():
            return Answer(499, b"")  # which nobody receives
        case HTTPException():
            kind = _KINDS.get(error.status_code, "invalid_request")
            answer = refusal(error.status_code, kind, error.detail)
            given = [(k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items()]
            return answer._replace(headers=[*answer.headers, *given])
        case _:
            _log.error("the service has failed", exc_info=error)
            return refusal(500, "internal", "the service has failed; its log says why")


def _wrong(error: Any, place: Sequence[str | int]) -> Answer:
    message = error["msg"].removeprefix("Value error, ")
    return refusal(422, "invalid_request", message, ".".join(map(str, place)) or None)
