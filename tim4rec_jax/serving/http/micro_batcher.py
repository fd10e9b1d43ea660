"""Makes batches of concurrent requests: those that arrive while the previous batch is computed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple


class Overloaded(Exception):
    """There is more to do than can be done in time."""


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class _Waiting(NamedTuple):
    request: Any
    future: asyncio.Future
    deadline: float
    alive: Callable[[], bool]


class Batcher:
    """Gathers the calls of many coroutines into few calls of a blocking function in one thread.

    There is no waiting time to choose. A request that finds the thread idle is a batch of one, and
    the requests that arrive while it is computed are the next batch. The event loop is never
    blocked.

    What cannot be done in time is refused at once: a request that finds too many others waiting,
    and one that has waited too long. What nobody waits for any more is not done. What has been
    begun is always finished, so a refused request has had no effect.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[list[Any]], Sequence[Any]],
        *,
        max_batch: int,
        max_waiting: int,
        max_seconds: int | float,
        gather_seconds: int | float = 0.0,
        observe: Callable[[int], None] = lambda size: None,
    ):
        """Prepares a batcher; `run` must be running for calls to be answered.

        Args:
            name: of the thread.
            function: called in a thread with a list of requests. It returns for each request a
                result, or an exception for its caller.
            max_batch: how many requests one call may have.
            max_waiting: how many requests may wait besides those that are computed.
            max_seconds: how long a request may wait.
            gather_seconds: how long to wait for more after a batch of several. Callers who ask
                again and again then make few full batches and not many small ones, which cost
                nearly as much each. A caller who is alone does not wait.
            observe: called with the size of every batch.
        """
        self._function, self._max_batch, self._observe = function, max_batch, observe
        self._max_seconds, self._gather_seconds = max_seconds, gather_seconds
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(max_waiting)
        self._thread = ThreadPoolExecutor(1, name)

    @property
    def full(self) -> bool:
        """Whether a request would be refused now."""
        return self._queue.full()

    async def run(self) -> None:
        """Serves requests until it is cancelled."""
        loop, gather = asyncio.get_running_loop(), False
        try:
            while True:
                if gather:
                    await asyncio.sleep(self._gather_seconds)
                waiting = [await self._queue.get()]
                while not self._queue.empty() and len(waiting) < self._max_batch:
                    waiting.append(self._queue.get_nowait())
                if batch := [one for one in waiting if _wanted(one, loop.time())]:
                    await self._serve(batch)
                gather = self._gather_seconds > 0 and len(batch) > 1
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _serve(self, batch: list[_Waiting]) -> None:
        self._observe(len(batch))
        requests = [waiting.request for waiting in batch]
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self._function, requests)
        except Exception as error:
            results = [error] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            if waiting.future.done():
                continue
            if isinstance(result, Exception):
                waiting.future.set_exception(result)
            else:
                waiting.future.set_result(result)

    async def __call__(self, request: Any, alive: Callable[[], bool] = lambda: True) -> Any:
        """Waits for the result of a request.

        Args:
            request: handed to the function.
            alive: whether the caller's client still waits; asked when the request's turn comes.

        Raises:
            Overloaded: the request is not done, for want of time.
            ClientLeft: the request is not done, because nobody waits for it.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        try:
            self._queue.put_nowait(
                _Waiting(request, future, loop.time() + self._max_seconds, alive)
            )
        except asyncio.QueueFull:
            raise Overloaded from None
        return await future


def _wanted(waiting: _Waiting, now: float) -> bool:
    """Whether to do it; otherwise its caller is told."""
    if waiting.future.done():
        return False
    if not waiting.alive():
        waiting.future.set_exception(ClientLeft())
    elif now > waiting.deadline:
        waiting.future.set_exception(Overloaded())
    else:
        return True
    return False
