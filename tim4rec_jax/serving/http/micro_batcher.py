"""Makes batches of concurrent requests: those that arrive while the model is busy."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tim4rec_jax.errors import UserError


class Batcher:
    """Gathers the calls of many coroutines into few calls of a blocking function.

    There is no waiting time to choose. A request that finds the model idle is a batch of one, and
    the requests that arrive while it is computed are the next batch. The event loop is never
    blocked.
    """

    def __init__(
        self,
        function: Callable[[list[Any], Any], Sequence[Any]],
        *,
        max_batch: int,
        observe: Callable[[int], None],
    ):
        """Prepares a batcher; `run` must be running for calls to be answered.

        Args:
            function: called in a thread with a list of requests and their common options. It
                returns a result for each request.
            max_batch: how many requests one call may have.
            observe: called with the size of every batch.
        """
        self._function, self._max_batch, self._observe = function, max_batch, observe
        self._queue: asyncio.Queue = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "recommend")

    async def run(self) -> None:
        """Serves requests until it is cancelled."""
        while True:
            waiting = [await self._queue.get()]
            while not self._queue.empty() and len(waiting) < self._max_batch:
                waiting.append(self._queue.get_nowait())
            groups: dict[Hashable, list] = {}
            for request, options, future in waiting:
                if not future.cancelled():  # a cancelled one has no caller any more
                    groups.setdefault(options, []).append((request, future))
            for options, group in groups.items():
                await self._serve(group, options)

    async def _serve(self, group: list, options: Any) -> None:
        self._observe(len(group))
        requests = [request for request, _ in group]
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self._function, requests, options)
        except UserError as error:
            if len(group) > 1:  # one request is at fault, and only its caller shall get the error
                for member in group:
                    await self._serve([member], options)
                return
            results = [error]
        except Exception as error:
            results = [error] * len(group)
        for (_, future), result in zip(group, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    async def __call__(self, request: Any, options: Hashable) -> Any:
        """Waits for the result of a request; only requests with equal options share a call."""
        future = asyncio.get_running_loop().create_future()
        await self._queue.put((request, options, future))
        return await future
