"""Recommendations over HTTP (extra `serve`): `python -m tim4rec_jax.serving serve --workdir RUN`.

`POST /recommend` for a history or a user, `POST /events` to tell what users did, `GET /items` to
look items up, `GET /health`, `GET /metrics` (Prometheus), and a page at `/` to try it by hand.
The schema of requests and answers is at `/openapi.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Sequence
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
from tim4rec_jax.runtime import enable_compilation_cache
from tim4rec_jax.serving.command import add_approximate_flag
from tim4rec_jax.serving.http import schema
from tim4rec_jax.serving.http.metrics import Metrics
from tim4rec_jax.serving.http.micro_batcher import Batcher
from tim4rec_jax.serving.recommender import Recommendations, Recommender
from tim4rec_jax.serving.stores import SQLiteStore

# ---- serving.http_service
# Recommendations over HTTP (extra `serve`): `python -m tim4rec_jax.serving serve --workdir RUN`.
#
# `POST /recommend` for a history or a user, `POST /events` to tell what users did, `GET /items` to
# look items up, `GET /health`, `GET /metrics` (Prometheus), and a page at `/` to try it by hand.
# The schema of requests and answers is at `/openapi.json`.

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
            streaming=recommender.engine.supports_step,
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


# ---- serving.serve
# `python -m tim4rec_jax.serving serve`: the HTTP service on a port.

_LEAST_EXCLUDED = 16  # of the powers of two that `CompiledModel.best` pads to


def add_command(subparsers: Any) -> None:
    """Adds `serve` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve",
        help="recommend over HTTP (pip install 'tim4rec-jax[serve]')",
        description="Serves recommendations over HTTP, with a page to try them at /.",
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="directory of a run, as train.py wrote it")
    add("--dataset", type=Path, help="the prepared dataset, if it has moved since the training")
    add("--store", type=Path, metavar="FILE", help="keep users in this SQLite file, not in memory")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    add_approximate_flag(parser)
    parser.set_defaults(run=_run)


def _run(flags: argparse.Namespace) -> None:
    try:
        import uvicorn

        from tim4rec_jax.serving.http.app import BATCHES, create_app
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise UserError(
            f"{error.name} is not installed; pip install 'tim4rec-jax[serve]'"
        ) from error
    if not 0 <= flags.port < 1 << 16:
        raise UserError(f"--port is {flags.port}; ports go from 0 to 65535")
    try:
        listener = socket.create_server((flags.host, flags.port), backlog=2048)
    except OSError as error:
        raise UserError(
            f"cannot listen on {flags.host}:{flags.port}: {error.strerror}; choose another "
            "--host or --port"
        ) from error
    enable_compilation_cache()
    store = SQLiteStore(flags.store) if flags.store else None
    recommender = Recommender.load(
        flags.workdir, store, flags.dataset, approximate=flags.approximate
    )
    warm_up(recommender, BATCHES)
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(create_app(recommender), log_level="warning", access_log=False)
    print(f"{len(recommender.catalogue):,} items at http://{host}:{port}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def warm_up(recommender: Recommender, batches: Sequence[int]) -> None:
    """Compiles what histories of up to a full window will need, in batches of these sizes."""
    engine = recommender.engine
    engine.one_width = True
    at = engine.max_length if engine.knows_next_time else None
    item, lengths = recommender.catalogue.ids[:1], [engine.max_length]
    while lengths[-1] > _LEAST_EXCLUDED:  # the items left out have a width of their own
        lengths.append(lengths[-1] // 2)
    for rows in batches:
        for length in lengths:
            recommender.recommend_batch([(item * length, list(range(length)))] * rows, at=at)
