"""The service as a process: ten thousand strange requests, an overload, and kills."""

import asyncio
import collections
import contextlib
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
schemathesis = pytest.importorskip("schemathesis", reason="needs the extra dev")

from hypothesis import HealthCheck, given, settings, strategies
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.serving.tiny_run import ONE_DEVICE
from tim4rec_jax.serving import MemoryStore, Recommender, SQLiteStore
from tim4rec_jax.serving.stores import Change

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
HISTORY = {"items": ["i7", "i3", "i12"], "timestamps": [880_000_000, 880_000_000, 880_090_000]}


class Process:
    """A service in a process of its own, as the command line starts it."""

    def __init__(self, workdir, *flags):
        command = [sys.executable, "-m", "tim4rec_jax.serving", "serve", "--port=0"]
        self.process = subprocess.Popen(
            [*command, f"--workdir={workdir}", *map(str, flags)],
            cwd=ROOT,
            env=ONE_DEVICE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = self.process.stdout.readline().split()[-1]
        self.port = int(self.url.rpartition(":")[2])

    def memory(self):
        """The resident memory, in bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def post(self, path, body):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def end(self, which=signal.SIGTERM):
        self.process.send_signal(which)
        code = self.process.wait(15)
        self.process.stdout.close()
        return code


@contextlib.contextmanager
def running(workdir, *flags):
    process = Process(workdir, *flags)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.end()


def test_ten_thousand_strange_requests(tiny_workdir, tmp_path):
    """Made by schemathesis from the schema, valid and invalid; it also checks every answer.

    One check is left out: that all requests which the schema allows are accepted. No schema can say
    that two lists have the same length, or that times do not fall. And a request may be too long as
    well as wrong.
    """
    count = collections.Counter()
    with running(tiny_workdir, "--store", tmp_path / "users.db") as service:
        schema = schemathesis.openapi.from_url(service.url + "/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]

        @settings(
            max_examples=-(-10_000 // len(operations)),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(data=strategies.data())
        def check(data, operation):
            mode = data.draw(strategies.sampled_from(schemathesis.GenerationMode))
            case = data.draw(operation.as_strategy(mode))
            count[operation.label] += 1
            answer, left_out = case.call(), [positive_data_acceptance]
            if answer.status_code in (413, 414, 431):
                left_out.append(negative_data_rejection)
            case.validate_response(answer, excluded_checks=left_out)

        for operation in operations:
            if operation.path != "/reload":  # each of which would load the run
                check(operation=operation)
        assert service.post("/recommend", HISTORY)["items"]
        assert service.end() == -signal.SIGTERM
    assert sum(count.values()) > 5000  # operations with few parameters have fewer requests


class Client:
    """Sends one request after the other on one connection, and notes status and seconds."""

    def __init__(self, port, make):
        self.port, self.make, self.found = port, make, []

    async def run(self, until, pause=0.0):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        with contextlib.closing(writer):
            while time.perf_counter() < until:
                request, note = self.make()
                begun = time.perf_counter()
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r")[0]))
                self.found.append((int(head[9:12]), time.perf_counter() - begun, note))
                await asyncio.sleep(pause)


def post(path, body):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


def recommend():
    return post("/recommend", HISTORY), None


# An honest client: asks for /health on new connections and for recommendations on one that it
# keeps, until it is interrupted. It prints the seconds of the answers that are no refusals.
HONEST = """
import http.client, json, signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job of a shell ignores
port, body = int(sys.argv[1]), sys.argv[2]
found = {"health": [], "recommend": [], "refused": 0}

def ask(name, connection, *request):
    begun = time.perf_counter()
    connection.request(*request)
    answer = connection.getresponse()
    answer.read()
    assert answer.status in (200, 503), answer.status
    if answer.status == 503:
        found["refused"] += 1
    else:
        found[name].append(time.perf_counter() - begun)

kept = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
kind = {"Content-Type": "application/json"}
try:
    while True:
        new = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        ask("health", new, "GET", "/health")
        new.close()
        ask("recommend", kept, "POST", "/recommend", body, kind)
        time.sleep(0.05)
except KeyboardInterrupt:
    print(json.dumps(found))
"""


@contextlib.contextmanager
def honest_client(port):
    """Its figures, once it has ended. It has a process of its own, as the flood keeps this busy."""
    command, found = [sys.executable, "-c", HONEST, str(port), json.dumps(HISTORY)], {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield found
        process.send_signal(signal.SIGINT)
        found |= json.loads(process.stdout.read())


def tell_of(name):
    """Makes events that all differ, whose time is their number."""
    numbers = itertools.count()

    def tell():
        number = next(numbers)
        event = {"user": name, "item": f"i{number % 30 + 1}", "timestamp": number}
        return post("/events", {"events": [event]}), (name, number)

    return tell


def run_all(clients, seconds):
    async def together():
        until = time.perf_counter() + seconds
        await asyncio.gather(*(client.run(until, pause) for client, pause in clients))

    asyncio.run(together())
    return [client.found for client, _ in clients]


def test_an_overload(tiny_workdir, tmp_path):
    """Ten times the clients for a minute: some are refused, nothing is lost, nothing grows.

    How long answers take depends on the machine, so that it is printed and not compared.
    """
    with running(tiny_workdir, "--store", tmp_path / "users.db") as service:

        def clients(count):
            return [(Client(service.port, recommend), 0.0) for _ in range(count)]

        run_all(clients(64), 3)
        with honest_client(service.port) as normal:
            run_all(clients(64), 10)
        told = [(Client(service.port, tell_of(f"u{number}")), 0.0) for number in range(16)]
        run_all(clients(640), 10)
        before = service.memory()
        many = clients(640)
        with honest_client(service.port) as overloaded:
            run_all([*many, *told], 60)
        memory = service.memory()
        assert service.end() == -signal.SIGTERM
    statuses = collections.Counter(status for client, _ in many for status, *_ in client.found)
    assert statuses.keys() == {200, 503}
    counts = [len(seconds) for seconds in (normal["recommend"], overloaded["recommend"])]
    slow, slower = (np.quantile(found["recommend"], 0.99) for found in (normal, overloaded))
    health = np.quantile(overloaded["health"], 0.99)
    print(
        f"p99 {slow * 1e3:.0f} ms, overloaded {slower * 1e3:.0f} ms ({counts} answers), health "
        f"{health * 1e3:.0f} ms; {statuses}; memory {memory / before:.3f}"
    )
    assert overloaded["refused"] == 0  # a client that waits between its requests has its turn
    assert min(counts) > 20
    assert memory < 1.1 * before
    stored = events_in(tmp_path / "users.db")
    acknowledged = {note for client, _ in told for status, _, note in client.found if status == 200}
    assert acknowledged
    assert acknowledged <= stored.keys()
    assert set(stored.values()) == {1}


def events_in(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return collections.Counter(connection.execute("SELECT user, timestamp FROM events"))


def test_twenty_kills(tiny_workdir, tmp_path):
    """Every event that was acknowledged is there once, and every state is that of its log."""
    path, drawn = tmp_path / "users.db", random.Random(0)
    acknowledged = set()
    for kill in range(20):
        with running(tiny_workdir, "--store", path) as service:
            told = [Client(service.port, tell_of(f"u{kill}-{number}")) for number in range(8)]
            timer = threading.Timer(drawn.uniform(0.05, 0.6), service.end, (signal.SIGKILL,))
            timer.start()

            async def until_the_kill(told=told):
                runs = (client.run(float("inf")) for client in told)
                ends = await asyncio.gather(*runs, return_exceptions=True)
                assert all(isinstance(end, OSError | EOFError) for end in ends)

            asyncio.run(until_the_kill())
            timer.join()
        for client in told:
            assert {status for status, *_ in client.found} <= {200, 503}
            acknowledged |= {note for status, _, note in client.found if status == 200}
    stored = events_in(path)
    assert len(acknowledged) > 100
    assert acknowledged <= stored.keys()
    assert set(stored.values()) == {1}
    store = SQLiteStore(path)
    recommender = Recommender.load(tiny_workdir, store)
    for user in sorted({user for user, _ in stored}):
        events, kept = recommender.stored(user)
        [computed] = Recommender(
            recommender.model, recommender.catalogue, copy_of(store, user)
        ).compute_states([user])
        assert len(events.items) == sum(name == user for name, _ in stored)
        kept, computed = (recommender.model.hidden(state) for state in (kept, computed))
        np.testing.assert_allclose(kept, computed, rtol=1e-5, atol=1e-5)
    store.close()


def copy_of(store, user):
    """A store with the log of one user and no state."""
    copy, (items, times) = MemoryStore(), store.history(user)
    copy.apply([Change(user, 0, items, times, None)], "")
    return copy
