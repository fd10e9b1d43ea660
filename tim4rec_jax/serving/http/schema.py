"""The requests and the answers of the HTTP service."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema, model_validator
from pydantic_core import core_schema

from tim4rec_jax.serving.history import LAST_SECOND

MAX_BODY = 1 << 20  # bytes of a request
MAX_EVENTS = 10_000  # in a history, or in one request to /events
MAX_IDS = 100_000  # in `allow` and in `deny`

# A number is an id too: its digits.
Id = Annotated[
    str | int,
    GetPydanticSchema(
        lambda source, handler: core_schema.union_schema(
            [
                core_schema.str_schema(strict=True, min_length=1, max_length=256),
                core_schema.int_schema(strict=True, ge=-(1 << 63), lt=1 << 63),
            ],
            mode="left_to_right",
            custom_error_type="id",
            custom_error_message="an id is a text of 1 to 256 characters or a whole number",
        )
    ),
]
Time = Annotated[
    int, Field(ge=0, le=LAST_SECOND, description="whole seconds since 1970, not milliseconds")
]


class _Request(BaseModel):
    # `true` is no number, and "5" is none.
    model_config = ConfigDict(extra="forbid", strict=True)


class RecommendRequest(_Request):
    """A history (`items` and `timestamps`), or a `user` whose events the service was told."""

    user: Id | None = None
    items: Annotated[list[Id], Field(max_length=MAX_EVENTS, fail_fast=True)] | None = None
    timestamps: Annotated[list[Time], Field(max_length=MAX_EVENTS, fail_fast=True)] | None = None
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    at: Time | None = Field(None, description="when they are shown, for a model that knows it")
    exclude_seen: bool = True
    allow: Annotated[list[Id], Field(max_length=MAX_IDS, fail_fast=True)] | None = None
    deny: Annotated[list[Id], Field(max_length=MAX_IDS, fail_fast=True)] | None = None
    sort: bool = Field(False, description="sort the history by time; otherwise it must be sorted")

    @model_validator(mode="after")
    def _either(self):
        if (self.user is None) == (self.items is None):
            raise ValueError("name either a user, or items and timestamps")
        if self.user is not None and (self.timestamps is not None or self.sort):
            raise ValueError("timestamps and sort belong to items, not to a user")
        if self.items is not None and (
            self.timestamps is None or len(self.items) != len(self.timestamps)
        ):
            raise ValueError("items and timestamps must be lists of the same length")
        return self


class Recommended(BaseModel):
    """One recommendation."""

    item: str
    title: str | None
    score: float


class RecommendAnswer(BaseModel):
    """Recommendations, best first."""

    items: list[Recommended]
    unknown: int = Field(description="events left out: the model does not know their items")
    fallback: bool = Field(description="no event was known: the most popular items, by count")


class Event(_Request):
    """A user did something with an item."""

    user: Id
    item: Id
    timestamp: Time


class EventsRequest(_Request):
    """Events to remember, those of one user in order of time."""

    events: Annotated[list[Event], Field(min_length=1, max_length=MAX_EVENTS, fail_fast=True)]
    sort: bool = Field(False, description="put events before a user's last one where they belong")


class EventsAnswer(BaseModel):
    """How many events were taken, and how many skipped because nobody knows their item."""

    known: int
    unknown: int


class DeleteAnswer(BaseModel):
    """Whether the service knew the user. It does not now."""

    deleted: bool


class ReloadRequest(_Request):
    """Nothing: the run folder is the one that the service was started with."""


class ReloadAnswer(BaseModel):
    """How many items the run has that answers from now on."""

    items: int


class Item(BaseModel):
    """An item of the catalogue."""

    item: str
    title: str | None
    count: int = Field(description="events in the training data")


class Health(BaseModel):
    """That the service is up, and what it serves."""

    status: Literal["ok"] = "ok"
    dataset: str
    items: int
    max_length: int
    streaming: bool
    knows_next_time: bool


class Ready(BaseModel):
    """That requests are answered now."""

    status: Literal["ready"] = "ready"


class Error(BaseModel):
    """What went wrong; `field` names the part of the request where there is one."""

    type: Literal[
        "invalid_request",
        "refused",
        "unauthorized",
        "forbidden",
        "not_found",
        "method_not_allowed",
        "conflict",
        "too_slow",
        "too_large",
        "unsupported_media_type",
        "internal",
        "unavailable",
    ]
    message: str
    field: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: Error


def error_body(kind: Any, message: str, field: str | None = None) -> bytes:
    """The JSON of an error."""
    error = Error(type=kind, message=message, field=field)
    return ErrorBody(error=error).model_dump_json().encode()


_DESCRIPTIONS = {
    400: "not HTTP, or for another host",
    401: "without the token that the service was started with",
    403: "not without a token that the service was started with",
    404: "no such path",
    405: "not with this method; the header Allow names those that there are",
    409: "the run cannot take the place of the one that is served; the message says why",
    408: "the request took too long to arrive",
    413: "the body is too long",
    414: "the address is too long",
    415: "the body is not declared as JSON",
    422: "the request makes no sense, or the model or the store refuses it",
    431: "the headers are too long",
    500: "a fault of the service; its log says more",
    503: "too busy, or the store cannot be used; the header Retry-After says when to ask again",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _DESCRIPTIONS.items()
}
