"""Ids in Arrow: the same answers as from a list and a dictionary."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tim4rec_jax.data import ids as ids_module
from tim4rec_jax.data.ids import IdIndex, Texts, hash_texts

IDS = st.lists(st.text(max_size=20), min_size=1, max_size=30, unique=True)
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(TEXT, min_size=1, max_size=30, unique=True),
    st.lists(TEXT, max_size=10),
    st.integers(1, 5),
)
def test_places_are_those_of_a_dictionary(known, others, parts):
    cuts = [known[first::parts] for first in range(parts)]
    column = pa.chunked_array([pa.array(cut, pa.string()) for cut in cuts], pa.string())
    index, places = IdIndex(column), {text: n for n, text in enumerate(column.to_pylist())}
    asked = [*others, *known, *others]
    for _ in range(2):  # the second time they are remembered
        assert index.find(asked).tolist() == [places.get(text, -1) for text in asked]


def test_equal_hashes_do_not_matter(monkeypatch):
    monkeypatch.setattr(ids_module, "hash_texts", lambda texts: np.full(len(texts), 7, np.uint64))
    index = IdIndex(pa.array(["a", "b", "c"]))
    assert index.find(["c", "x", "a", "b", "c"]).tolist() == [2, -1, 0, 1, 2]


def test_hashes_do_not_collide_and_know_their_slice():
    texts = [f"item{number}" for number in range(20_000)] + ["", "é", "☃" * 40, "0" * 100]
    texts += ["0" * length for length in range(1, 90)]
    column = pa.array(texts)
    hashes = hash_texts(column)
    assert len(set(hashes.tolist())) == len(set(texts))
    np.testing.assert_array_equal(hash_texts(column.slice(19_990, 20)), hashes[19_990:20_010])
    assert hash_texts(pa.array([], pa.string())).size == 0


def test_the_memory_of_what_was_asked_is_bounded(monkeypatch):
    monkeypatch.setattr(ids_module, "_RECENT", 3)
    index = IdIndex(pa.array(["a", "b", "c", "d", "e"]))
    for _ in range(2):
        for asked in (["a", "b"], ["c", "d", "e", "a"], ["x"] * 5, ["y", "e"]):
            expected = ["abcde".find(text) for text in asked]
            assert index.find(asked).tolist() == expected
            assert len(index._recent) <= 3


def test_a_lone_surrogate_is_no_id():
    assert IdIndex(pa.array(["a?", "?"])).find(["\ud800b", "a"]).tolist() == [-1, -1]


def test_texts_are_a_list():
    texts = Texts(pa.chunked_array([["a", None], ["b"]]))
    assert list(texts) == texts == ["a", None, "b"] and len(texts) == 3
    assert texts[np.int32(2)] == "b" and texts[-1] == "b" and texts[:2] == ["a", None]
    assert pa.array(texts).to_pylist() == ["a", None, "b"]
    assert not Texts(pa.array([], pa.string()))
    with pytest.raises(IndexError):
        texts[3]
