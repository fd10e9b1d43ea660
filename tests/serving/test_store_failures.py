"""A store that cannot be used: one sentence at the start, and status 503 while a service runs."""

import contextlib
import os
import random
import sqlite3
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httpx2", reason="its test client needs httpx2")

from fastapi.testclient import TestClient

from tim4rec_jax.serving import Recommender, SQLiteStore
from tim4rec_jax.serving.http.app import create_app
from tim4rec_jax.serving.stores import Change, StoreError

EVENTS = {"events": [{"user": "u", "item": "i4", "timestamp": 5}]}


@pytest.fixture
def folder():
    """A folder of somebody else than root, to whom every file is writable."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        folder, root = Path(name) / "stores", os.geteuid() == 0
        if root:
            os.seteuid(65534)  # nobody
        folder.mkdir()
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o777)


def filled(path):
    store = SQLiteStore(path)
    store.apply([Change(f"u{n}", 0, ["i"] * 50, [1] * 50, b"x" * 999) for n in range(50)], "m")
    store.close()


def read_only_file(path):
    filled(path)
    path.chmod(0o444)


def read_only_folder(path):
    filled(path)
    path.parent.chmod(0o555)


def new_in_a_read_only_folder(path):
    path.parent.chmod(0o555)


def a_folder(path):
    path.mkdir()


def a_pipe(path):
    os.mkfifo(path)


def another_format(path):
    path.write_bytes(b"no database " * 1000)


def other_columns(path):
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.executescript(
            "CREATE TABLE events (a); CREATE TABLE users (b); PRAGMA user_version = 1"
        )


def cut(path):
    filled(path)
    path.write_bytes(path.read_bytes()[:5000])


def damaged(path):
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + random.Random(0).randbytes(len(whole) - 8192))


def in_use(path):
    filled(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return other


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (read_only_file, "readonly.*; make the file and its folder writable"),
        (read_only_folder, "readonly.*; make the file and its folder writable"),
        (new_in_a_read_only_folder, "unable to open.*; name a file in a folder that exists"),
        (a_folder, "unable to open.*; name a file in a folder that exists"),
        (a_pipe, "disk I/O error; see to the disk, or name another file"),
        (another_format, "not a database; name another file"),
        (other_columns, "no such column.*; name another file"),
        (cut, "malformed; put a copy of the file in its place"),
        (damaged, "; put a copy of the file in its place"),
        (in_use, "locked; end the other process that writes to it"),
    ],
)
def test_one_sentence_at_the_start(folder, make, message):
    other = make(folder / "users.db")
    with pytest.raises(StoreError, match=f"^the store {folder}/users.db .*{message}"):
        store = SQLiteStore(folder / "users.db", timeout=0.0)
        with contextlib.closing(store):
            store.check()
    if other:
        other.close()


def test_a_sound_store_passes(tmp_path):
    filled(tmp_path / "users.db")
    store = SQLiteStore(tmp_path / "users.db")
    store.check()
    store.close()


def test_a_disk_that_becomes_read_only(recommenders, tmp_path):
    """What needs no writing is answered; the rest is no fault of the request."""
    shared = recommenders("causal")
    store = SQLiteStore(tmp_path / "users.db")
    recommender = Recommender(shared.model, shared.catalogue, store)
    recommender.update_batch([("u", "i1", 2), ("u", "i2", 3)])
    recommender.update("u", "i3", 1, sort=True)  # so that the state must be computed, and kept
    for connection in (store._connection, store._reader):
        connection.execute("PRAGMA query_only = ON")
    with TestClient(create_app(recommender), raise_server_exceptions=False) as client:
        for answer in (client.post("/events", json=EVENTS), client.delete("/users/u")):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["type"] == "unavailable"
            assert "users.db" not in answer.text
        found = client.post("/recommend", json={"user": "u"})
        assert found.status_code == 200
        assert not found.json()["fallback"]
        store._connection.execute("PRAGMA query_only = OFF")
        assert client.post("/events", json=EVENTS).json() == {"known": 1, "unknown": 0}
    assert store.history("u") == (["i3", "i1", "i2", "i4"], [1, 2, 3, 5])
    store.close()
