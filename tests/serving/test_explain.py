"""Weights, masks and the picture of them."""

import numpy as np
import pytest
from PIL import Image

from tests.serving.tiny_run import MAX_LENGTH, N_ITEMS
from tim4rec_jax.errors import UserError, run_main
from tim4rec_jax.serving.__main__ import main
from tim4rec_jax.serving.explain import explain
from tim4rec_jax.serving.picture import draw

ITEMS = ["i7", "i3", "i12", "i3", "i20"]
TIMES = [880_000_000, 880_000_000, 880_090_000, 881_000_123, 881_000_124]


def log_probability(recommender, items, times, item):
    """By way of the scores of the whole catalogue."""
    found = recommender.recommend(items, times, N_ITEMS, exclude_seen=False)
    scores = np.array(found.scores)
    return scores[found.items.index(item)] - np.log(np.exp(scores).sum())


def check_weights(recommender, items, times):
    found = explain(recommender, items, times)
    top = recommender.recommend(items, times).items[0]
    whole = log_probability(recommender, items, times, top)
    assert found.probability == pytest.approx(np.exp(whole), rel=1e-4)
    expected = []
    for place in range(max(len(items) - MAX_LENGTH, 0), len(items)):
        others = [values[:place] + values[place + 1 :] for values in (items, times)]
        expected.append(whole - log_probability(recommender, *others, top))
    np.testing.assert_allclose(found.weights, expected, atol=1e-4)
    return found


def test_weight_is_what_is_lost_without_the_event(recommenders):
    found = check_weights(recommenders("causal"), ITEMS, TIMES)
    assert found.events == ["Title of i7", "i3", "Title of i12", "i3", "Title of i20"]
    assert found.titles[0] in (f"Title of {found.recommendations.items[0]}", "i3")
    assert [mask.shape for mask in found.masks] == [(2, 5, 5)] * 2
    assert all(not np.triu(mask, 1).any() for mask in found.masks)


def test_longer_than_the_window(recommenders):
    """Without an event of the window, an older one comes into it."""
    times = [*TIMES, *(time + 10**7 for time in TIMES)]
    found = check_weights(recommenders("masked"), ITEMS * 2, times)
    assert len(found.events) == len(found.weights) == MAX_LENGTH
    assert found.masks[0].shape == (2, MAX_LENGTH, MAX_LENGTH)


def test_too_little_to_explain(recommenders):
    with pytest.raises(UserError, match="knows 1 of the 2 items"):
        explain(recommenders("causal"), ["i7", "nobody"], [1, 2])


def run(*arguments):
    return main(["explain", *map(str, arguments)])


def test_picture(tiny_workdir, tmp_path, capsys):
    out = tmp_path / "picture.png"
    history = [f"{item}@{time}" for item, time in zip(ITEMS, TIMES, strict=True)]
    flags = ["--workdir", tiny_workdir, "--out", out, "--history", "no@body@0", *history]
    assert run_main(lambda: run(*flags)) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(10**6)) > 50
    printed = capsys.readouterr().out
    assert "top recommendation: " in printed
    assert "left out: 1 events" in printed


def test_bad_flags(tiny_workdir, tmp_path):
    with pytest.raises(UserError, match="'i7@noon'"):
        run("--workdir", tiny_workdir, "--out", tmp_path / "x.png", "--history", "i7@noon")
    history = ["--history", *(f"{item}@{time}" for item, time in zip(ITEMS, TIMES, strict=True))]
    with pytest.raises(UserError, match=r"the folder .*no does not exist"):
        run("--workdir", tiny_workdir, "--out", tmp_path / "no" / "x.png", *history)


def test_a_model_without_masks(tmp_path, recommenders):
    found = check_weights(recommenders("bert4rec"), ITEMS, TIMES)
    assert found.masks == []
    draw(found, tmp_path / "why.png")
    with Image.open(tmp_path / "why.png") as picture:
        assert picture.size[0] > 1000
