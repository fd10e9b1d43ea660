"""The HTTP service as an application: what is asked, and what is answered.

`POST /recommend` takes a history or a user, `POST /events` tells what users did, `DELETE /users/ID`
forgets a user, `GET /items` looks items up, `GET /health`, `GET /ready` and `GET /metrics`
(Prometheus) say how the service is, and `/` is a page to try it by hand. `/openapi.json` holds the
schema of requests and answers.

The event loop reads and writes only. All work is done by a few threads, one for each kind, which
take what has arrived in batches (`micro_batcher.py`): so no kind of work can keep another waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Collection
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from pydantic_core import from_json, to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import tim4rec_jax
from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.http import schema
from tim4rec_jax.serving.http.guard import BUSY, RETRY_AFTER, Guard, TooLarge
from tim4rec_jax.serving.http.metrics import Metrics
from tim4rec_jax.serving.http.micro_batcher import Batcher, ClientLeft, Overloaded
from tim4rec_jax.serving.ranker import Query as RankerQuery
from tim4rec_jax.serving.recommender import Recommendations, Recommender
from tim4rec_jax.serving.stores import StoreError

MAX_BODY = 1 << 20  # bytes of a request
# A request of more bytes, or of more ids and events, is read and checked in a thread: the event
# loop would answer nobody else for so long.
_LARGE_BODY, _LARGE_REQUEST = 1 << 14, 500

_PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
_log = logging.getLogger("uvicorn.error")
_KINDS = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}


class Service:
    """The recommender that answers now, and the threads that work for it.

    Attributes:
        recommender: may be replaced at any time; what is being answered keeps the earlier one.
        metrics: the counters and histograms.
        answers: answers queries with the model.
        reads: reads users from the store.
        states: computes the states of users that the store does not keep.
        writes: stores events and deletes users.
        checks: reads and checks large requests.
        lookups: searches the catalogue.
    """

    def __init__(self, recommender: Recommender):
        self.recommender, self.metrics = recommender, Metrics()
        rows = min(64, recommender.model.max_rows)
        self.answers = Batcher(
            "answers",
            _answer,
            max_batch=rows,
            max_waiting=64,
            max_seconds=1.0,
            observe=self.metrics.batch.observe,
        )
        self.reads = Batcher("reads", _read, max_batch=16, max_waiting=128, max_seconds=1.0)
        self.states = Batcher("states", _states, max_batch=16, max_waiting=64, max_seconds=2.0)
        self.writes = Batcher("writes", _write, max_batch=64, max_waiting=256, max_seconds=2.0)
        self.checks = Batcher("checks", _call, max_batch=1, max_waiting=8, max_seconds=2.0)
        self.lookups = Batcher("lookups", _call, max_batch=1, max_waiting=16, max_seconds=1.0)

    @contextlib.asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """Works as long as the application runs."""
        del app
        batchers = [part for part in vars(self).values() if isinstance(part, Batcher)]
        tasks = [asyncio.create_task(batcher.run()) for batcher in batchers]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def busy(self, path: str) -> bool:
        """Whether a request to this path would be refused for want of time."""
        if path == "/recommend":
            return self.answers.full
        return path == "/events" and self.writes.full

    async def check(self, size: int, function: Callable[[], Any], alive: Callable[[], bool]) -> Any:
        """Calls a function, in a thread if `size`, the number of ids and events, is large."""
        return await self.checks(function, alive) if size > _LARGE_REQUEST else function()

    async def recommend(
        self, request: schema.RecommendRequest, alive: Callable[[], bool]
    ) -> tuple[Recommender, Recommendations]:
        """Answers a request, and says which recommender has answered it."""
        recommender = self.recommender
        filters: dict[str, Any] = dict(
            at=request.at,
            exclude_seen=request.exclude_seen,
            allow=request.allow,
            deny=request.deny,
        )
        size = len(request.items or ()) + len(request.allow or ()) + len(request.deny or ())
        if request.user is None:
            items, times = request.items or [], request.timestamps or []
            query = await self.check(
                size,
                lambda: recommender.query(items, times, request.k, sort=request.sort, **filters),
                alive,
            )
        else:
            user = str(request.user)
            events, state = await self.reads((recommender, user), alive)
            query = await self.check(
                size, lambda: recommender.ranker.query(events, request.k, **filters), alive
            )
            if recommender.model.supports_step and events.items.size:
                if state is None:
                    state = await self.states((recommender, user), alive)
                query = query._replace(hidden=recommender.model.hidden(state))
        found = await self.answers((recommender, query), alive)
        self.metrics.count(found)
        return recommender, found

    async def tell(self, request: schema.EventsRequest, alive: Callable[[], bool]) -> list[bool]:
        """Stores events, and says of each whether the model knows its item."""
        given = [(event.user, event.item, event.timestamp) for event in request.events]
        known = await self.writes(_Tell(self.recommender, given, request.sort), alive)
        self.metrics.events.labels("known").inc(sum(known))
        self.metrics.events.labels("unknown").inc(len(known) - sum(known))
        return known

    async def forget(self, user: str, alive: Callable[[], bool]) -> bool:
        """Deletes a user, and says whether there was one."""
        return await self.writes(_Forget(self.recommender, user), alive)


class _Tell(NamedTuple):
    recommender: Recommender
    events: list[tuple[Any, Any, int]]
    sort: bool


class _Forget(NamedTuple):
    recommender: Recommender
    user: str

    def __call__(self) -> bool:
        return self.recommender.delete_user(self.user)


def _answer(requests: list[tuple[Recommender, RankerQuery]]) -> list[Recommendations]:
    """Answers queries. Where a new run has just been loaded, there are two recommenders."""
    return _by_recommender(requests, lambda recommender, queries: recommender.answer(queries))


def _states(requests: list[tuple[Recommender, str]]) -> list[bytes]:
    return _by_recommender(requests, lambda recommender, users: recommender.compute_states(users))


def _by_recommender(requests: list[tuple[Recommender, Any]], function: Callable) -> list[Any]:
    results = []
    for _, group in itertools.groupby(requests, key=lambda request: id(request[0])):
        recommenders, members = zip(*group, strict=True)
        results += function(recommenders[0], members)
    return results


def _read(requests: list[tuple[Recommender, str]]) -> list[Any]:
    return [_attempt(partial(recommender.stored, user)) for recommender, user in requests]


def _write(requests: list[_Tell | _Forget]) -> list[Any]:
    """Does what is asked in this order; neighbours that tell events are stored together."""
    results: list[Any] = []
    for _, group in itertools.groupby(requests, key=lambda one: (type(one), id(one.recommender))):
        members: list[Any] = [*group]
        if isinstance(members[0], _Tell):
            told = [(member.events, member.sort) for member in members]
            stored = _attempt(partial(members[0].recommender.update_many, told))
            results += [stored] * len(members) if isinstance(stored, Exception) else stored
        else:
            results += [_attempt(member) for member in members]
    return results


def _call(functions: list[Callable[[], Any]]) -> list[Any]:
    return [_attempt(function) for function in functions]


def _attempt(function: Callable[[], Any]) -> Any:
    """The result of a function, or the exception that it has raised."""
    try:
        return function()
    except Exception as error:
        return error


class _JSONRoute(APIRoute):
    """Reads and checks a JSON body in a fourth of the time that FastAPI takes.

    FastAPI describes the route: its function takes the body and the request, and returns the JSON
    of the answer.
    """

    def get_route_handler(self) -> Callable[[Request], Any]:
        """See FastAPI's custom routes."""
        assert self.body_field is not None
        model, function = self.body_field.field_info.annotation, self.endpoint

        async def handle(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise HTTPException(415, "send JSON with the header Content-Type: application/json")
            body = await request.body()
            read = partial(_read_json, model, body)
            checks: Batcher = request.app.state.service.checks
            large = len(body) > _LARGE_BODY
            checked = await checks(read, _alive(request)) if large else read()
            content = await function(checked, request)
            return Response(to_json(content), media_type="application/json")

        return handle


def _read_json(model: Any, body: bytes) -> Any:
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(422, f"the body is no JSON: {error}"[:200]) from None
    return model.model_validate(content)


def _alive(request: Request) -> Callable[[], bool]:
    """Whether the client still waits; the server knows it (`server.py`)."""
    return request.scope.get("tim4rec.alive", lambda: True)


def create_app(
    recommender: Recommender,
    *,
    max_body: int = MAX_BODY,
    token: str | None = None,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """Makes the service around a recommender.

    Args:
        recommender: answers the requests; its store keeps what `/events` tells. To exchange it,
            set `app.state.service.recommender`.
        max_body: how many bytes a request may have; a longer one is answered with status 413.
        token: what callers must send as bearer token; `None` asks for none. The page, `/health`
            and `/ready` need none.
        hosts: the names that callers may use for the service; `None` allows all. Names keep web
            pages from reaching a service that only listens to its own machine.
    """
    service = Service(recommender)
    app = FastAPI(
        title="tim4rec-jax",
        version=tim4rec_jax.__version__,
        lifespan=service.running,
        docs_url=None,  # the pages of FastAPI load scripts from elsewhere
        redoc_url=None,
        responses=schema.ERRORS,
        # It only describes the token; the guard asks for it.
        dependencies=[] if token is None else [Depends(HTTPBearer(auto_error=False))],
    )
    app.state.service = service
    app.add_middleware(
        Guard,
        metrics=service.metrics,
        max_body=max_body,
        token=token,
        hosts=hosts,
        busy=service.busy,
    )
    _add_json_routes(app, service)
    _add_other_routes(app, service)
    _answer_errors(app)
    return app


def _add_json_routes(app: FastAPI, service: Service) -> None:
    async def recommend(body: schema.RecommendRequest, request: Request) -> schema.RecommendAnswer:
        recommender, found = await service.recommend(body, _alive(request))
        title = recommender.catalogue.title
        items = [
            {"item": item, "title": title(item), "score": score}
            for item, score in zip(found.items, found.scores, strict=True)
        ]
        content: Any = {"items": items, "unknown": found.unknown, "fallback": found.fallback}
        return content

    async def events(body: schema.EventsRequest, request: Request) -> schema.EventsAnswer:
        known = await service.tell(body, _alive(request))
        content: Any = {"known": sum(known), "unknown": len(known) - sum(known)}
        return content

    for path, function in (("/recommend", recommend), ("/events", events)):
        app.router.add_api_route(path, function, methods=["POST"], route_class_override=_JSONRoute)


def _add_other_routes(app: FastAPI, service: Service) -> None:
    @app.delete("/users/{user:path}")
    async def delete(
        user: Annotated[str, PathParameter(min_length=1, max_length=256)], request: Request
    ) -> schema.DeleteAnswer:
        return schema.DeleteAnswer(deleted=await service.forget(user, _alive(request)))

    @app.get("/items")
    async def items(
        request: Request,
        query: Annotated[str, Query(max_length=100)] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> list[schema.Item]:
        catalogue = service.recommender.catalogue
        found = await service.lookups(lambda: catalogue.search(query, limit), _alive(request))
        return [
            schema.Item(
                item=catalogue.ids[position],
                title=catalogue.title(catalogue.ids[position]),
                count=int(catalogue.counts[position]),
            )
            for position in found
        ]

    @app.get("/health")
    async def health() -> schema.Health:
        catalogue, model = service.recommender.catalogue, service.recommender.model
        return schema.Health(
            dataset=catalogue.metadata["name"],
            items=len(catalogue),
            max_length=model.max_length,
            streaming=model.supports_step,
            knows_next_time=model.knows_next_time,
        )

    @app.get("/ready")
    async def ready() -> schema.Ready:
        if service.answers.full or service.writes.full:
            raise Overloaded
        return schema.Ready()

    @app.get("/metrics", response_class=Response)
    async def scrape() -> Response:
        content = generate_latest(service.metrics.registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE, media_type="text/html", headers=_PAGE_HEADERS)


def _answer_errors(app: FastAPI) -> None:
    """Gives every error the body of `schema.ErrorBody`."""

    def answer(
        status: int, kind: Any, message: str, field: str | None = None, headers: Any = None
    ) -> Response:
        body = schema.error_body(kind, message, field)
        return Response(body, status, headers, media_type="application/json")

    def wrong(error: Any) -> Response:
        place = [str(part) for part in error["loc"] if part not in ("body", "query", "path")]
        message = error["msg"].removeprefix("Value error, ")
        return answer(422, "invalid_request", message, ".".join(place) or None)

    @app.exception_handler(RequestValidationError)
    async def invalid_parameter(request: Request, error: RequestValidationError) -> Response:
        del request
        return wrong(error.errors()[0])

    @app.exception_handler(ValidationError)
    async def invalid_body(request: Request, error: ValidationError) -> Response:
        del request
        return wrong(error.errors(include_url=False, include_input=False, include_context=False)[0])

    @app.exception_handler(TooLarge)
    async def too_large(request: Request, error: TooLarge) -> Response:
        del request
        return answer(413, "too_large", str(error))

    @app.exception_handler(UserError)
    async def refused(request: Request, error: UserError) -> Response:
        del request
        return answer(422, "refused", str(error))

    @app.exception_handler(StoreError)
    async def store_fails(request: Request, error: StoreError) -> Response:
        del request
        # The message has paths of this machine in it, which are the operator's business.
        _log.error("%s", error)
        message = "the store of users cannot be used now; nothing is wrong with the request"
        return answer(503, "unavailable", message, headers={"Retry-After": str(RETRY_AFTER)})

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> Response:
        del request, error
        status, body, headers = BUSY
        texts = {name.decode(): value.decode() for name, value in headers}
        return Response(body, status, texts, media_type="application/json")

    @app.exception_handler(ClientLeft)
    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: Exception) -> Response:
        del request, error
        return Response(status_code=499)  # which nobody receives

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        del request
        kind = _KINDS.get(error.status_code, "invalid_request")
        return answer(error.status_code, kind, error.detail, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        del request, error  # the server logs the traceback
        return answer(500, "internal", "the service has failed; its log says why")
