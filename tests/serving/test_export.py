"""The exported folder: recommends in a process that cannot import this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.serving.tiny_run import MAX_LENGTH, N_ITEMS, save_run
from tim4rec_jax.data import days, time_gaps
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import top_k
from tim4rec_jax.models import condition_on_time
from tim4rec_jax.run import load_model
from tim4rec_jax.serving.export import PLATFORMS, export, program

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_export.py"
HISTORY = [(7, 880_000_000), (3, 880_000_000), (12, 880_090_000), (3, 881_000_123)]
# Whatever imports one of these fails.
ALONE = """
import runpy, sys
for name in ("tim4rec_jax", "data_prep", "flax", "orbax"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(folder, *events, top=5):
    command = [sys.executable, "-c", ALONE, EXAMPLE, folder, *events, f"--top={top}"]
    environment = {**os.environ, "XLA_FLAGS": ""}  # the suite's eight devices take time to make
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def expected(workdir, history, k, wait):
    """Indices and scores of the best unseen items by the model itself."""
    config, model = load_model(workdir)
    recent = history[-MAX_LENGTH:]
    items, times = np.zeros((1, MAX_LENGTH), np.int32), np.zeros((1, MAX_LENGTH), np.int64)
    items[0, : len(recent)] = [item for item, _ in recent]
    times[0, : len(recent)] = [time for _, time in recent]
    lengths = np.array([len(recent)], np.int32)
    gaps = time_gaps(times, lengths, config.data.convention)
    encode = nnx.jit(lambda model, *inputs: model.encode(*inputs))
    hidden = encode(model, items, lengths, gaps)
    moments = {
        "time_to_next": jnp.array([wait or 0], jnp.float32),
        "dates": days(times[:, lengths[0] - 1]),
    }
    hidden = condition_on_time(model, hidden, moments)
    seen = np.array([[item for item, _ in history]], np.int32)
    scores, best = top_k(hidden, model.item_embedding.embedding[...], k, exclude=jnp.asarray(seen))
    return np.asarray(best)[0], np.asarray(scores)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_data):
    return exported_run(tmp_path_factory.mktemp("paper"), tiny_data, time_encoding="paper")


def exported_run(folder, dataset, **settings):
    workdir = save_run(folder / "run", dataset, **settings)
    export(workdir, folder / "exported", top=12)
    return workdir


def test_recommends_what_the_model_does(run):
    compare(run)


def test_scores_of_items_seen_are_offset(tiny_data, recommenders):
    recommender = recommenders("causal")
    recommend, weights = program(recommender.model.sequence_model, 12)
    items, times = np.array([[3, 7, 7, 12, 0, 0]]), np.array([[0, 50, 90, 200, 0, 0]])
    gaps = np.array([[0, 50, 40, 110, 0, 0]], np.float32)
    nothing, date = np.zeros((1, 1), np.int32), days(times[:, 3])
    scores, best = jax.jit(recommend)(weights, items, np.array([4]), gaps, nothing, date)
    ids = [recommender.catalogue.ids[item - 1] for item in items[0, :4]]
    found = recommender.recommend(ids, times[0, :4], 12, exclude_seen=False)
    assert [recommender.catalogue.ids[item - 1] for item in best[0].tolist()] == found.items
    np.testing.assert_allclose(scores[0], found.scores, rtol=1e-5, atol=1e-5)


def test_knows_the_next_time(tmp_path, tiny_data):
    settings = dict(time_encoding="causal", num_layers=2, knows_next_time=True)
    settings |= dict(date_bias_knots=3, date_range=(870_000_000, 920_000_000))
    compare(exported_run(tmp_path, tiny_data, **settings), wait=86_400)


def compare(run, wait=None):
    # 16 events are more than the model's window; an unknown item is left out.
    history = [(item, time + n * 10**7) for n in range(4) for item, time in HISTORY]
    events = [f"i{item}@{time}" for item, time in history]
    at = [] if wait is None else [f"--at={history[-1][1] + wait}"]
    result = run_alone(run.parent / "exported", "nobody@1", *events, *at)
    assert result.returncode == 0, result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    best, scores = expected(run, history, 5, wait)
    assert [item for item, _ in lines] == [f"i{index}" for index in best]
    np.testing.assert_allclose([float(score) for _, score in lines], scores, atol=2e-6)


def test_nothing_known(run):
    result = run_alone(run.parent / "exported", "nobody@1")
    assert result.returncode == 1
    assert "none of the items" in result.stderr


def test_folder_says_what_it_is(run):
    folder = run.parent / "exported"
    names = {file.name for file in folder.iterdir()}
    assert names == {"items.parquet", "metadata.json", "recommend.stablehlo", "weights.npz"}
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["platforms"] == list(PLATFORMS)
    assert (metadata["top_k"], metadata["items"], metadata["max_length"]) == (
        12,
        N_ITEMS,
        MAX_LENGTH,
    )


def test_more_asked_than_the_catalogue_has(run, tmp_path):
    assert export(run, tmp_path / "all", top=1000)["top_k"] == N_ITEMS


def test_folder_in_the_way(run, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="choose another --out"):
        export(run, tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def test_nothing_is_left_of_what_fails(run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())
