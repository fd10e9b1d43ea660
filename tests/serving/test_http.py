"""The HTTP service, in this process."""

import threading
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httpx2", reason="its test client needs httpx2")

from fastapi.testclient import TestClient

from tim4rec_jax.serving import Recommender
from tim4rec_jax.serving.http.app import create_app

HISTORY = {"items": ["i7", "i3", "i12"], "timestamps": [880_000_000, 880_000_000, 880_090_000]}


@pytest.fixture(scope="module")
def recommender(recommenders):
    """A recommender with a store of its own."""
    shared = recommenders("causal")
    return Recommender(shared.model, shared.catalogue)


@pytest.fixture(scope="module")
def client(recommender):
    app = create_app(recommender, max_body=10_000)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_recommends_what_the_library_does(client, recommender):
    answer = client.post("/recommend", json=HISTORY | {"k": 4, "deny": ["i5"]})
    assert answer.status_code == 200
    expected = recommender.recommend(*HISTORY.values(), 4, deny=["i5"])
    found = answer.json()
    assert [item["item"] for item in found["items"]] == expected.items
    assert [item["score"] for item in found["items"]] == pytest.approx(expected.scores, rel=1e-5)
    titles = [None if item == "i3" else f"Title of {item}" for item in expected.items]
    assert [item["title"] for item in found["items"]] == titles
    assert (found["unknown"], found["fallback"]) == (0, False)


def test_events_then_user(client, recommender):
    told = [
        {"user": 17, "item": item, "timestamp": time}
        for item, time in zip([*HISTORY["items"], "nobody"], [10, 20, 30, 40], strict=True)
    ]
    answer = client.post("/events", json={"events": told})
    assert answer.json() == {"known": 3, "unknown": 1}
    found = client.post("/recommend", json={"user": "17", "k": 3}).json()
    expected = recommender.recommend(HISTORY["items"], [10, 20, 30], 3)
    assert [item["item"] for item in found["items"]] == expected.items
    early = client.post("/events", json={"events": [told[0]]})
    assert early.status_code == 422
    assert early.json()["error"]["type"] == "refused"


def test_unknown_items_and_nobody(client):
    found = client.post("/recommend", json={"items": [1, 2], "timestamps": [1, 2]}).json()
    assert (found["unknown"], found["fallback"]) == (2, True)
    assert client.post("/recommend", json={"user": "nobody"}).json()["fallback"]


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, None, "either a user, or items"),
        (HISTORY | {"user": "u"}, None, "either a user, or items"),
        (HISTORY | {"timestamps": [1]}, None, "same length"),
        (HISTORY | {"k": 0}, "k", "greater than or equal to 1"),
        (HISTORY | {"timestamps": [1, 2, "noon"]}, "timestamps.2", "valid integer"),
        (HISTORY | {"timestamps": [1, 2, -3]}, "timestamps.2", "greater than or equal to 0"),
        (HISTORY | {"best": 3}, "best", "not permitted"),
    ],
)
def test_requests_that_make_no_sense(client, body, field, words):
    answer = client.post("/recommend", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["field"]) == (422, "invalid_request", field)
    assert words in error["message"]


def test_refused_by_the_model(client):
    answer = client.post("/recommend", json=HISTORY | {"timestamps": [3, 2, 1]})
    assert answer.status_code == 422
    assert answer.json()["error"]["type"] == "refused"
    assert "earlier than the one before" in answer.json()["error"]["message"]
    assert client.post("/recommend", json=HISTORY | {"at": 881_000_000}).status_code == 422


def test_errors_of_http(client, monkeypatch, recommender):
    def check(answer, status, kind):
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)

    check(client.get("/nowhere"), 404, "not_found")
    check(client.get("/recommend"), 405, "method_not_allowed")
    headers = {"content-type": "application/json"}
    check(client.post("/recommend", content=b"{", headers=headers), 422, "invalid_request")
    long = b" " * 10_001
    check(client.post("/recommend", content=long, headers=headers), 413, "too_large")
    pieces = (b" " * 1000 for _ in range(20))  # of a length nobody announced
    check(client.post("/recommend", content=pieces, headers=headers), 413, "too_large")
    monkeypatch.setattr(recommender, "answer", lambda queries: 1 / 0)
    check(client.post("/recommend", json=HISTORY), 500, "internal")


def test_items(client):
    assert [item["item"] for item in client.get("/items?query=title of i7").json()] == ["i7"]
    everything = client.get("/items?limit=100").json()
    counts = [item["count"] for item in everything]
    assert len(everything) == 30
    assert counts == sorted(counts, reverse=True)


def test_health_metrics_and_page(client):
    health = client.get("/health").json()
    assert health["status"] == "ok"
    assert (health["items"], health["streaming"]) == (30, True)
    client.get("/made/up")
    lines = client.get("/metrics").text.splitlines()
    assert 'tim4rec_requests_total{path="/health",status="200"} 1.0' in lines
    assert any(
        line.startswith('tim4rec_requests_total{path="other",status="404"}') for line in lines
    )
    assert not any("made/up" in line for line in lines)
    assert any(line.startswith('tim4rec_request_seconds_bucket{le="0.1"') for line in lines)
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "Content-Security-Policy" in page.headers
    schema = client.get("/openapi.json").json()
    assert "ErrorBody" in schema["components"]["schemas"]


def test_concurrent_requests_share_a_call(recommender, monkeypatch):
    """Nine requests arrive while one is computed; only the wrong one among them fails."""
    sizes, entered, go = [], threading.Event(), threading.Event()
    real = recommender.answer

    def slow(queries):
        sizes.append(len(queries))
        entered.set()
        assert go.wait(20)
        return real(queries)

    monkeypatch.setattr(recommender, "answer", slow)
    app, answers = create_app(recommender), {}
    with TestClient(app) as client:

        def ask(name, body):
            answers[name] = client.post("/recommend", json=body)

        threads = [threading.Thread(target=ask, args=("first", HISTORY))]
        threads[0].start()
        assert entered.wait(20)
        wrong = HISTORY | {"timestamps": [3, 2, 1]}
        bodies = {number: HISTORY for number in range(8)} | {"wrong": wrong}
        threads += [threading.Thread(target=ask, args=item) for item in bodies.items()]
        for thread in threads[1:]:
            thread.start()
        assert client.get("/health").status_code == 200  # the event loop is free
        time.sleep(0.5)
        go.set()
        for thread in threads:
            thread.join()
        counted = client.get("/metrics").text
    assert answers.pop("wrong").status_code == 422
    assert {answer.status_code for answer in answers.values()} == {200}
    # A product of one row and one of several may round the last bit in different ways.
    alone = answers.pop("first").json()
    assert len({answer.text for answer in answers.values()}) == 1
    together = answers[0].json()
    for ours, theirs in zip(alone["items"], together["items"], strict=True):
        assert ours.pop("score") == pytest.approx(theirs.pop("score"), rel=1e-5)
    assert alone == together
    assert sizes == [1, 8]  # what is wrong does not get that far
    assert 'tim4rec_batch_size_bucket{le="16.0"}' in counted
