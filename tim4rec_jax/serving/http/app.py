"""Recommends over HTTP (extra `serve`): `python -m tim4rec_jax.serving serve --workdir RUN`.

`POST /recommend` takes a history or a user, `POST /events` tells what users did, `GET /items`
looks items up, `GET /health` and `GET /metrics` (Prometheus) say how the service is, and `/` is a
page to try it by hand. `/openapi.json` holds the schema of requests and answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import tim4rec_jax
from tim4rec_jax.errors import UserError
from tim4rec_jax.runtime import enable_compilation_cache
from tim4rec_jax.serving.http import schema
from tim4rec_jax.serving.http.metrics import Metrics
from tim4rec_jax.serving.http.micro_batcher import Batcher
from tim4rec_jax.serving.recommender import Recommendations, Recommender
from tim4rec_jax.serving.stores import SQLiteStore

MAX_BODY = 1 << 20  # bytes of a request
# How many histories are computed at once. Each size is a program to compile, and a CPU gains
# nothing by a larger one.
BATCHES = (1, 4, 16, 64)
_LEAST_EXCLUDED = 16  # the smallest width of history items in `CompiledModel.best`

_PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
_KINDS = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


def serve(
    workdir: Path,
    *,
    dataset: Path | None = None,
    store: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    approximate: bool = False,
) -> None:
    """Serves the best model of a run until the process is told to end.

    It prints the address once everything is compiled.

    Args:
        workdir: the run directory.
        dataset: the prepared dataset, if it has moved since the training.
        store: an SQLite file that keeps the users; `None` keeps them in memory.
        host: the address to listen on.
        port: the port to listen on; 0 takes any that is free.
        approximate: whether to search an index; see `Recommender.load`.

    Raises:
        UserError: the port cannot be used, or the run, the dataset or the store cannot be read.
    """
    try:
        listener = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error
    enable_compilation_cache()
    users = SQLiteStore(store) if store else None
    recommender = Recommender.load(workdir, users, dataset, approximate=approximate)
    warm_up(recommender)
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(create_app(recommender), log_level="warning", access_log=False)
    print(f"{len(recommender.catalogue):,} items at http://{host}:{port}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def warm_up(recommender: Recommender) -> None:
    """Compiles what histories of up to a full window need, for each of `BATCHES`."""
    model = recommender.model
    model.one_width = True
    at = model.max_length if model.knows_next_time else None
    item, lengths = recommender.catalogue.ids[:1], [model.max_length]
    while lengths[-1] > _LEAST_EXCLUDED:  # the items left out have a width of their own
        lengths.append(lengths[-1] // 2)
    for rows in BATCHES:
        for length in lengths:
            recommender.recommend_batch([(item * length, list(range(length)))] * rows, at=at)


def create_app(recommender: Recommender, *, max_body: int = MAX_BODY) -> FastAPI:
    """Makes the service around a recommender.

    Args:
        recommender: answers the requests; its store keeps what `/events` tells.
        max_body: how many bytes a request may have; a longer one is answered with status 413.
    """
    metrics, catalogue = Metrics(), recommender.catalogue

    def recommend_batch(requests: list[schema.RecommendRequest], options: _Options):
        return _recommend_batch(recommender, requests, options)

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
        docs_url=None,  # the pages of FastAPI load scripts from elsewhere
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
        if request.user is None:
            return answer(await batcher(request, _Options.of(request)))
        found = await run_in_threadpool(
            recommender.recommend_user,
            request.user,
            request.k,
            at=request.at,
            exclude_seen=request.exclude_seen,
            allow=request.allow,
            deny=request.deny,
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
        return [
            schema.Item(
                item=catalogue.ids[position],
                title=catalogue.title(catalogue.ids[position]),
                count=int(catalogue.counts[position]),
            )
            for position in catalogue.search(query, limit)
        ]

    @app.get("/health")
    def health() -> schema.Health:
        return schema.Health(
            dataset=catalogue.metadata["name"],
            items=len(catalogue),
            max_length=recommender.model.max_length,
            streaming=recommender.model.supports_step,
            knows_next_time=recommender.model.knows_next_time,
        )

    @app.get("/metrics", response_class=Response)
    def scrape() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(_PAGE, media_type="text/html", headers=_PAGE_HEADERS)

    return app


class _Options(NamedTuple):
    """What the requests of one batch have in common."""

    k: int
    exclude_seen: bool
    sort: bool
    allow: frozenset[str] | None
    deny: frozenset[str] | None
    timed: bool  # whether they say `at`

    @classmethod
    def of(cls, request: schema.RecommendRequest) -> _Options:
        allow = None if request.allow is None else frozenset(request.allow)
        deny = None if request.deny is None else frozenset(request.deny)
        timed = request.at is not None
        return cls(request.k, request.exclude_seen, request.sort, allow, deny, timed)


def _recommend_batch(
    recommender: Recommender, requests: list[schema.RecommendRequest], options: _Options
) -> list[Recommendations]:
    """Answers histories with equal options; copies of the last one fill up the batch."""
    size = next(size for size in BATCHES if size >= len(requests))
    padded = requests + requests[-1:] * (size - len(requests))
    histories: list[Any] = [(request.items, request.timestamps) for request in padded]
    at: Any = [request.at for request in padded] if options.timed else None
    found = recommender.recommend_batch(
        histories,
        k=options.k,
        at=at,
        exclude_seen=options.exclude_seen,
        allow=options.allow,
        deny=options.deny,
        sort=options.sort,
    )
    return found[: len(requests)]


def _answer_errors(app: FastAPI) -> None:
    """Gives every error the body of `schema.ErrorBody`."""

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
        del request, error  # the server logs the traceback
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
            # A path that somebody made up would be a metric of its own.
            path = getattr(route, "path", "other")
            self.metrics.request(path, status, time.perf_counter() - start)
