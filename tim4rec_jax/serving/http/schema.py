"""The requests and the answers of the HTTP service."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_EVENTS = 10_000  # in a history, or in one request to /events
MAX_IDS = 100_000  # in `allow` and in `deny`

Id = Annotated[str, Field(min_length=1, max_length=256)]
Time = Annotated[int, Field(ge=0, lt=1 << 40, description="whole seconds since 1970")]


class _Request(BaseModel):
    # A number is an id too: its digits.
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class RecommendRequest(_Request):
    """A history (`items` and `timestamps`), or a `user` whose events the service was told."""

    user: Id | None = None
    items: Annotated[list[Id], Field(max_length=MAX_EVENTS)] | None = None
    timestamps: Annotated[list[Time], Field(max_length=MAX_EVENTS)] | None = None
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    at: Time | None = Field(None, description="when they are shown, for a model that knows it")
    exclude_seen: bool = True
    allow: Annotated[list[Id], Field(max_length=MAX_IDS)] | None = None
    deny: Annotated[list[Id], Field(max_length=MAX_IDS)] | None = None
    sort: bool = Field(False, description="sort the history by time; otherwise it must be sorted")

    @model_validator(mode="after")
    def _either(self):
        if (self.user is None) == (self.items is None):
            raise ValueError("name either a user, or items and timestamps")
        if self.user is not None and (self.timestamps is not None or self.sort):
            raise ValueError("timestamps and sort belong to items, not to a user")
        if self.items is not None and len(self.items) != len(self.timestamps or []):
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

    events: Annotated[list[Event], Field(min_length=1, max_length=MAX_EVENTS)]
    sort: bool = Field(False, description="put events before a user's last one where they belong")


class EventsAnswer(BaseModel):
    """How many events were taken, and how many skipped because nobody knows their item."""

    known: int
    unknown: int


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


class Error(BaseModel):
    """What went wrong; `field` names the part of the request where there is one."""

    type: Literal[
        "invalid_request", "refused", "too_large", "not_found", "method_not_allowed", "internal"
    ]
    message: str
    field: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: Error


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (404, 405, 413, 422, 500)
}
