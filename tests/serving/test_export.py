"""The exported folder: recommends in a process that cannot import this package."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small_models import small_model
from tests.serving.conftest import KINDS
from tests.serving.tiny_run import MAX_LENGTH, N_ITEMS, ONE_DEVICE, save_run
from tim4rec_jax.data import days, time_gaps
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import top_k
from tim4rec_jax.models import condition_on_time
from tim4rec_jax.run import load_model
from tim4rec_jax.serving.export import PLATFORMS, export, lower, program

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_export.py"
# 16 events are more than the model's window.
HISTORY = [
    (item, time + n * 10**7)
    for n in range(4)
    for item, time in [(7, 880_000_000), (3, 880_000_000), (12, 880_090_000), (3, 881_000_123)]
]
WAIT = 86_400
# Runs a script once for each list of arguments. Whatever imports one of the packages fails.
ALONE = """
import contextlib, io, json, runpy, sys
for name in ("tim4rec_jax", "data_prep", "flax", "orbax"):
    sys.modules[name] = None
answers = []
for sys.argv in json.loads(sys.argv[1]):
    printed, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        error = end.code
    answers.append((printed.getvalue(), error))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_data):
    """Two exported runs, one of which knows when the next event happens."""
    folder = tmp_path_factory.mktemp("export")
    for name, kind, top in (("paper", "paper", 12), ("timed", "next_time", 1000)):
        save_run(folder / name, tiny_data, **KINDS[kind])
        export(folder / name, folder / f"exported_{name}", top=top)
    return folder


@pytest.fixture(scope="module")
def answers(runs):
    """What the example prints and how it ends, run by run."""
    paper, timed = str(runs / "exported_paper"), str(runs / "exported_timed")
    # An unknown item is left out.
    events = ["nobody@1", *(f"i{item}@{time}" for item, time in HISTORY), "--top=5"]
    commands = {
        "paper": [paper, *events],
        "timed": [timed, *events, f"--at={HISTORY[-1][1] + WAIT}"],
        "nothing known": [paper, "nobody@1"],
    }
    arguments = json.dumps([[str(EXAMPLE), *flags] for flags in commands.values()])
    done = subprocess.run(
        [sys.executable, "-c", ALONE, arguments],
        env=ONE_DEVICE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads(done.stdout), strict=True))


@nnx.jit
def best_unseen(model, items, lengths, gaps, moments, exclude):
    hidden = condition_on_time(model, model.encode(items, lengths, gaps), moments)
    return top_k(hidden, model.item_embedding.embedding[...], 5, exclude=exclude)


@pytest.mark.parametrize("name", ["paper", "timed"])
def test_recommends_what_the_model_does(runs, answers, name):
    """The best unseen items by the model itself."""
    config, model = load_model(runs / name)
    recent = HISTORY[-MAX_LENGTH:]
    items, times = np.array([list(zip(*recent, strict=True))]).swapaxes(0, 1)
    lengths = np.array([len(recent)], np.int32)
    gaps = time_gaps(times, lengths, config.data.convention)
    moments = {"time_to_next": jnp.array([WAIT], jnp.float32), "dates": days(times[:, -1])}
    exclude = np.array([[item for item, _ in HISTORY]], np.int32)
    scores, best = best_unseen(model, items.astype(np.int32), lengths, gaps, moments, exclude)
    printed, error = answers[name]
    assert not error
    lines = [line.split("\t") for line in printed.splitlines()]
    assert [item for item, _ in lines] == [f"i{index}" for index in best[0].tolist()]
    np.testing.assert_allclose([float(score) for _, score in lines], scores[0], atol=2e-6)


def test_nothing_known(answers):
    _, error = answers["nothing known"]
    assert "none of the items" in error


def test_scores_of_history_items_get_the_repeat_bias(recommenders):
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


@pytest.mark.slow  # the fast tests export models whose layers lie between these two
@pytest.mark.parametrize("name", ["bsarec", "esasrec"])
def test_attention_models(name):
    """The program for any number of rows finds what the model itself finds."""
    settings = {"name": name, "hidden_size": 8, "n_heads": 2, "n_layers": 2}
    graph, params = small_model(settings, spread=0.5, n_items=N_ITEMS, max_length=MAX_LENGTH)
    model = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    recommend, weights = program(model, 5)
    exported = lower(recommend, weights, model)
    assert exported.platforms == PLATFORMS
    lengths = np.array([3, MAX_LENGTH, 1], np.int32)
    items = np.random.default_rng(0).integers(1, N_ITEMS + 1, (3, MAX_LENGTH), np.int32)
    items = np.where(np.arange(MAX_LENGTH) < lengths[:, None], items, 0)
    gaps, exclude = np.zeros((3, MAX_LENGTH), np.float32), items[:, :2]
    scores, best = exported.call(weights, items, lengths, gaps, exclude)
    hidden = model.encode(*map(jnp.asarray, (items, lengths, gaps)))
    expected, items_of_model = top_k(hidden, model.item_table(), 5, exclude=exclude)
    np.testing.assert_array_equal(best, items_of_model)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_folder_says_what_it_is(runs):
    folder = runs / "exported_paper"
    names = {file.name for file in folder.iterdir()}
    assert names == {"items.parquet", "metadata.json", "recommend.stablehlo", "weights.npz"}
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["platforms"] == list(PLATFORMS)
    assert (metadata["top_k"], metadata["items"], metadata["max_length"]) == (
        12,
        N_ITEMS,
        MAX_LENGTH,
    )


def test_damage_is_noticed(runs, tmp_path):
    read_metadata = runpy.run_path(str(EXAMPLE))["read_metadata"]
    folder = tmp_path / "exported"
    shutil.copytree(runs / "exported_paper", folder)
    metadata = read_metadata(folder)
    run = json.loads((runs / "paper" / "dataset.json").read_text())
    assert metadata["content"] == run["content"]
    for name in metadata["files"]:
        whole = (folder / name).read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 1
        for content in (bytes(changed), whole[:-1], b""):
            (folder / name).write_bytes(content)
            with pytest.raises(SystemExit, match=rf"is damaged .{name} is not .*: export it again"):
                read_metadata(folder)
        (folder / name).write_bytes(whole)
    (folder / "metadata.json").write_text("[" * 100_000)
    with pytest.raises(SystemExit, match=r"is damaged .*: export it again"):
        read_metadata(folder)


def test_not_among_the_checkpoints(runs):
    with pytest.raises(UserError, match="keeps its checkpoints: choose another --out"):
        export(runs / "paper", runs / "paper" / "best" / "2")
    assert load_model(runs / "paper")


def test_more_asked_than_the_catalogue_has(runs):
    metadata = json.loads((runs / "exported_timed" / "metadata.json").read_text())
    assert metadata["top_k"] == N_ITEMS


def test_folder_in_the_way(runs, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="choose another --out"):
        export(runs / "paper", tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def test_nothing_is_left_of_what_fails(runs, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    out = tmp_path / "out"
    with pytest.raises(UserError) as raised:
        export(runs / "paper", out)
    assert str(raised.value).startswith(f"{out} cannot be written: No space left on device; make")
    assert not list(tmp_path.iterdir())
