"""Decides which requests are worked on, and in which order, when there are too many of them."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from typing import Any, NamedTuple, Protocol, runtime_checkable

# How much the last request counts in the share of a client's time that is spent waiting.
_NEWEST = 0.25
# That share for a new connection: more than a client has that pauses, less than one that does not.
NEW_CLIENT = 0.6
USUAL_SECONDS = 0.05  # what an answer under load takes, which a refused client would have waited
_MAX_SECONDS = 1.0  # how long a request may wait for its turn
_BUSY_SECONDS = 0.5  # how long a refusal for want of time is held back


@runtime_checkable
class Client(Protocol):
    """What a connection does for an `Admission`."""

    address: str
    greed: float

    def start(self, cycle: Any, room: Room) -> None:
        """Begins to work on a request; `room.leave()` must be called in the end."""
        ...

    def is_alive(self) -> bool:
        """Whether somebody waits for the answer."""
        ...

    def busy(self, cycle: Any, room: Room) -> None:
        """Answers that there is no time for a request."""
        ...


class _Waiting(NamedTuple):
    client: Client
    cycle: Any
    since: float


class Admission:
    """The rooms of a service, one for each kind of request, so that no kind keeps others waiting.

    A request that has arrived whole is begun at once if few of its kind are worked on. Otherwise it
    waits for a moment. When too many wait, one of them is refused, before anything has been done
    for it but reading it. It is one of the greediest client. Whose turn it is, and who is refused,
    is decided by two numbers:

    1. How many requests of its address are in the service. So a client with a thousand connections
       takes its own time and not that of others.
    2. For clients at one address: the share of its time that a connection has spent waiting for
       answers lately. One that asks again at once has nearly 1. One that pauses between its
       requests has less, and goes first.

    Refusals are held back, so that clients that ask again at once do not take all the time.
    """

    def __init__(self, rooms: dict[str, tuple[int, int]]):
        """Opens the rooms.

        Args:
            rooms: by path, how many requests are worked on at once, and how many may wait. The
                room of "" is for all other paths.
        """
        self.open: Counter[str] = Counter()  # requests by address
        self._rooms = {
            path: Room(path or "other", self.open, *sizes) for path, sizes in rooms.items()
        }

    def room(self, path: str) -> Room:
        """The room for requests to a path."""
        return self._rooms.get(path) or self._rooms[""]

    @property
    def full(self) -> bool:
        """Whether requests are refused in some room now."""
        return any(room.full for room in self._rooms.values())


class Room:
    """Requests of one kind.

    Attributes:
        name: the path, for metrics.
    """

    def __init__(
        self, name: str, open_requests: Counter[str], most_working: int, most_waiting: int
    ):
        self.name, self._open = name, open_requests
        self._most_working, self._most_waiting = most_working, most_waiting
        self._working, self._waiting = 0, []
        self._called = False  # whether those who wait will be called in this round of the loop

    @property
    def full(self) -> bool:
        """Whether one more request would have to be refused."""
        return len(self._waiting) >= self._most_waiting

    def enter(self, client: Client, cycle: Any) -> None:
        """Takes a request: it is begun now, it waits, or it or another one is refused."""
        self._open[client.address] += 1
        if self._working < self._most_working and not self._waiting:
            self._working += 1
            client.start(cycle, self)
            return
        self._waiting.append(_Waiting(client, cycle, asyncio.get_running_loop().time()))
        if len(self._waiting) > self._most_waiting:
            greediest = max(self._waiting, key=self._greed)
            self._waiting.remove(greediest)
            self._refuse(greediest)

    def leave(self, client: Client) -> None:
        """A request that was begun is done."""
        self._working -= 1
        self._close(client)
        if self._waiting and not self._called:
            self._called = True
            asyncio.get_running_loop().call_soon(self._call)

    def _call(self) -> None:
        """Begins those whose turn it is."""
        self._called = False
        now = asyncio.get_running_loop().time()
        self._waiting.sort(key=self._greed, reverse=True)
        while self._waiting and self._working < self._most_working:
            client, cycle, since = next_one = self._waiting.pop()
            if not client.is_alive():
                self._close(client)
            elif now - since > _MAX_SECONDS:
                self._refuse(next_one)
            else:
                self._working += 1
                client.start(cycle, self)

    def _greed(self, waiting: _Waiting) -> tuple[int, float, float]:
        return self._open[waiting.client.address], waiting.client.greed, waiting.since

    def _refuse(self, waiting: _Waiting) -> None:
        def answer() -> None:
            self._close(waiting.client)
            waiting.client.busy(waiting.cycle, self)

        asyncio.get_running_loop().call_later(_BUSY_SECONDS, answer)

    def _close(self, client: Client) -> None:
        self._open[client.address] -= 1
        if not self._open[client.address]:
            del self._open[client.address]


def greed_after(greed: float, waited: float, paused: float) -> float:
    """The share of its time that a client waits, after one more request.

    Args:
        greed: the share before, at first `NEW_CLIENT`.
        waited: seconds from the request to its answer.
        paused: seconds from the answer before to the request.
    """
    return greed + _NEWEST * (waited / max(waited + paused, 1e-9) - greed)


def address_of(host: str) -> str:
    """What stands for a client: its address, or the part of an IPv6 address that it cannot choose.

    Args:
        host: an address; anything else stands for itself.
    """
    if ":" not in host:
        return host
    try:
        return str(ipaddress.IPv6Network((host.partition("%")[0], 64), strict=False))
    except ValueError:
        return host
