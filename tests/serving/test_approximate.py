"""The index finds what scoring every item finds: all in small catalogues, nearly all in large."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.small_dataset import random_histories
from tests.serving.conftest import KINDS
from tests.serving.tiny_run import LENGTHS, N_ITEMS, save_run
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.ranking import top_k
from tim4rec_jax.scoring import HistoryItems
from tim4rec_jax.serving import Recommender
from tim4rec_jax.serving.ann_index import ApproximateIndex

pytest.importorskip("faiss", reason="needs the extra ann")

HISTORIES = [([f"i{item}" for item in items], times) for items, times in random_histories(LENGTHS)]


@pytest.mark.parametrize("kind", ["causal", "masked"])  # the first one offsets items seen
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_finds_everything_in_a_small_catalogue(recommenders, kind, exclude_seen):
    exact = recommenders(kind)
    index = ApproximateIndex(exact.model.table)
    ours = Recommender(exact.model, exact.catalogue, index=index)
    histories = [*HISTORIES[1:], (["nobody knows"], [5])]
    for k in (4, N_ITEMS):
        pairs = zip(
            ours.recommend_batch(histories, k, exclude_seen=exclude_seen),
            exact.recommend_batch(histories, k, exclude_seen=exclude_seen),
            strict=True,
        )
        for found, expected in pairs:
            assert found.items == expected.items
            assert found.scores == pytest.approx(expected.scores, rel=1e-5, abs=1e-5)
    some = ours.recommend(*HISTORIES[3], allow=["i3", "i5"], exclude_seen=exclude_seen)
    assert some == exact.recommend(*HISTORIES[3], allow=["i3", "i5"], exclude_seen=exclude_seen)


def test_queries_that_differ_are_searched_apart(recommenders):
    """A search leaves out what the histories of all its queries hold, or of none."""
    exact = recommenders("masked")
    ours = Recommender(exact.model, exact.catalogue, index=ApproximateIndex(exact.model.table))
    asked = [
        dict(exclude_seen=seen, deny=deny) for seen in (True, False) for deny in (None, ["i5"])
    ]
    asked = asked[::-1] + asked
    found = ours.answer([ours.query(*HISTORIES[3], N_ITEMS, **how) for how in asked])
    expected = [exact.recommend(*HISTORIES[3], N_ITEMS, **how) for how in asked]
    assert [each.items for each in found] == [each.items for each in expected]
    assert len({tuple(each.items) for each in expected}) == 4


def test_finds_most_in_a_large_catalogue():
    """Items in bunches, as trained ones are."""
    rng = np.random.default_rng(0)
    bunches = rng.normal(size=(300, 16))
    table = bunches[rng.integers(0, 300, 5001)] + 0.3 * rng.normal(size=(5001, 16))
    table = table.astype(np.float32)
    index = ApproximateIndex(table)
    hidden = (bunches[:64] + 0.3 * rng.normal(size=(64, 16))).astype(np.float32)
    history_items = rng.integers(0, 5001, (64, 20)).astype(np.int32)
    history = HistoryItems(history_items, jnp.float32(-2))
    wanted, items = map(np.asarray, top_k(hidden, table, 10, history=history))
    scores, found = index.best(hidden, 10, history_items, repeat_bias=-2.0)
    hits = [np.isin(a, b).mean() for a, b in zip(items, found, strict=True)]
    assert np.mean(hits) > 0.95
    np.testing.assert_allclose(scores[0], wanted[0], rtol=1e-4)


def test_is_kept_with_the_run(tmp_path, tiny_data, monkeypatch):
    workdir = save_run(tmp_path / "run", tiny_data, **KINDS["causal"])
    loaded, file = Recommender.load(workdir, approximate=True), workdir / "index.faiss"
    first = loaded.recommend(*HISTORIES[3])

    def again():
        index = ApproximateIndex(loaded.model.table, file)
        return Recommender(loaded.model, loaded.catalogue, index=index).recommend(*HISTORIES[3])

    written = file.stat().st_mtime_ns
    assert (again(), file.stat().st_mtime_ns) == (first, written)

    def flip():
        content = bytearray(file.read_bytes())
        content[3 * len(content) // 4] ^= 0x40  # an edge of the graph
        file.write_bytes(content)

    for damage in (
        flip,
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(file.read_bytes()[:-40]),
        lambda: ApproximateIndex(np.ones((N_ITEMS + 1, 8)), file),  # of another model
    ):
        damage()
        assert again() == first
    (tmp_path / "run" / "index.faiss").unlink()

    def full(*args):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("faiss.write_index", full)
    assert again() == first
    assert not list(workdir.glob("index.faiss*"))


def test_says_what_is_missing(monkeypatch, tiny_workdir):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'tim4rec-jax\[ann\]'"):
        Recommender.load(tiny_workdir, approximate=True)
