"""Recommendations over HTTP (extra `serve`): `python -m tim4rec_jax.serving serve --workdir RUN`.

`POST /recommend` for a history or a user, `POST /events` to tell what users did, `GET /items` to
look items up, `GET /health`, `GET /metrics` (Prometheus), and a page at `/` to try it by hand.
The schema of requests and answers is at `/openapi.json`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import tim4rec_jax
from tim4rec_jax.errors import UserError
from tim4rec_jax.serving import http_schema as schema
from tim4rec_jax.serving.batcher import Batcher
from tim4rec_jax.serving.http_metrics import Metrics
from tim4rec_jax.serving.recommender import Recommendations, Recommender

MAX_BODY = 1 << 20  # bytes of a request
# Histories computed at once, each a program to compile. A CPU gains nothing by larger ones.
BATCHES = (1, 4, 16, 64)

_PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
_KINDS = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class _Options(NamedTuple):
    """What requests of one batch have in common."""

    k: int
    exclude_seen: bool
    sort: bool
    allow: frozenset[str] | None
    deny: frozenset[str] | None
    timed: bool  # whether they say `at`


def create_app(recommender: Recommender, *, max_body: int = MAX_BODY) -> FastAPI:
    """The service around a recommender.

    Args:
        recommender: answers; its store keeps what `/events` tells.
        max_body: bytes of a request; longer ones get status 413.
    """
    metrics = Metrics()
    catalogue = recommender.catalogue
    names = [
        (f"{title or ''} {item}".casefold(), item)
        for item, title in zip(
            catalogue.ids, catalogue.titles or [None] * len(catalogue), strict=True
        )
    ]

    def recommend_batch(requests: list[schema.RecommendRequest], options: _Options):
        histories: list = [(request.items, request.timestamps) for request in requests]
        at: Any = [request.at for request in requests] if options.timed else None
        missing = next(size for size in BATCHES if size >= len(requests)) - len(requests)
        histories += histories[-1:] * missing
        at = at and at + at[-1:] * missing
        found = recommender.recommend_batch(histories, at=at, **_keywords(options))
        return found[: len(requests)]

    batcher = Batcher(recommend_batch, max_batch=BATCHES[-1], observe=metrics.batch.observe)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    app = FastAPI(
        title="tim4rec-jax",
        version=tim4rec_jax.__version__,
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        responses=schema.ERRORS,
    )
    app.add_middleware(_Guard, max_body=max_body, metrics=metrics)
    _answer_errors(app)

    def answer(found: Recommendations) -> schema.RecommendAnswer:
        metrics.count(found)
        items = [
            schema.Recommended(item=item, title=catalogue.title(item), score=score)
            for item, score in zip(found.items, found.scores, strict=True)
        ]
        return schema.RecommendAnswer(items=items, unknown=found.unknown, fallback=found.fallback)

    @app.post("/recommend")
    async def recommend(request: schema.RecommendRequest) -> schema.RecommendAnswer:
        options = _options(request)
        if request.user is None:
            return answer(await batcher(request, options))
        keywords = _keywords(options)
        del keywords["sort"]
        found = await run_in_threadpool(
            recommender.recommend_user, request.user, at=request.at, **keywords
        )
        return answer(found)

    @app.post("/events")
    def events(request: schema.EventsRequest) -> schema.EventsAnswer:
        given = [(event.user, event.item, event.timestamp) for event in request.events]
        known = recommender.update_batch(given, sort=request.sort)
        metrics.events.labels("known").inc(sum(known))
        metrics.events.labels("unknown").inc(len(known) - sum(known))
        return schema.EventsAnswer(known=sum(known), unknown=len(known) - sum(known))

    @app.get("/items")
    def items(
        query: Annotated[str, Query(max_length=100)] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> list[schema.Item]:
        wanted = query.casefold()
        found = [row for row, (name, _) in enumerate(names) if wanted in name]
        found.sort(key=lambda row: -int(catalogue.counts[row]))
        return [
            schema.Item(
                item=names[row][1],
                title=catalogue.title(names[row][1]),
                count=int(catalogue.counts[row]),
            )
            for row in found[:limit]
        ]

    @app.get("/health")
    def health() -> schema.Health:
        return schema.Health(
            dataset=catalogue.metadata["name"],
            items=len(catalogue),
            max_length=recommender.engine.max_length,
            streaming=recommender.engine.streams,
            knows_next_time=recommender.engine.knows_next_time,
        )

    @app.get("/metrics", response_class=Response)
    def scrape() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(_PAGE, media_type="text/html", headers=_PAGE_HEADERS)

    return app


def _options(request: schema.RecommendRequest) -> _Options:
    return _Options(
        request.k,
        request.exclude_seen,
        request.sort,
        None if request.allow is None else frozenset(request.allow),
        None if request.deny is None else frozenset(request.deny),
        request.at is not None,
    )


def _keywords(options: _Options) -> dict[str, Any]:
    return {name: value for name, value in options._asdict().items() if name != "timed"}


def _answer_errors(app: FastAPI) -> None:
    """Gives every error the body of `http_schema.ErrorBody`."""

    def body(status: int, kind: Any, message: str, field: str | None = None) -> JSONResponse:
        error = schema.Error(type=kind, message=message, field=field)
        return JSONResponse(schema.ErrorBody(error=error).model_dump(), status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        del request
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body") or None
        message = first["msg"].removeprefix("Value error, ")
        return body(422, "invalid_request", message, field)

    @app.exception_handler(UserError)
    async def refused(request: Request, error: UserError) -> Response:
        del request
        return body(422, "refused", str(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        del request
        kind = _KINDS.get(error.status_code, "invalid_request")
        return body(error.status_code, kind, error.detail)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        del request, error  # the server logs its traceback
        return body(500, "internal", "the service has failed; its log says why")


class _Guard:
    """Refuses bodies that are too long, and counts and times requests."""

    def __init__(self, app: ASGIApp, max_body: int, metrics: Metrics):
        self.app, self.max_body, self.metrics = app, max_body, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, received, status = time.perf_counter(), 0, 500

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body:
                detail = f"a request may have {self.max_body:,} bytes"
                raise HTTPException(413, detail, {"Connection": "close"})
            return message

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, limited, watched)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")  # not what anybody made up
            self.metrics.request(path, status, time.perf_counter() - start)
