"""What is special about the store in Redis; `test_users.py` has what all stores do.

Tests of a real server are skipped where there is none. A stand-in shows what the store itself does.
"""

import threading

import pytest

from tests.serving.redis_server import RedisServer
from tests.serving.redis_stand_in import StandIn
from tim4rec_jax.errors import UserError
from tim4rec_jax.serving import RedisStore
from tim4rec_jax.serving.stores import Change, Snapshot, StoreError


@pytest.fixture
def server(tmp_path):
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture(params=["server", "redis_stand_in"])
def either(request):
    """A real server, or its stand-in."""
    return request.getfixturevalue(request.param)


def add(store, user, number, name=b"s"):
    """Adds an event, and tries again as long as others were faster."""
    done = False
    while not done:
        [snapshot] = store.snapshots([user], "m")
        state = (snapshot.state or b"") + name
        [done] = store.apply([Change(user, snapshot.events, [f"i{number}"], [5], state)], "m")


def test_what_was_acknowledged_survives_a_kill_of_the_server(server):
    store, done = RedisStore(server.url), []

    def work():
        try:
            for number in range(10**6):
                add(store, f"u{number % 3}", number)
                done.append(number)
        except StoreError:
            pass

    thread = threading.Thread(target=work)
    thread.start()
    while len(done) < 200:
        assert thread.is_alive()
    server.kill()
    thread.join()
    with pytest.raises(StoreError, match="cannot be used"):
        store.history("u0")
    server.start()
    found = {user: store.history(user)[0] for user in ("u0", "u1", "u2")}
    # Everything that was reported is there; the last one may be, before it was reported.
    assert sum(map(len, found.values())) - len(done) in (0, 1)
    for user, items in found.items():
        assert items == [f"i{number}" for number in range(int(user[1]), 10**6, 3)][: len(items)]
        assert store.snapshots([user], "m") == [Snapshot(len(items), 5, b"s" * len(items))]
    store.close()


def test_writers_of_two_connections_lose_nothing(either):
    stores, errors = [RedisStore(either.url) for _ in range(2)], []

    def work(store, name):
        try:
            for number in range(30):
                add(store, "u", number, name)
        except BaseException as error:
            errors.append(error)

    pairs = zip(stores, (b"a", b"b"), strict=True)
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    [snapshot] = stores[0].snapshots(["u"], "m")
    assert (snapshot.events, snapshot.last) == (60, 5)
    assert (snapshot.state.count(b"a"), snapshot.state.count(b"b")) == (30, 30)
    assert sorted(stores[1].history("u")[0]) == sorted([f"i{n}" for n in range(30)] * 2)
    for store in stores:
        store.close()


def test_a_deleted_user_leaves_no_trace_in_the_files(server):
    store = RedisStore(server.url)
    changes = [Change(user, 0, [f"item of {user}"], [5], b"state") for user in ("anna", "berta")]
    assert store.apply(changes, "m") == [True, True]

    def files():
        found = [*server.folder.rglob("*.aof"), *server.folder.rglob("*.rdb")]
        return b"".join(path.read_bytes() for path in found)

    assert b"anna" in files()
    assert store.delete("anna") and not store.delete("anna")
    assert b"anna" not in files() and b"berta" in files()
    assert store.history("berta") == (["item of berta"], [5])
    store.close()


def test_events_are_in_the_order_of_their_times(either):
    store, late = RedisStore(either.url), 2**53
    events = [(late + 1, "b"), (late, "a"), (late + 1, "a"), (9, "\ud800"), (9, "\x00}:events")]
    for number, (time, item) in enumerate(events):
        assert store.apply([Change("u{", number, [item], [time], None)], "m") == [True]
    assert store.history("u{") == (
        ["\ud800", "\x00}:events", "a", "b", "a"],
        [9, 9, late, late + 1, late + 1],
    )
    assert store.snapshots(["u{", "u"], "m") == [
        Snapshot(5, late + 1, None),
        Snapshot(0, None, None),
    ]
    store.close()


@pytest.mark.parametrize("snapshots", [0, 1], ids=["a log", "a log and snapshots"])
def test_a_deletion_ends_when_the_files_are_written_anew(snapshots):
    """If it ended before, what it deletes would still be in the files of the server."""
    with StandIn(looks=2, rdb_saves=snapshots) as server:
        store = RedisStore(server.url)
        store.apply([Change(user, 0, ["i1"], [5], b"state") for user in ("anna", "berta")], "m")
        for known in (True, False):  # the second one may be there because the first one failed
            server.rewritten = []
            assert store.delete("anna") == known
            assert server.rewritten == ["log", "snapshot"][: 1 + snapshots]
            assert not server.rewriting
        assert all(b"{berta}" in key for key in server.values) and len(server.values) == 2
        store.close()


def test_a_deletion_whose_files_are_never_written_says_so():
    with StandIn(looks=None) as server:
        store = RedisStore(server.url)
        store.apply([Change("anna", 0, ["i1"], [5], None)], "m")
        store._timeout = 0.05
        with pytest.raises(StoreError, match=r"is deleted, but .* is still busy .* once more"):
            store.delete("anna")
        assert store.history("anna") == ([], [])
        store.close()


@pytest.mark.parametrize("others", [0, 1, 15])
def test_a_change_whose_answer_was_lost_is_made_once(redis_stand_in, monkeypatch, others):
    """Also where others have added events before it is sent again."""
    store, second = RedisStore(redis_stand_in.url), RedisStore(redis_stand_in.url)
    calls, script = [], redis_stand_in._evalsha

    def unheard_once(*command):
        calls.append(script(*command))
        if len(calls) > 1:
            return calls[-1]
        for number in range(others):  # the lock of the stand-in is ours, so not by its socket
            token, member = bytes([number]) * 8, b"%020d%020di2" % (6, number + 1)
            script(*command[:4], b"%d" % (number + 1), b"m", b"0", b"", b"%020d" % 6, token, member)
        raise ConnectionError

    monkeypatch.setattr(redis_stand_in, "_evalsha", unheard_once)
    assert store.apply([Change("anna", 0, ["i1"], [5], b"state")], "m") == [True]
    assert calls == [1, 1]
    assert second.history("anna") == (["i1"] + ["i2"] * others, [5] + [6] * others)
    assert store.apply([Change("anna", 0, ["i1"], [5], b"state")], "m") == [False]  # another one
    store.close()
    second.close()


def test_a_server_whose_answers_are_all_lost(redis_stand_in, monkeypatch):
    store, calls, script = RedisStore(redis_stand_in.url), [], redis_stand_in._evalsha

    def unheard(*command):
        calls.append(script(*command))
        raise ConnectionError

    monkeypatch.setattr(redis_stand_in, "_evalsha", unheard)
    with pytest.raises(StoreError, match="cannot be used"):
        store.apply([Change("anna", 0, ["i1"], [5], None)], "m")
    assert calls == [1, 1] and store.history("anna") == (["i1"], [5])
    store.close()


EVICTS = {"maxmemory": 100_000_000, "maxmemory_policy": "allkeys-lru"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["--appendonly", "no"], "keeps users in memory only; start it with `--appendonly yes`"),
        (
            ["--appendonly", "yes", "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"],
            "throws users away when its memory is full; set `maxmemory-policy noeviction`",
        ),
        ({"aof_enabled": 0}, "keeps users in memory only"),
        (EVICTS, "throws users away when its memory is full"),
    ],
)
def test_servers_that_would_lose_users_are_refused(tmp_path, settings, says):
    real = isinstance(settings, list)
    server = RedisServer(tmp_path, *settings) if real else StandIn(**settings)
    with server, pytest.raises(UserError, match=says):
        RedisStore(server.url)


def test_a_server_with_bounded_memory_that_throws_nothing_away_is_taken():
    with StandIn(**EVICTS | {"maxmemory_policy": "noeviction"}) as server:
        RedisStore(server.url).close()


def test_addresses_that_are_none():
    pytest.importorskip("redis", reason="the client of the extra redis is not installed")
    with pytest.raises(UserError, match="is no address of a Redis server"):
        RedisStore("http://localhost")
    with pytest.raises(StoreError, match="the store localhost:1 cannot be used"):
        RedisStore("redis://:secret@localhost:1")
