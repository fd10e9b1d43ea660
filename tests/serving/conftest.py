import sys

import pytest
from absl import logging

from tests.serving.redis_server import RedisServer
from tests.serving.redis_stand_in import StandIn
from tests.serving.tiny_run import save_run, tiny_dataset, tiny_recommender
from tim4rec_jax.serving import MemoryStore, RedisStore, SQLiteStore

KINDS = {
    "masked": dict(time_encoding="masked"),
    "paper": dict(time_encoding="paper"),
    "causal": dict(
        time_encoding="causal",
        num_layers=2,
        repeat_bias=True,
        date_bias_knots=3,
        date_range=(880_000_000, 880_003_000),
    ),
    "bert4rec": dict(name="bert4rec"),
    "next_time": dict(
        time_encoding="causal",
        knows_next_time=True,
        date_bias_knots=3,
        date_range=(870_000_000, 900_000_000),
    ),
}

# When uvicorn sets up logging, absl closes the stream of its handler unless that is one of these.
# It was opened for the stream that pytest captures, without which pytest ends at once.
logging.get_absl_handler().python_handler.setStream(sys.__stderr__)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("serving") / "data")


@pytest.fixture(scope="session")
def tiny_workdir(tmp_path_factory, tiny_data):
    return save_run(tmp_path_factory.mktemp("serving") / "run", tiny_data, **KINDS["causal"])


@pytest.fixture(scope="session")
def recommenders(tiny_data):
    """Gives the recommender of a kind, for tests that store nothing."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tiny_recommender(tiny_data, **KINDS[kind])
        return made[kind]

    return get


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """A server of this machine, on a socket in a folder of its own."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_stand_in():
    """What stands in for a server on a machine without one."""
    with StandIn() as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request, tmp_path):
    if request.param == "memory":
        store = MemoryStore()
    elif request.param == "sqlite":
        store = SQLiteStore(tmp_path / "users.db")
    elif request.param == "redis stand-in":  # of a test that asks for it
        server = request.getfixturevalue("redis_stand_in")
        store = RedisStore(server.url)
    else:
        server = request.getfixturevalue("redis_server")
        store = RedisStore(server.url, prefix=f"{tmp_path}:")
    yield store
    store.close()
