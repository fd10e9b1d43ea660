"""Decides which requests are worked on, and in which order, when there are too many of them."""

from __future__ import annotations

import asyncio
import ipaddress
from bisect import insort
from collections import Counter
from typing import Any, NamedTuple, Protocol, runtime_checkable

# How much the last request counts in the share of a client's time that is spent waiting.
_NEWEST = 0.25
_FIRST = 0.6  # what that share is taken to be before the first request
_MODEST = 0.5  # a client whose share is no larger is modest
USUAL_SECONDS = 0.05  # what an answer under load takes, which a refused client would have waited
_MAX_SECONDS = 1.0  # how long a request may wait for its turn
# How long a refusal for want of time is held back, at least and at most. In between, so many are
# answered in a second.
_BUSY_SECONDS, _MAX_BUSY_SECONDS, _BUSY_RATE = 0.5, 2.0, 400


@runtime_checkable
class Client(Protocol):
    """What a connection does for an `Admission`."""

    address: str
    half_closed: bool  # whether it sends no more, so that it may have left
    greed: float | None  # `None` for a new connection, which has had no answer yet

    def start(self, cycle: Any, room: Room) -> None:
        """Begins to work on a request; `room.leave()` must be called in the end."""
        ...

    def is_alive(self) -> bool:
        """Whether somebody waits for the answer."""
        ...

    def busy(self, cycle: Any, room: Room) -> None:
        """Answers that there is no time for a request."""
        ...


class Admission:
    """The rooms of a service, one for each kind of request, so that no kind keeps others waiting.

    A request that has arrived whole is begun at once if few of its kind are worked on. Otherwise it
    waits for a moment. When too many wait, one of them is refused, before anything has been done
    for it but reading it. Whose turn it is, and who is refused, is decided in this order:

    1. The address with the fewest requests in the service goes first. So a client with a thousand
       connections takes its own time and not that of others.
    2. At one address, new connections take turns with those that have had an answer. The kind of
       which more wait is refused. So neither can keep the other out.
    3. Of the connections that have had an answer, the greediest is refused, and the modest go
       first. Greed is the share of its time that a connection has spent waiting for answers lately.
       One that asks again at once has nearly 1. One that pauses between its requests has less.

    A quarter of the places are kept free for modest clients, who need not wait for others to be
    done: those that spend at most half of their time waiting, or have one request in the service.

    Who has closed the sending half of a connection may have left, so it gets no turn if it has to
    wait for one, and is refused. Refusals are held back, so that clients that ask again at once do
    not take all the time.
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
        self._working, self._waiting = 0, 0
        self._lines: dict[str, _Line] = {}  # by address, of the requests that wait
        self._called = False  # whether those who wait will be called in this round of the loop
        self._last_refusal = 0.0  # when the last of the refusals is due that are held back

    @property
    def full(self) -> bool:
        """Whether one more request would have to be refused."""
        return self._waiting >= self._most_waiting

    def enter(self, client: Client, cycle: Any) -> None:
        """Takes a request: it is begun now, it waits, or it or another one is refused."""
        self._open[client.address] += 1
        if self._has_place(client) and (self._is_modest(client) or not self._waiting):
            self._start(client, cycle)
            return
        one = _Waiting(client, cycle, asyncio.get_running_loop().time())
        self._lines.setdefault(client.address, _Line()).add(one)
        self._waiting += 1
        if self._waiting > self._most_waiting:
            self._refuse(self._worst())

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
        while self._waiting:
            client, cycle, since = one = self._first()
            if not self._has_place(client):
                return
            if now - since > _MAX_SECONDS or client.half_closed:
                self._refuse(one)
                continue
            self._take(one)
            if client.is_alive():
                self._start(client, cycle)
            else:
                self._close(client)

    def _has_place(self, client: Client) -> bool:
        kept = 0 if self._is_modest(client) else self._most_working // 4
        return self._working < self._most_working - kept

    def _is_modest(self, client: Client) -> bool:
        if self._open[client.address] == 1:
            return True
        return client.greed is not None and client.greed <= _MODEST

    def _start(self, client: Client, cycle: Any) -> None:
        self._working += 1
        client.start(cycle, self)

    def _first(self) -> _Waiting:
        """The request whose turn comes first."""
        firsts = [line.first() for line in self._lines.values()]
        return min(firsts, key=lambda one: (self._open[one.client.address], one.turn))

    def _worst(self) -> _Waiting:
        """The request that is refused if one must be."""
        worst = [line.worst() for line in self._lines.values()]
        return max(worst, key=lambda one: (self._open[one.client.address], one.fault))

    def _take(self, one: _Waiting) -> None:
        """Takes a request out of its line."""
        line = self._lines[one.client.address]
        line.remove(one)
        if not line:
            del self._lines[one.client.address]
        self._waiting -= 1

    def _refuse(self, one: _Waiting) -> None:
        def answer() -> None:
            self._close(one.client)
            one.client.busy(one.cycle, self)

        self._take(one)
        loop = asyncio.get_running_loop()
        due = max(one.since + _BUSY_SECONDS, self._last_refusal + 1 / _BUSY_RATE)
        self._last_refusal = min(due, loop.time() + _MAX_BUSY_SECONDS)
        loop.call_at(self._last_refusal, answer)

    def _close(self, client: Client) -> None:
        self._open[client.address] -= 1
        if not self._open[client.address]:
            del self._open[client.address]


class _Waiting(NamedTuple):
    client: Client
    cycle: Any
    since: float

    @property
    def turn(self) -> tuple[float, float]:
        """Compares requests of one kind; the smallest goes first.

        Clients that are not modest are equal in this. Otherwise those that have waited for long
        would be taken for greedier, and wait for even longer.
        """
        greed = self.client.greed
        return 1.0 if greed is None or greed > _MODEST else greed, self.since

    @property
    def fault(self) -> tuple[float, float]:
        """Likewise; the largest is refused.

        Nothing is known of new clients. The one that has waited for the longest time is refused, so
        that all have the same chance. Otherwise it would be those who come while the room is full.
        """
        greed = self.client.greed
        return (_FIRST, -self.since) if greed is None else (greed, self.since)


class _Line:
    """The requests of one address that wait: those of new connections, and those of others."""

    def __init__(self):
        self._new: list[_Waiting] = []
        self._known: list[_Waiting] = []
        self._turn_of_new = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._new) + len(self._known)

    def add(self, one: _Waiting) -> None:
        """Puts a request where it belongs."""
        kind = self._new if one.client.greed is None else self._known
        insort(kind, one, key=lambda waiting: waiting.turn)

    def first(self) -> _Waiting:
        """The request whose turn comes first."""
        turn_of_new = self._new and (self._turn_of_new or not self._known)
        return (self._new if turn_of_new else self._known)[0]

    def worst(self) -> _Waiting:
        """The request that is refused if one must be."""
        if len(self._new) > len(self._known):
            return self._new[0]
        return max(self._known, key=lambda one: one.fault)

    def remove(self, one: _Waiting) -> None:
        """Takes a request out. After the first one it is the turn of the other kind."""
        is_new = one.client.greed is None
        if one is self.first():
            self._turn_of_new = not is_new
        (self._new if is_new else self._known).remove(one)


def greed_after(greed: float | None, waited: float, paused: float) -> float:
    """The share of its time that a client waits, after one more request.

    Args:
        greed: the share before, `None` for a new client.
        waited: seconds from the request to its answer.
        paused: seconds from the answer before to the request.
    """
    before = _FIRST if greed is None else greed
    return before + _NEWEST * (waited / max(waited + paused, 1e-9) - before)


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
