"""The HTTP service as an application: what is asked, and what is answered.

`POST /recommend` takes a history or a user, `POST /events` tells what users did, `DELETE /users/ID`
forgets a user, `POST /reload` loads the run again, `GET /items` looks items up, `GET /health`,
`GET /ready` and `GET /metrics` (Prometheus) say how the service is, and `/` is a page to try it by
hand. `/openapi.json` holds the schema of requests and answers.

FastAPI describes all requests. Those that take JSON, `/health` and `/ready` are answered by an
`Endpoint` of the guard.
"""

from __future__ import annotations

import asyncio
import collections
import json
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from pydantic_core import from_json, to_json
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

import tim4rec_jax
from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.http import schema
from tim4rec_jax.serving.http.answers import Answer, TooLarge, answer_to
from tim4rec_jax.serving.http.guard import Endpoint, Guard
from tim4rec_jax.serving.http.micro_batcher import ClientLeft, Overloaded
from tim4rec_jax.serving.http.schema import MAX_BODY
from tim4rec_jax.serving.http.service import Service
from tim4rec_jax.serving.recommender import Recommender

# A longer body is read and checked in a thread: the event loop would answer nobody else meanwhile.
_LARGE_BODY = 1 << 14


class _IdConvertor(StringConvertor):
    """Any text as a part of an address, with slashes and ends of lines in it."""

    regex = r"[\s\S]*"


register_url_convertor("id", _IdConvertor())

_PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


class _App(FastAPI):
    """FastAPI behind a guard, which hands on what it does not answer itself."""

    guard: Guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        await self.guard(scope, receive, send)


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
    app = _App(
        title="tim4rec-jax",
        version=tim4rec_jax.__version__,
        lifespan=service.running,
        docs_url=None,  # the pages of FastAPI load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses=schema.ERRORS,
        # It only describes the token; the guard asks for it.
        dependencies=[] if token is None else [Depends(HTTPBearer(auto_error=False))],
    )
    app.state.service = service
    app.guard = Guard(
        super(_App, app).__call__,
        metrics=service.metrics,
        max_body=max_body,
        token=token,
        hosts=hosts,
        endpoints=_add_endpoints(app, service),
    )
    _add_other_routes(app, service)
    _answer_errors(app)
    return app


def _add_endpoints(app: FastAPI, service: Service) -> dict[tuple[str, str], Endpoint]:
    """Describes the requests that the guard answers, and returns what answers them."""

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

    async def reload(body: schema.ReloadRequest, request: Request) -> schema.ReloadAnswer:
        del body, request
        if service.reload is None:
            raise HTTPException(
                403,
                "a service that others can reach loads a run only for callers "
                "with a token: start it with --token-file, or send it SIGHUP",
            )
        try:
            content: Any = {"items": await asyncio.to_thread(service.reload)}
        except UserError as error:
            raise HTTPException(409, f"{error}; the earlier run goes on") from None
        return content

    async def health() -> schema.Health:
        catalogue, model = service.recommender.catalogue, service.recommender.model
        return schema.Health(
            dataset=catalogue.metadata["name"],
            items=len(catalogue),
            max_length=model.max_length,
            streaming=model.supports_step,
            knows_next_time=model.knows_next_time,
        )

    async def ready() -> schema.Ready:
        if service.overloaded:
            raise Overloaded
        return schema.Ready()

    endpoints: dict[tuple[str, str], Endpoint] = {}
    for path, function, model in (
        ("/recommend", recommend, schema.RecommendRequest),
        ("/events", events, schema.EventsRequest),
        ("/reload", reload, schema.ReloadRequest),
    ):
        app.router.add_api_route(path, function, methods=["POST"])
        endpoints["POST", path] = _takes_json(service, model, function)
    for path, function in (("/health", health), ("/ready", ready)):
        app.router.add_api_route(path, function, methods=["GET"])
        endpoints["GET", path] = _takes_nothing(function)
    return endpoints


def _takes_json(
    service: Service, model: type[BaseModel], function: Callable[[Any, Request], Awaitable[Any]]
) -> Endpoint:
    """Calls a function with the checked body of a request."""

    async def answer(scope: Any, read_body: Callable[[], Awaitable[bytes]]) -> Answer:
        request = Request(scope)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, "send JSON with the header Content-Type: application/json")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise HTTPException(415, "send the body as it is, without the header Content-Encoding")
        if scope["query_string"]:
            raise HTTPException(422, "send all of the request in the body, nothing after a ?")
        body = await read_body()
        read = partial(_read_json, model, body)
        large = len(body) > _LARGE_BODY
        checked = await service.checks(read, _alive(request)) if large else read()
        return Answer(200, to_json(await function(checked, request)))

    return answer


def _takes_nothing(function: Callable[[], Awaitable[Any]]) -> Endpoint:
    async def answer(scope: Any, read_body: Callable[[], Awaitable[bytes]]) -> Answer:
        del scope, read_body
        return Answer(200, to_json(await function()))

    return answer


def _read_json(model: type[BaseModel], body: bytes) -> Any:
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(422, f"the body is no JSON: {error}"[:200]) from None
    checked = model.model_validate(content)
    # Of equal keys the last one has counted, and the others were lost. Each key has a colon, so
    # most bodies need no second look.
    if body.count(b":") > _count_keys(checked):
        json.loads(body, object_pairs_hook=_refuse_equal_keys)
    return checked


def _count_keys(content: BaseModel) -> int:
    events: list[BaseModel] = getattr(content, "events", [])
    return len(content.model_fields_set) + sum(map(_count_keys, events))


def _refuse_equal_keys(pairs: list[tuple[str, Any]]) -> None:
    keys = collections.Counter(key for key, _ in pairs)
    for key, times in keys.items():
        if times > 1:
            raise HTTPException(422, f"the key {key!r} stands {times} times in one object")


def _alive(request: Request) -> Callable[[], bool]:
    """Whether the client still waits; its connection knows it."""
    connection = request.scope.get("tim4rec.connection")
    return connection.is_alive if connection else lambda: True


def _add_other_routes(app: FastAPI, service: Service) -> None:
    @app.delete("/users/{user:id}")
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

    @app.get("/metrics", response_class=Response)
    async def scrape() -> Response:
        content = generate_latest(service.metrics.registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE, media_type="text/html", headers=_PAGE_HEADERS)


def _answer_errors(app: FastAPI) -> None:
    """Gives every error the body of `schema.ErrorBody`."""

    def handle(request: Request, error: Exception) -> Response:
        del request
        status, body, headers = answer_to(error)
        texts = {name.decode(): value.decode() for name, value in headers}
        return Response(body, status, texts, media_type="application/json")

    for kind in (
        RequestValidationError,
        TooLarge,
        UserError,
        Overloaded,
        ClientLeft,
        ClientDisconnect,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, handle)
