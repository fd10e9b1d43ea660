"""The service under attack: what one client does must not harm the others."""

import asyncio
import contextlib
import copy
import gc
import http.client
import json
import os
import socket
import threading
import time
from urllib.parse import quote

import jax
import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httpx2", reason="its test client needs httpx2")

from fastapi.testclient import TestClient
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from tests.serving.conftest import KINDS
from tests.serving.tiny_run import tiny_recommender
from tim4rec_jax.data.ids import IdIndex
from tim4rec_jax.errors import UserError
from tim4rec_jax.serving import MemoryStore, Recommender, SQLiteStore
from tim4rec_jax.serving.http import connection
from tim4rec_jax.serving.http.app import create_app
from tim4rec_jax.serving.http.micro_batcher import Batcher, ClientLeft, Overloaded
from tim4rec_jax.serving.http.server import Server, _read_token, listen
from tim4rec_jax.serving.stores import StoreError

HISTORY = {"items": ["i7", "i3", "i12"], "timestamps": [880_000_000, 880_000_000, 880_090_000]}


@pytest.fixture
def recommender(recommenders):
    """A recommender with a store of its own."""
    shared = recommenders("causal")
    return Recommender(shared.model, shared.catalogue)


@pytest.fixture
def client(recommender):
    with TestClient(create_app(recommender), raise_server_exceptions=False) as client:
        yield client


@contextlib.contextmanager
def served(recommender, load=None):
    """The service behind a real port, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(create_app(recommender), load or (lambda: recommender))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    server.port = listener.getsockname()[1]
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def connect(server, sent=b""):
    open_socket = socket.create_connection(("127.0.0.1", server.port))
    open_socket.settimeout(20)
    open_socket.sendall(sent)
    return open_socket


def post(path, body):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


def everything(open_socket):
    """What arrives until the other side ends the connection."""
    received = b""
    with open_socket, contextlib.suppress(ConnectionError):
        while part := open_socket.recv(65536):
            received += part
    return received.decode()


@pytest.mark.parametrize(
    "wrong",
    [
        {"items": []},
        HISTORY | {"timestamps": None},
        HISTORY | {"k": True},
        HISTORY | {"k": 1.0},
        HISTORY | {"exclude_seen": 1},
        HISTORY | {"items": ["i7", "i3", 1.5]},
        HISTORY | {"timestamps": [1, 2, 1_700_000_000_000]},
        HISTORY | {"deny": "i3"},
        HISTORY | {"at": 5},
        {"user": "u", "allow": [None]},
    ],
)
def test_no_wrong_request_gets_as_far_as_its_neighbours(client, recommender, monkeypatch, wrong):
    monkeypatch.setattr(recommender, "answer", lambda queries: 1 / 0)
    answer = client.post("/recommend", json=wrong)
    assert answer.status_code == 422
    assert answer.json()["error"]["type"] in ("invalid_request", "refused")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" * 10_000,
        b'{"k": NaN}',
        b'{"k": ' + b"9" * 5000 + b"}",
        b'{"user": "\\ud800"}',
        b"\xff",
    ],
)
def test_what_is_no_json(client, body):
    headers = {"content-type": "application/json"}
    answer = client.post("/recommend", content=body, headers=headers)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith("the body is no JSON")
    assert (
        client.post("/recommend", content=body, headers={"content-type": "text/plain"}).status_code
        == 415
    )


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("/recommend", b'{"items": ["i1"], "timestamps": [1], "k": 1, "k": 3}', "k"),
        ("/events", b'{"events": [{"user": "a:b", "us\\u0065r": "b", %s}]}', "user"),
        ("/events", b'{"sort": true, "sort": true, "events": [{"user": "a", %s}]}', "sort"),
    ],
)
def test_of_equal_keys_none_is_lost(client, path, body, key):
    body = body.replace(b"%s", b'"item": "i1", "timestamp": 1')
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    message = f"the key {key!r} stands 2 times in one object"
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, message)


def test_ids_with_any_marks(client):
    """A user with any id can be told of, and forgotten."""
    for user in ('a": 1, "b":', "a/b//", "line\r\nX: y", "...", "caf\u00e9"):
        event = {"user": user, "item": "i1", "timestamp": 1}
        assert client.post("/events", json={"events": [event]}).json()["known"] == 1
        assert client.delete("/users/" + quote(user, safe="")).json() == {"deleted": True}
    client.post("/events", json={"events": [{"user": "\ufffd", "item": "i1", "timestamp": 1}]})
    for address in ("/users/%ff", "/users/%ED%A0%80"):  # would stand for that user
        assert client.delete(address).status_code == 400
    assert client.delete("/users/%EF%BF%BD").json() == {"deleted": True}


def test_what_would_be_passed_over_is_refused(client):
    json_type = {"content-type": "application/json"}
    for headers, path, status in (
        (json_type | {"content-encoding": "gzip"}, "/recommend", 415),
        (json_type, "/recommend?k=5", 422),
        (json_type, "/recommend/", 404),
    ):
        answer = client.post(path, json=HISTORY, headers=headers, follow_redirects=False)
        assert (answer.status_code, "error" in answer.json()) == (status, True)
    answer = client.post("/reload", json={"path": "/etc"})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "path")
    assert client.get("/items?query=" + "a" * 101).json()["error"]["field"] == "query"


def test_large_requests_are_the_same(client, recommender):
    deny = [f"x{number}" for number in range(3000)] + ["i5", "i9"]
    found = client.post("/recommend", json=HISTORY | {"deny": deny}).json()
    expected = recommender.recommend(*HISTORY.values(), deny=["i5", "i9"])
    assert [item["item"] for item in found["items"]] == expected.items


def test_queries_that_differ_are_answered_together(recommenders):
    recommender = recommenders("causal")
    users = Recommender(recommender.model, recommender.catalogue)
    users.update_batch([("u", item, time) for item, time in zip(*HISTORY.values(), strict=True)])
    events, state = users.stored("u")
    stored = users.ranker.query(events, 6, None, True, None, None)
    options = [
        dict(k=3),
        dict(k=9, exclude_seen=False),
        dict(k=4, deny=["i1", "i2"]),
        dict(k=5, allow=["i1", "i4", "i9", "i11"], exclude_seen=False),
    ]
    queries = [recommender.query(*HISTORY.values(), **option) for option in options]
    queries += [recommender.query([], [], 2), stored._replace(hidden=users.model.hidden(state))]
    found = recommender.answer(queries)
    expected = [recommender.recommend(*HISTORY.values(), **option) for option in options]
    expected += [recommender.recommend([], [], 2), recommender.recommend(*HISTORY.values(), 6)]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.items, ours.fallback) == (theirs.items, theirs.fallback)
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-5, abs=1e-5)


def compilations(function):
    """How many programs JAX traces and compiles while a function runs."""
    counted = []

    def count(event, seconds, **details):
        if event.endswith(("backend_compile_duration", "jaxpr_trace_duration")):
            counted.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    return len(counted)


def all_kinds_of_requests(client, recommender):
    rng = np.random.default_rng(0)
    most = min(1000, recommender.model.sizes.ks[-1])

    def ask(body):
        answer = client.post("/recommend", json=body)
        assert answer.status_code == 200, answer.text

    at = {"at": 900_000_000} if recommender.model.knows_next_time else {}
    for number in (0, 1, 5, 6, 7, 31, 33, 300, 2000):
        items = [f"i{item}" for item in rng.integers(1, 40, number)]
        history = {"items": items, "timestamps": [880_000_000] * number} | at
        for name in ("allow", "deny"):
            for length in (0, 1, 2, 3, 17, 29, 100, 2000):
                ids = [f"i{item}" for item in rng.integers(1, 40, length)]
                seen = bool(length % 2)
                ask(history | {name: ids, "k": min(most, 1 + length), "exclude_seen": seen})
    for count in (1, 2, 5, 20, 70):
        events = [
            {"user": f"n{count}-{user}", "item": f"i{event + 1}", "timestamp": event}
            for user in range(count)
            for event in range(1 + user % 5)
        ]
        assert client.post("/events", json={"events": events}).status_code == 200
        ask({"user": f"n{count}-0"} | at)
    long = [
        {"user": "long", "item": f"i{event % 30 + 1}", "timestamp": event} for event in range(1100)
    ]
    assert client.post("/events", json={"events": long}).status_code == 200
    late = {"events": [long[7], long[3]], "sort": True}
    assert client.post("/events", json=late).status_code == 200
    ask({"user": "long"} | at)
    queries = [recommender.query(*HISTORY.values(), **at)] * 10
    for rows in range(1, 11):
        recommender.answer(queries[:rows])


def check_that_nothing_is_compiled(recommender):
    recommender.model.compile_ahead()
    with TestClient(create_app(recommender)) as client:
        client.post("/recommend", json={"user": "nobody"})  # what the test itself needs once
        assert compilations(lambda: jax.jit(lambda x: x + 1)(1.0)) > 0
        assert compilations(lambda: all_kinds_of_requests(client, recommender)) == 0


def test_nothing_is_compiled_for_a_request(tiny_data, monkeypatch):
    module = "tim4rec_jax.serving.compiled_model."
    for name, sizes in {"ROWS": (1, 16), "STEPS": (16,), "KS": (16,)}.items():
        monkeypatch.setattr(module + "_SERVICE_" + name, sizes)
    check_that_nothing_is_compiled(tiny_recommender(tiny_data, **KINDS["causal"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_compiled_for_a_request_of_any_model(tiny_data, kind):
    check_that_nothing_is_compiled(tiny_recommender(tiny_data, **KINDS[kind]))


def test_a_batcher_refuses_drops_and_goes_on():
    """The first call is held up; what waits meanwhile is refused, dropped, too late, or done."""
    entered, go, done = threading.Event(), threading.Event(), []

    def work(requests):
        entered.set()
        assert go.wait(20)
        done.extend(requests)
        return [ValueError(one) if one == "wrong" else one.upper() for one in requests]

    async def scenario():
        batcher = Batcher("test", work, max_batch=8, max_waiting=4, max_seconds=30)
        running = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher("first"))
        await asyncio.to_thread(entered.wait, 20)
        others = [asyncio.create_task(batcher(name)) for name in ("a", "wrong")]
        others += [asyncio.create_task(batcher("left", lambda: False))]
        await asyncio.sleep(0)
        batcher._max_seconds = -1
        others += [asyncio.create_task(batcher("late"))]
        await asyncio.sleep(0)
        assert batcher.full
        with pytest.raises(Overloaded):
            await batcher("one too many")
        go.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return results

    first, a, wrong, left, late = asyncio.run(scenario())
    assert (first, a, str(wrong)) == ("FIRST", "A", "wrong")
    assert (type(left), type(late)) == (ClientLeft, Overloaded)
    assert done == ["first", "a", "wrong"]


def test_too_much_is_refused_and_health_is_not(recommender, monkeypatch):
    entered, go = threading.Event(), threading.Event()
    real = recommender.answer

    def slow(queries):
        entered.set()
        assert go.wait(20)
        return real(queries)

    monkeypatch.setattr(recommender, "answer", slow)
    app = create_app(recommender)
    answers = app.state.service.answers
    answers._queue, answers._max_seconds = asyncio.Queue(2), 60
    statuses = []
    with TestClient(app) as client:
        assert client.get("/ready").status_code == 200

        def ask():
            statuses.append(client.post("/recommend", json=HISTORY).status_code)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        threads[0].start()
        assert entered.wait(20)
        for thread in threads[1:]:
            thread.start()
        while not answers.full:
            time.sleep(0.01)
        refused = client.post("/recommend", json=HISTORY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["type"] == "unavailable"
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        assert client.post("/events", json=EVENTS).status_code == 200
        go.set()
        for thread in threads:
            thread.join()
        assert client.get("/ready").status_code == 200
    assert statuses == [200] * 3


EVENTS = {"events": [{"user": "u", "item": "i1", "timestamp": 5}]}


def test_a_store_that_fails_is_not_the_fault_of_the_request(client, recommender, monkeypatch):
    def fail(*args):
        raise StoreError("the store /secret/users.db cannot be used: database is locked")

    for name in ("apply", "history", "delete"):
        monkeypatch.setattr(recommender.store, name, fail)
    for answer in (
        client.post("/events", json=EVENTS),
        client.post("/recommend", json={"user": "u"}),
        client.delete("/users/u"),
    ):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "secret" not in answer.text
        assert answer.json()["error"]["type"] == "unavailable"


def test_a_file_of_another_writer(tmp_path):
    """What SQLite says when it cannot be used is an error of the store."""
    first, second = SQLiteStore(tmp_path / "u.db"), SQLiteStore(tmp_path / "u.db", timeout=0.0)
    first._connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        second.delete("u")
    first._connection.execute("ROLLBACK")
    first.close()
    second.close()


def test_headers_of_errors(client):
    wrong_method = client.put("/recommend")
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
    for answer in (wrong_method, client.get("/health"), client.get("/nowhere"), client.get("/")):
        assert answer.headers["x-content-type-options"] == "nosniff"
    schema = client.get("/openapi.json").json()
    for path in ("/recommend", "/events", "/users/{user}"):
        [described] = schema["paths"][path].values()
        assert {"400", "401", "405", "413", "415", "422", "503"} <= set(described["responses"])
    assert "RecommendRequest" in schema["components"]["schemas"]


def test_a_pipe_in_the_place_of_a_token(tmp_path):
    os.mkfifo(tmp_path / "token")
    with pytest.raises(UserError, match=r"it is no file.*; name another file"):
        _read_token(tmp_path / "token")


def test_token_and_hosts(recommender):
    app = create_app(recommender, token="t" * 20, hosts=["testserver", "Example.org"])
    with TestClient(app) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": b"Bearer \xfc"}):
            for path in ("/metrics", "/items", "/openapi.json"):
                answer = client.get(path, headers=headers)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert client.post("/recommend", json=HISTORY, headers=headers).status_code == 401
        headers = {"authorization": "Bearer " + "t" * 20}
        assert client.post("/recommend", json=HISTORY, headers=headers).status_code == 200
        assert "HTTPBearer" in client.get("/openapi.json", headers=headers).text
        assert client.get("/health", headers={"host": "evil.com"}).status_code == 400
        assert client.get("/health", headers={"host": "EXAMPLE.org:80"}).status_code == 200


def test_connections_send_without_delay():
    """Otherwise the body of an answer waits for the receipt of its head."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_slow_and_long_requests(recommender, monkeypatch):
    for name in ("_HEAD_SECONDS", "_BODY_SECONDS"):
        monkeypatch.setattr(connection, name, 0.1)
    with served(recommender) as server:
        whole = post("/recommend", HISTORY)
        silent, half_head, half_body = (
            connect(server, part) for part in (b"", whole[:40], whole[:-5])
        )
        assert everything(silent) == ""
        for slow in (half_head, half_body):
            assert everything(slow).startswith("HTTP/1.1 408 ")
        start = b"GET /health HTTP/1.1\r\nHost: here\r\n"
        for request, status in {
            b"GET /?" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: here\r\n\r\n": 414,
            start + b"X: " + b"a" * 40_000 + b"\r\n\r\n": 431,
            start + b"X: " + b"a" * 40_000: 431,
            start + b"X: 1\r\n" * 101 + b"\r\n": 431,
            b"no http at all\r\n\r\n": 400,
            b"GET /health HTTP/1.1\r\n\r\n": 400,
            start + b"Host: there\r\n\r\n": 400,
            start + b"Content-Length: 2000000000\r\n\r\n": 413,
            post("/recommend", {"user": "u" * (1 << 21)}): 413,
        }.items():
            if status == 400 and request.startswith(b"GET"):
                request = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
            answer = everything(connect(server, request))
            assert answer.startswith(f"HTTP/1.1 {status} ")
            assert "nosniff" in answer
            assert "error" in json.loads(answer.partition("\r\n\r\n")[2])


def test_many_requests_at_once_on_one_connection(recommender):
    """All are answered in order; what is no HTTP ends the connection after the earlier answers."""
    many = [post("/recommend", HISTORY | {"k": k}) for k in range(1, 20)]
    waits = post("/recommend", HISTORY).replace(b"Host", b"Expect: 100-continue\r\nHost")
    with served(recommender) as server:
        received = everything(connect(server, b"".join([waits, *many, b"no http\r\n\r\n"])))
        assert received.startswith("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
        numbers = [part.count('"score"') for part in received.split("HTTP/1.1 200 OK")[1:]]
        assert numbers == [10, *range(1, 20)]
        # Who sends thousands without reading is refused, and all that was begun is answered.
        received = everything(connect(server, many[0] * 1000))
        assert 1 <= received.count("HTTP/1.1 200 OK") < 100
        assert "connection: close" in received


def test_who_sends_no_more_is_answered(recommender):
    whole = post("/recommend", HISTORY)
    with served(recommender) as server:
        for sent, statuses in {
            b"": [],
            whole: [200],
            whole * 3: [200] * 3,
            whole[:40]: [400],
            whole[:-5]: [400],
            whole + whole[:-5]: [200],
        }.items():
            open_socket = connect(server, sent)
            open_socket.shutdown(socket.SHUT_WR)
            answers = everything(open_socket).split("HTTP/1.1 ")[1:]
            assert [int(answer[:3]) for answer in answers] == statuses
            assert all("connection: close" in answer for answer in answers[-1:])


def test_requests_leave_no_cycles_of_references(recommender):
    """To find them Python would search all objects, and answer nobody for milliseconds."""
    with served(recommender) as server:
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                kept = connect(server, post("/recommend", HISTORY) * 2)
                kept.shutdown(socket.SHUT_WR)
                assert everything(kept).count("200 OK") == 2
            deadline = time.monotonic() + 20
            while server.server_state.connections and time.monotonic() < deadline:
                time.sleep(0.01)
            left = sum(isinstance(one, RequestResponseCycle) for one in gc.get_objects())
        finally:
            gc.enable()
    assert left < 5


def test_clients_that_would_rather_speak_http_2(recommender):
    """Their requests and those that follow are answered in HTTP/1.1."""
    asks = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHost"
    upgrade = post("/recommend", HISTORY).replace(b"Host", asks)
    with served(recommender) as server:
        open_socket = connect(server, upgrade * 2 + post("/recommend", HISTORY))
        open_socket.shutdown(socket.SHUT_WR)
        assert everything(open_socket).count("HTTP/1.1 200 OK") == 3


def test_another_log_is_no_new_run(tiny_data, recommenders):
    shared = recommenders("causal")
    other = Recommender(shared.model, shared.catalogue)
    other.catalogue = copy.copy(shared.catalogue)
    other.catalogue._index = IdIndex(pa.array([f"x{item}" for item in shared.catalogue.ids]))
    server = Server(create_app(shared), lambda: other)
    with pytest.raises(UserError, match="knows 0 of the 30 items that are served now"):
        server.load_again()
    assert server._service.recommender is shared


def test_too_many_connections_end_the_one_that_does_nothing(recommender, monkeypatch):
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)
    with served(recommender) as server:
        idle = [connect(server)]
        while not server.server_state.connections:
            time.sleep(0.01)
        idle += [connect(server) for _ in range(2)]
        while len(server.server_state.connections) < 3:
            time.sleep(0.01)
        request = post("/recommend", HISTORY).replace(b"Host", b"Connection: close\r\nHost")
        assert everything(connect(server, request)).startswith("HTTP/1.1 200 ")
        assert everything(idle[0]) == ""
        idle[1].sendall(request)
        assert everything(idle[1]).startswith("HTTP/1.1 200 ")
        idle[2].close()


def test_a_server_ends_with_half_a_request_open(recommender):
    with served(recommender) as server:
        whole = post("/recommend", HISTORY)
        half = [connect(server, whole[:40]), connect(server, whole[:-5]), connect(server)]
        while len(server.server_state.connections) < 3:
            time.sleep(0.01)
        time.sleep(0.1)
    for open_socket in half[:2]:
        assert everything(open_socket).startswith("HTTP/1.1 503 ")
    assert everything(half[2]) == ""


def test_another_run_takes_over(recommenders, tiny_data, capsys):
    store = MemoryStore()
    shared = recommenders("causal")
    old = Recommender(shared.model, shared.catalogue, store)
    new = tiny_recommender(tiny_data, store, **KINDS["causal"], seed=5)
    loaded = [new]
    with served(old, lambda: loaded.pop()) as server:
        keep = connect(server)

        def ask(body):
            keep.sendall(post("/recommend", body))
            with http.client.HTTPResponse(keep) as answer:
                answer.begin()
                assert answer.status == 200
                return [item["item"] for item in json.loads(answer.read())["items"]]

        old.update_batch([("u", *event) for event in zip(*HISTORY.values(), strict=True)])
        assert ask(HISTORY) == ask({"user": "u"}) == old.recommend(*HISTORY.values()).items
        server.reload()
        assert ask(HISTORY) == ask({"user": "u"}) == new.recommend(*HISTORY.values()).items
        assert new.recommend(*HISTORY.values()).items != old.recommend(*HISTORY.values()).items

        def fail():
            raise UserError("there is no run")

        server._load = fail
        keep.sendall(post("/reload", {}))
        with http.client.HTTPResponse(keep) as answer:
            answer.begin()
            assert (answer.status, b"token-file" in answer.read()) == (403, True)
        server._service.reload = server.load_again
        keep.sendall(post("/reload", {}))
        with http.client.HTTPResponse(keep) as answer:
            answer.begin()
            error = json.loads(answer.read())["error"]
            assert (answer.status, error["type"]) == (409, "conflict")
            assert error["message"] == "there is no run; the earlier run goes on"
        server.reload()
        assert "there is no run; the earlier run goes on" in capsys.readouterr().err
        assert ask(HISTORY) == new.recommend(*HISTORY.values()).items
        keep.close()


def test_the_end_of_the_service_answers_what_still_waits(recommenders, caplog):
    begun, go_on = threading.Event(), threading.Event()

    def load_slowly():
        begun.set()
        go_on.wait(20)

    with served(recommenders("causal")) as server:
        server._service.reload = load_slowly
        server.config.timeout_graceful_shutdown = 0.05
        with connect(server) as waiting:
            waiting.sendall(post("/reload", {}))
            begun.wait(20)
            server.should_exit = True
            with http.client.HTTPResponse(waiting) as answer:
                answer.begin()
                assert (answer.status, b"the service ends" in answer.read()) == (503, True)
            go_on.set()
    assert not [record for record in caplog.records if record.exc_info]


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    store = MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path / "users.db")
    yield store
    store.close()


def test_a_user_is_forgotten(recommenders, store, tmp_path):
    shared = recommenders("causal")
    recommender = Recommender(shared.model, shared.catalogue, store)
    with TestClient(create_app(recommender)) as client:
        events = [
            {"user": f"{name}/secret", "item": item, "timestamp": time}
            for name in ("anna", "bert")
            for item, time in zip(*HISTORY.values(), strict=True)
        ]
        client.post("/events", json={"events": events})
        assert not client.post("/recommend", json={"user": "anna/secret"}).json()["fallback"]
        assert client.delete("/users/anna%2Fsecret").json() == {"deleted": True}
        assert client.delete("/users/anna/secret").json() == {"deleted": False}
        assert client.post("/recommend", json={"user": "anna/secret"}).json()["fallback"]
        assert not client.post("/recommend", json={"user": "bert/secret"}).json()["fallback"]
        bytes_left = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert b"anna" not in bytes_left
        assert (b"bert" in bytes_left) == isinstance(store, SQLiteStore)


def test_a_state_does_not_outlive_its_user(recommenders, monkeypatch):
    """The state is computed while the user is deleted and begins anew with as many events."""
    shared, store = recommenders("causal"), MemoryStore()
    recommender = Recommender(shared.model, shared.catalogue, store)
    recommender.update_batch([("u", "i1", 5), ("u", "i2", 6)])
    recommender.update("u", "i3", 4, sort=True)  # so that there is no state
    real = shared.model.advance

    def meanwhile(new):
        monkeypatch.setattr(shared.model, "advance", real)
        recommender.delete_user("u")
        recommender.update_batch([("u", "i7", 1), ("u", "i8", 2), ("u", "i9", 3)])
        return real(new)

    monkeypatch.setattr(shared.model, "advance", meanwhile)
    recommender.compute_states(["u"])
    [kept] = store.snapshots(["u"], shared.model.fingerprint)
    fresh = Recommender(shared.model, shared.catalogue)
    fresh.update_batch([("u", "i7", 1), ("u", "i8", 2), ("u", "i9", 3)])
    assert kept == fresh.store.snapshots(["u"], shared.model.fingerprint)[0]


def test_callers_who_tell_events_at_once(recommenders, store, monkeypatch):
    """Only the one whose events are out of order is refused; late events compute nothing."""
    shared = recommenders("causal")
    recommender = Recommender(shared.model, shared.catalogue, store)
    recommender.update("u", "i1", 100)
    told = [
        ([("u", "i2", 110), ("v", "i2", 7)], False),
        ([("w", "i4", 9), ("u", "i3", 50)], False),
        ([("u", "i5", 110), ("x", "new", 1)], False),
        ([("v", "i6", -1)], False),
    ]
    first, wrong, third, negative = recommender.update_many(told)
    assert (first, third) == ([True, True], [True, False])
    assert "earlier than one at 110" in str(wrong)
    assert "negative" in str(negative)
    assert store.history("u") == (["i1", "i2", "i5"], [100, 110, 110])
    assert store.history("w") == ([], [])
    monkeypatch.setattr(shared.model, "advance", lambda new: 1 / 0)
    assert recommender.update_many([([("u", "i3", n)], True) for n in range(20)]) == [[True]] * 20
    assert len(store.history("u")[0]) == 23


def test_lists_and_times_that_are_none(recommenders):
    recommender = recommenders("causal")
    for name in ("allow", "deny"):
        with pytest.raises(UserError, match=f"{name} is the single text 'i1'; give a list"):
            recommender.recommend(*HISTORY.values(), **{name: "i1"})
    milliseconds = [time * 1000 for time in HISTORY["timestamps"]]
    with pytest.raises(UserError, match="divide milliseconds by 1,000"):
        recommender.recommend(HISTORY["items"], milliseconds)
    with pytest.raises(UserError, match="divide milliseconds by 1,000"):
        Recommender(recommender.model, recommender.catalogue).update("u", "i1", milliseconds[0])
