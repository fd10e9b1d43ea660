"""The service behind the HTTP requests: the recommender, and the threads that work for it.

The event loop reads and writes only. All work is done by a few threads, one for each kind, which
take what has arrived in batches (`micro_batcher.py`): so no kind of work can keep another waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, NamedTuple

from fastapi import FastAPI

from tim4rec_jax.serving.http import schema
from tim4rec_jax.serving.http.admission import Admission
from tim4rec_jax.serving.http.metrics import Metrics
from tim4rec_jax.serving.http.micro_batcher import Batcher
from tim4rec_jax.serving.ranker import Query
from tim4rec_jax.serving.recommender import Recommendations, Recommender

# A request of more ids and events is checked in a thread: the event loop would answer nobody else
# for so long.
_LARGE_REQUEST = 500
# Of each kind, how many requests are worked on at once, and how many may wait.
_ROOMS = {
    "/recommend": (40, 88),  # of which 30 are kept by no modest client: a batch of 32 rows
    "/events": (128, 128),
    "/health": (32, 512),
    "/ready": (32, 512),
    "": (16, 64),
}


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
        admission: decides which requests are worked on.
        reload: loads the run again and returns the number of its items; `None`: callers may not.
    """

    reload: Callable[[], int] | None = None

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
        self.writes = Batcher(
            "writes", _write, max_batch=64, max_waiting=256, max_seconds=2.0, gather_seconds=0.03
        )
        self.checks = Batcher("checks", _call, max_batch=1, max_waiting=8, max_seconds=2.0)
        self.lookups = Batcher("lookups", _call, max_batch=1, max_waiting=16, max_seconds=1.0)
        self.admission = Admission(_ROOMS)

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

    @property
    def overloaded(self) -> bool:
        """Whether requests are refused now for want of time."""
        rooms = (self.admission.room(path) for path in ("/recommend", "/events"))
        return self.answers.full or self.writes.full or any(room.full for room in rooms)

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


def _answer(requests: list[tuple[Recommender, Query]]) -> list[Recommendations]:
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
