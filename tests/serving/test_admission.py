"""Whose turn it is, and who is refused, when there are too many requests."""

import asyncio

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from tim4rec_jax.serving.http import admission
from tim4rec_jax.serving.http.admission import Admission, address_of, greed_after


class FakeClient:
    """Notes what becomes of its requests, and works on each until it is told to stop."""

    def __init__(self, log, address, greed=0.5, alive=True, half_closed=False):
        self.log, self.address, self.greed, self.alive = log, address, greed, alive
        self.half_closed = half_closed

    def start(self, cycle, room):
        self.log.append(("start", cycle))
        self.leave = lambda: room.leave(self)

    def busy(self, cycle, room):
        self.log.append(("busy", cycle))

    def is_alive(self):
        return self.alive


def scenario(monkeypatch, clients, most_waiting):
    """The first client is worked on while the others come; then one after the other leaves."""
    monkeypatch.setattr(admission, "_BUSY_SECONDS", 0.0)
    monkeypatch.setattr(admission, "_BUSY_RATE", float("inf"))
    log = []

    async def run():
        doors = Admission({"/a": (1, most_waiting), "": (1, 1)})
        room = doors.room("/a")
        working = {}
        for name, options in clients.items():
            working[name] = FakeClient(log, **options)
            room.enter(working[name], name)
        assert doors.room("/b") is doors.room("/c") is not room  # which nobody keeps waiting
        for _ in clients:
            await asyncio.sleep(0.001)
            started = [name for what, name in log if what == "start"]
            if hasattr(working[started[-1]], "leave"):
                working[started[-1]].leave()
                del working[started[-1]].leave
        assert not doors.open  # no address has a request left

    asyncio.run(run())
    return log


def test_one_address_takes_its_own_time(monkeypatch):
    """Of five waiting requests, three are of one address; two of them are refused."""
    clients = {"first": dict(address="x")}
    clients |= {f"many{number}": dict(address="many", greed=0.1) for number in range(3)}
    clients |= {name: dict(address=name, greed=0.9) for name in ("one", "two")}
    log = scenario(monkeypatch, clients, 3)
    assert {name for what, name in log if what == "busy"} == {"many1", "many2"}
    assert {name for what, name in log if what == "start"} == {"first", "many0", "one", "two"}


def test_who_pauses_goes_first(monkeypatch):
    """At one address; who has left meanwhile is not begun."""
    greeds = {"first": 0.0, "greedy": 0.9, "modest": 0.2, "left": 0.1, "usual": 0.5, "worst": 1.0}
    clients = {name: dict(address="x", greed=greed) for name, greed in greeds.items()}
    clients["left"]["alive"] = False
    log = scenario(monkeypatch, clients, 4)
    assert [name for what, name in log if what == "start"] == ["first", "modest", "usual", "greedy"]
    assert [name for what, name in log if what == "busy"] == ["worst"]


def test_of_the_greedy_nobody_starves(monkeypatch):
    """They go in the order in which they came; otherwise who has waited once would wait longer."""
    greeds = {"first": 0.7, "a": 0.9, "b": 0.6, "c": 1.0, "d": 0.8}
    clients = {name: dict(address="x", greed=greed) for name, greed in greeds.items()}
    log = scenario(monkeypatch, clients, 4)
    assert [name for what, name in log if what == "start"] == ["first", "a", "b", "c", "d"]


@pytest.mark.parametrize("greed", [0.1, 0.9, None])
def test_new_connections_take_turns_with_the_others(monkeypatch, greed):
    """At one address, a single client of the other kind is neither refused nor kept waiting."""
    clients = {"first": dict(address="x")}
    clients |= {f"flood{number}": dict(address="x", greed=greed) for number in range(3)}
    clients["single"] = dict(address="x", greed=0.5 if greed is None else None)
    clients |= {f"more{number}": dict(address="x", greed=greed) for number in range(2)}
    log = scenario(monkeypatch, clients, 3)
    order = [name for what, name in log if what == "start"]
    assert "single" in order[1:3]
    # Of new connections, of which nothing is known, the one that came first has waited enough.
    busy = ["flood0", "flood1", "flood2"] if greed is None else ["flood2", "more0", "more1"]
    assert [name for what, name in log if what == "busy"] == busy


def test_places_kept_for_the_modest():
    """Three of four places are taken by those who ask at once; the last waits for the modest."""
    log = []

    async def run():
        room = Admission({"/a": (4, 9), "": (1, 1)}).room("/a")
        for name, options in {
            **{f"greedy{number}": dict(address="x", greed=0.9) for number in range(4)},
            "new": dict(address="x", greed=None),
            "modest": dict(address="x", greed=0.2),
            "alone": dict(address="y", greed=0.9),
        }.items():
            room.enter(FakeClient(log, **options), name)

    asyncio.run(run())
    assert [name for _, name in log] == ["greedy0", "greedy1", "greedy2", "modest"]


def test_refusals_are_spread(monkeypatch):
    """Ten in a second, the first after half a second, and none after more than one."""
    due = []

    class Loop:
        def time(self):
            return 10.0

        def call_at(self, when, function):
            due.append(round(when, 2))

    monkeypatch.setattr(admission.asyncio, "get_running_loop", Loop)
    monkeypatch.setattr(admission, "_BUSY_RATE", 10)
    monkeypatch.setattr(admission, "_MAX_BUSY_SECONDS", 1.0)
    room = Admission({"": (0, 0)}).room("/a")
    for number in range(9):
        room.enter(FakeClient([], "x"), number)
    assert due == [10.5, 10.6, 10.7, 10.8, 10.9, 11.0, 11.0, 11.0, 11.0]


def test_shares_and_addresses():
    always, sometimes = 0.6, 0.6
    for _ in range(20):
        always = greed_after(always, waited=0.05, paused=0.0)
        sometimes = greed_after(sometimes, waited=0.05, paused=0.05)
    assert (always, sometimes) == (pytest.approx(1, abs=0.01), pytest.approx(0.5, abs=0.01))
    assert address_of("10.0.0.1") == "10.0.0.1"
    assert address_of("2001:db8::1:2%eth0") == address_of("2001:db8::ffff") == "2001:db8::/64"
    assert address_of("no address: at all") == "no address: at all"
