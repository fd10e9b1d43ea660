"""Users of a store: streaming, concurrent callers, other models, `kill -9`."""

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from tests.data.small_dataset import random_histories
from tests.serving.conftest import KINDS
from tests.serving.tiny_run import (
    LENGTHS,
    MAX_LENGTH,
    ONE_DEVICE,
    tiny_model,
    tiny_recommender,
)
from tim4rec_jax.data import time_gaps
from tim4rec_jax.errors import UserError
from tim4rec_jax.serving import MemoryStore, Recommender, SQLiteStore
from tim4rec_jax.serving.compiled_model import CompiledModel
from tim4rec_jax.serving.stores import Change, Snapshot, StoreError

ROOT = Path(__file__).parents[2]
HISTORIES = [
    ([f"i{item}" for item in items], times.tolist()) for items, times in random_histories(LENGTHS)
]


def with_store(recommender, store):
    return Recommender(recommender.model, recommender.catalogue, store)


def interleaved(histories):
    """All events of all histories, first events first."""
    rows = [[(f"u{user}", *event) for event in zip(*h, strict=True)] for user, h in histories]
    return [event for events in itertools.zip_longest(*rows) for event in events if event]


def full_forward(recommender, items, times):
    """Hidden state after the whole history by the model itself, in one pass."""
    model, count = recommender.model, len(items)
    missing = (0, 128 - count)
    indices = np.pad(recommender.catalogue.indices(items), missing)[None]
    lengths = np.array([count], np.int32)
    gaps = time_gaps(np.pad(times, missing)[None], lengths, model.convention)
    return np.asarray(encode(model.sequence_model, indices, lengths, gaps))


encode = nnx.jit(lambda model, *inputs: model.encode(*inputs))


def test_streaming_equals_the_full_forward(recommenders, store):
    """Whatever the steps: one event, a few, users mixed, thousands at once."""
    recommender = with_store(recommenders("causal"), store)
    events = interleaved(enumerate(HISTORIES))
    for first, last in itertools.pairwise([0, 1, 9, len(events)]):
        assert all(recommender.update_batch(events[first:last]))
    for user, (items, times) in enumerate(HISTORIES):
        state = recommender._users.state(f"u{user}")
        ours, theirs = recommender.model.hidden(state), full_forward(recommender, items, times)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        found = recommender.recommend_user(f"u{user}", k=5)
        assert not set(found.items) & set(items)
        if len(items) <= MAX_LENGTH:
            assert found.items == recommender.recommend(items, times, k=5).items


def test_other_models_compute_the_last_events(recommenders, store):
    recommender = with_store(recommenders("masked"), store)
    recommender.update_batch(interleaved(enumerate(HISTORIES)))
    for user, (items, times) in enumerate(HISTORIES[:4]):
        assert recommender.recommend_user(f"u{user}") == recommender.recommend(items, times)


def test_filters_and_moments_of_stored_users(recommenders, store):
    recommender, (items, times) = with_store(recommenders("next_time"), store), HISTORIES[2]
    recommender.update_batch(interleaved([(0, HISTORIES[2])]))
    at, filters = times[-1] + 500, dict(allow=["i2", "i9", "i7"], deny=["i9"], exclude_seen=False)
    ours = recommender.recommend_user("u0", 5, at=at, **filters)
    theirs = recommender.recommend(items, times, 5, at=at, **filters)
    assert ours.items == theirs.items
    assert ours.scores == pytest.approx(theirs.scores, rel=1e-5)
    with pytest.raises(UserError, match="before the last event"):
        recommender.recommend_user("u0", at=times[-1] - 1)


def test_of_updates_that_are_stored_together_each_is_stored_or_refused(recommenders, monkeypatch):
    monkeypatch.setattr("tim4rec_jax.serving.user_state.MAX_ROWS", 4)
    store = MemoryStore()
    recommender = with_store(recommenders("causal"), store)
    applied = store.apply

    def apply(changes, model):
        if any(change.user == "b2" for change in changes):
            raise StoreError("full")
        return applied(changes, model)

    monkeypatch.setattr(store, "apply", apply)
    requests = [([(f"{who}{n}", "i1", 5) for n in range(3)], False) for who in "abc"]
    first, second, third = recommender.update_many(requests)
    assert first == [True] * 3
    assert isinstance(second, StoreError) and isinstance(third, StoreError)
    known = [bool(store.history(f"{who}{n}")[0]) for who in "abc" for n in range(3)]
    assert known == [True] * 3 + [False] * 6


def test_strangers_and_unknown_items(recommenders, store):
    recommender = with_store(recommenders("causal"), store)
    assert recommender.update("anna", "new", 5) is False
    assert recommender.unknown_events == 1
    assert recommender.recommend_user("anna").fallback
    assert recommender.update(7, "i1", np.int64(5)) is True
    assert not recommender.recommend_user("7").fallback
    assert store.history("7") == (["i1"], [5])


@pytest.mark.parametrize("wrong", [None, float("nan"), 5.0, True, ("u",), b"u"])
def test_what_is_no_id(recommenders, wrong):
    """A table with a gap has None or NaN there, and its other whole numbers are floats."""
    store = MemoryStore()
    recommender = with_store(recommenders("masked"), store)
    asked = [
        lambda: recommender.update(wrong, "i1", 5),
        lambda: recommender.update("u", wrong, 5),
        lambda: recommender.update_batch([("u", "i1", 5), (wrong, "i1", 6)]),
        lambda: recommender.recommend_user(wrong),
        lambda: recommender.compute_states([wrong]),
        lambda: recommender.delete_user(wrong),
    ]
    for ask in asked:
        with pytest.raises(UserError, match=r"(user|item) is .*; ids are texts or whole numbers"):
            ask()
    assert not store._users
    first, second = recommender.update_many([([(wrong, "i1", 5)], False), ([(7, "i1", 5)], False)])
    assert isinstance(first, UserError) and second == [True]
    assert list(store._users) == ["7"]


def test_late_events(recommenders, store):
    recommender = with_store(recommenders("causal"), store)
    recommender.update("u", "i1", 10)
    recommender.update("u", "i3", 30)
    for events in ([("u", "i2", 20)], [("u", "i4", 40), ("u", "i2", 35)]):
        with pytest.raises(UserError, match=r"event of user 'u' at time .* is earlier than one at"):
            recommender.update_batch(events)
    assert store.history("u") == (["i1", "i3"], [10, 30])
    recommender.update("u", "i2", 20, sort=True)
    assert store.history("u") == (["i1", "i2", "i3"], [10, 20, 30])
    recommender.update("u", "i4", 30)
    items, times = ["i1", "i2", "i3", "i4"], [10, 20, 30, 30]
    assert store.history("u") == (items, times)
    hidden = recommender.model.hidden(recommender._users.state("u"))
    np.testing.assert_allclose(hidden, full_forward(recommender, items, times), atol=1e-5)


def test_a_state_of_another_model_is_computed_anew(tiny_data, recommenders, store):
    with_store(recommenders("causal"), store).update_batch(interleaved([(0, HISTORIES[4])]))
    other = tiny_recommender(tiny_data, store, **KINDS["causal"], seed=5)
    [snapshot] = store.snapshots(["u0"], other.model.fingerprint)
    assert (snapshot.events, snapshot.state) == (14, None)
    hidden = other.model.hidden(other._users.state("u0"))
    np.testing.assert_allclose(hidden, full_forward(other, *HISTORIES[4]), rtol=1e-5, atol=1e-5)
    assert store.snapshots(["u0"], other.model.fingerprint)[0].state is not None  # and kept
    # An update finds the same way, without being asked for a recommendation first.
    (items, times), later = HISTORIES[4], HISTORIES[4][1][-1] + 9
    first = with_store(recommenders("causal"), store)
    first.update("u0", "i8", later)
    hidden = first.model.hidden(first._users.state("u0"))
    expected = full_forward(first, [*items, "i8"], [*times, later])
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)


def test_a_state_before_an_event_of_an_unknown_item_is_not_kept(recommenders, store):
    """A run that no longer knows the user's last item would count the next gap from its time."""
    recommender = with_store(recommenders("causal"), store)
    store.apply([Change("u", 0, ["i1", "gone"], [100, 1000], None)], "an earlier run")
    [state] = recommender.compute_states(["u"])
    hidden = recommender.model.hidden(state)
    np.testing.assert_allclose(hidden, full_forward(recommender, ["i1"], [100]), atol=1e-5)
    recommender.update("u", "i3", 1060)
    for _ in range(2):  # the second one is what the first one has kept
        hidden = recommender.model.hidden(recommender._users.state("u"))
        expected = full_forward(recommender, ["i1", "i3"], [100, 1060])
        np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)
    assert recommender.stored("u")[1] is not None


def test_long_logs_take_several_rounds(recommenders, store, monkeypatch):
    monkeypatch.setattr("tim4rec_jax.serving.compiled_model._STEPS", (1, 16))
    recommender = with_store(recommenders("causal"), store)
    recommender.update_batch(interleaved(enumerate(HISTORIES)))
    for user, history in enumerate(HISTORIES):
        hidden = recommender.model.hidden(recommender._users.state(f"u{user}"))
        np.testing.assert_allclose(hidden, full_forward(recommender, *history), atol=1e-5)


@pytest.mark.parametrize("store", ["memory", "sqlite", "redis", "redis stand-in"], indirect=True)
def test_stores_refuse_what_was_computed_from_an_older_state(store):
    assert store.apply([Change("u", 0, ["i1"], [5], b"one")], "m") == [True]
    changes = [Change("u", 0, ["i2"], [6], b"x"), Change("v", 0, ["i3"], [7], b"y")]
    assert store.apply(changes, "m") == [False, True]
    assert store.history("u") == (["i1"], [5])
    users = store.snapshots(["u", "v", "w"], "m")
    assert users == [Snapshot(1, 5, b"one"), Snapshot(1, 7, b"y"), Snapshot(0, None, None)]
    assert store.snapshots(["u"], "another") == [Snapshot(1, 5, None)]
    # A change without a state, and out of order, must not leave the old state behind.
    assert store.apply([Change("u", 1, ["i4", "i2"], [9, 4], None)], "m") == [True]
    assert store.snapshots(["u"], "m") == [Snapshot(3, 9, None)]
    assert store.history("u") == (["i2", "i1", "i4"], [4, 5, 9])


def test_threads_lose_nothing(recommenders, store):
    """All update the same three users; a state in which an event was lost would be another."""
    recommender = with_store(recommenders("causal"), store)
    errors = []

    def work(number):
        try:
            for event in range(10):
                recommender.update(f"u{event % 3}", f"i{number + 1}", 5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    check_users(recommender, {"u0": 24, "u1": 18, "u2": 18})


def test_connections_to_one_file_lose_nothing(tmp_path):
    """Two stores share a file as two processes do; each tries again what was refused."""
    stores = [SQLiteStore(tmp_path / "users.db") for _ in range(2)]
    errors = []

    def work(store, name):
        try:
            for number in range(30):
                done = False
                while not done:
                    [snapshot] = store.snapshots(["u"], "m")
                    state = (snapshot.state or b"") + name
                    change = Change("u", snapshot.events, [f"i{number}"], [5], state)
                    [done] = store.apply([change], "m")
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(stores, (b"a", b"b"), strict=True)
    ]
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


def test_a_file_has_one_writer_at_a_time(tmp_path, monkeypatch):
    """From the moment when a writer reads how many events there are."""
    first, second = (
        SQLiteStore(tmp_path / "users.db"),
        SQLiteStore(tmp_path / "users.db", timeout=0.0),
    )
    late, real = Change("u", 0, ["i2"], [6], b"late"), first._apply

    def apply(change, model):
        with pytest.raises(UserError, match="locked"):
            second.apply([late], "m")
        return real(change, model)

    monkeypatch.setattr(first, "_apply", apply)
    assert first.apply([Change("u", 0, ["i1"], [5], b"first")], "m") == [True]
    assert second.apply([late], "m") == [False]
    assert second.snapshots(["u"], "m") == [Snapshot(1, 5, b"first")]
    first.close()
    second.close()


def check_users(recommender, counts):
    for user, count in counts.items():
        items, times = recommender.store.history(user)
        assert len(items) == count
        [snapshot] = recommender.store.snapshots([user], recommender._users.fingerprint)
        assert (snapshot.events, snapshot.last) == (count, times[-1])
        hidden = recommender.model.hidden(snapshot.state)
        expected = full_forward(recommender, items, times)
        np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)


PROCESS = """
import sys
from tim4rec_jax.serving import Recommender, SQLiteStore

workdir, path, first, last = sys.argv[1:]
recommender = Recommender.load(workdir, SQLiteStore(path))
print("ready", flush=True)
sys.stdin.readline()
for event in range(int(first), int(last)):
    recommender.update(f"n{event % 3}", f"i{event % 30 + 1}", 5)
    print(event, flush=True)
"""


def start_process(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, *map(str, arguments)],
        cwd=ROOT,
        env=ONE_DEVICE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_processes_lose_nothing_and_a_kill_leaves_whole_events(tiny_workdir, tmp_path):
    """Two processes update the same new users; one of them is killed in the midst of it."""
    path = tmp_path / "users.db"
    arguments = [(0, 60), (120, 10**6)]
    processes = [start_process(tiny_workdir, path, *bounds) for bounds in arguments]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    killed, done = processes[-1], [120]
    while done[-1] < 150:
        done.append(int(killed.stdout.readline()))
    time.sleep(0.003)
    os.kill(killed.pid, signal.SIGKILL)
    # Not `communicate`, which would not see the lines that `readline` has read ahead.
    done += map(int, killed.stdout.read().split())
    killed.communicate()
    processes[0].communicate()
    assert processes[0].returncode == 0

    store = SQLiteStore(path)
    recommender = Recommender.load(tiny_workdir, store)
    counts = {user: len(store.history(user)[0]) for user in ("n0", "n1", "n2")}
    # Everything that was reported is there; the last one may be, before it was reported.
    assert sum(counts.values()) - 60 - len(done[1:]) in (0, 1)
    check_users(recommender, counts)
    store.close()


def test_a_file_that_is_no_store(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no database at all" * 100)
    with pytest.raises(UserError, match="file is not a database"):
        SQLiteStore(path)
    SQLiteStore(tmp_path / "users.db").close()
    SQLiteStore(tmp_path / "users.db").close()  # opens it again
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE orders (id INTEGER)")
    for version in (0, 1):
        other.execute(f"PRAGMA user_version = {version}")
        before = (tmp_path / "other.db").read_bytes()
        with pytest.raises(UserError, match="not a store of version 1"):
            SQLiteStore(tmp_path / "other.db")
        assert (tmp_path / "other.db").read_bytes() == before
    other.close()
    with pytest.raises(UserError, match="cannot be used: unable to open"):
        SQLiteStore(tmp_path / "no" / "folder.db")


def test_a_store_that_fills_its_disk(tmp_path):
    store = SQLiteStore(tmp_path / "users.db")
    store._connection.execute("PRAGMA max_page_count = 8")
    with pytest.raises(UserError, match="database or disk is full"):
        store.apply([Change("u", 0, ["i1"], [5], bytes(10**6))], "m")
    assert store.history("u") == ([], [])
    assert store.apply([Change("u", 0, ["i1"], [5], b"small")], "m") == [True]
    store.close()


def test_states_in_half_the_bytes(tiny_data, recommenders):
    """Each of n events rounds the state of each of two layers, by at most 2^-9 of it."""
    whole = recommenders("causal")
    config, model = tiny_model(tiny_data, **KINDS["causal"])
    half = CompiledModel(config, model, whole.catalogue.ids, "bfloat16")
    assert half.fingerprint != whole.model.fingerprint
    width = half.hidden(half.no_events).nbytes
    assert 2 * (len(half.no_events) - width) == len(whole.model.no_events) - width
    recommender = Recommender(half, whole.catalogue)
    for event in interleaved(enumerate(HISTORIES[:5])):
        recommender.update(*event)
    for user, (items, times) in enumerate(HISTORIES[:5]):
        hidden = half.hidden(recommender._users.state(f"u{user}"))
        expected = full_forward(whole, items, times)
        assert np.abs(hidden - expected).max() <= 2 * len(items) * 2**-9 * np.abs(expected).max()
