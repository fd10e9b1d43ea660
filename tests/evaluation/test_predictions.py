import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.small_dataset import in_memory, random_histories
from tests.evaluation.fake_model import MeanModel
from tests.serving.tiny_run import ONE_DEVICE
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import evaluate
from tim4rec_jax.evaluation.evaluate import write_predictions

LENGTHS = [1, 2, 9, 40, 7, 30, 2, 5, 6]
SETTINGS = dict(max_length=6, batch_size=3, convention="exact", buckets=(6,))


@pytest.fixture(scope="module")
def dataset():
    return in_memory(random_histories(LENGTHS))


@pytest.fixture(scope="module")
def model():
    return MeanModel(30)


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_agree_with_the_ranks(tmp_path, dataset, model, exclude_seen):
    """The target stands where its rank says; ids are the original ones."""
    path = tmp_path / "top.parquet"
    settings = SETTINGS | {"exclude_seen": exclude_seen}
    rows = write_predictions(path, model, dataset, "test", 5, **settings)
    table = pq.read_table(path).to_pydict()
    assert rows == len(table["user"]) == 8 * 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["top.parquet"]
    _, ranks = evaluate(model, dataset, "test", **settings)
    for user, (items, _) in enumerate(random_histories(LENGTHS)):
        mine = [row for row in range(rows) if table["user"][row] == f"u{user}"]
        if len(items) == 1:
            assert not mine
            continue
        best = [table["item"][row] for row in mine]
        assert [table["rank"][row] for row in mine] == [1, 2, 3, 4, 5]
        scores = [table["score"][row] for row in mine]
        assert scores == sorted(scores, reverse=True)
        seen = {f"i{item}" for item in items[:-1]}
        if exclude_seen:
            assert not seen & set(best)
        target = f"i{items[-1]}"
        if not (exclude_seen and target in seen):
            assert (target in best) == (ranks[user] <= 5)
            assert target not in best or best.index(target) == ranks[user] - 1


def test_a_user_may_have_fewer(tmp_path, dataset, model):
    path = tmp_path / "top.parquet"
    write_predictions(path, model, dataset, "test", 30, exclude_seen=True, **SETTINGS)
    table = pq.read_table(path, filters=[("user", "=", "u3")])
    items, _ = random_histories(LENGTHS)[3]
    assert len(table) == 30 - len(set(items[:-1]))
    assert table["rank"].to_pylist() == list(range(1, len(table) + 1))


def test_scores_are_those_of_the_model(tmp_path, dataset, model):
    path = tmp_path / "top.parquet"
    write_predictions(path, model, dataset, "valid", 1, **SETTINGS)
    row = pq.read_table(path, filters=[("user", "=", "u4")]).to_pylist()[0]
    items, timestamps = random_histories(LENGTHS)[4]
    table = np.asarray(model.item_embedding.embedding[...])
    hidden = table[items[:5]].mean(0) + 0.01 * np.log1p(timestamps[4] - timestamps[3])
    assert row["item"] == f"i{np.argmax((table @ hidden)[1:]) + 1}"
    assert row["score"] == pytest.approx((table @ hidden)[1:].max(), rel=1e-5)


def test_more_than_the_memory_holds(tmp_path, dataset, model, monkeypatch):
    monkeypatch.setattr("tim4rec_jax.runtime.host_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"30 predictions for each of 3 users at once take .* GB"):
        write_predictions(tmp_path / "top.parquet", model, dataset, "test", 10**12, **SETTINGS)
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path[:0] = {path!r}
from tests.evaluation.fake_model import MeanModel
from tests.data.small_dataset import in_memory, random_histories
from tim4rec_jax.errors import run_main
from tim4rec_jax.evaluation.evaluate import write_predictions

def main():
    settings = dict(max_length=6, batch_size=3, convention="exact")
    dataset = in_memory(random_histories([20] * 60))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    write_predictions(Path({out!r}), MeanModel(30), dataset, "test", 30, **settings)

sys.exit(run_main(main))
"""


def test_a_failure_leaves_nothing(tmp_path, dataset, model, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match=r"top\.parquet cannot be written: No space left on device"):
        write_predictions(tmp_path / "top.parquet", model, dataset, "test", 5, **SETTINGS)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path):
    """The limit on a file's size stands in for it: the same error, another number."""
    script = FULL_DISK.format(path=sys.path, out=str(tmp_path / "top.parquet"))
    environment = ONE_DEVICE | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    # Coverage would write a larger file of its own, and complain that it cannot.
    for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    path = tmp_path / "top.parquet"
    assert done.stderr == f"error: {path} cannot be written: File too large\n"
    assert not list(tmp_path.iterdir())
