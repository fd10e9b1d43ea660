"""Figures of a dataset, against the same over the whole arrays, and its picture."""

import numpy as np
import pytest
from matplotlib import image

from tim4rec_jax.data_prep import inspect
from tim4rec_jax.data_prep.__main__ import main


@pytest.fixture
def log(write):
    random = np.random.default_rng(0)
    rows = ["user_id,item_id,timestamp"]
    for user in range(200):
        gaps = random.integers(0, 2, 20) * 10 ** random.uniform(0, 7, 20)
        times = 1_600_000_000 + gaps.cumsum().astype(int)
        rows += [f"u{user},i{random.integers(50)},{time}" for time in times]
    return write("a.csv", "\n".join(rows) + "\n")


@pytest.mark.parametrize(
    "piece, shard, order",
    [
        (1 << 22, 10_000, "exact"),
        pytest.param(1 << 22, 10_000, "recbole", marks=pytest.mark.slow),
        pytest.param(30, 700, "exact", marks=pytest.mark.slow),
        (30, 700, "recbole"),
    ],
)
def test_statistics(run, histories, log, monkeypatch, order, piece, shard):
    monkeypatch.setattr(inspect, "_PIECE", piece)
    ds = run("table", log, "--k-core", "2", "--order", order, "--shard-events", shard)
    found = inspect.statistics(ds)
    times = [sorted(time for _, time in events) for events in histories(ds).values()]
    gaps = np.concatenate([np.diff(user) for user in times])
    rounded = np.concatenate([np.diff(np.float32(user)) for user in times])
    assert found["tied"] == (gaps == 0).mean()
    assert found["tied_float32"] == (rounded == 0).mean()
    assert found["first"] == min(map(min, times)) and found["last"] == max(map(max, times))
    assert found["density"] == ds.n_events / (ds.n_users * ds.n_items)
    lengths = [len(user) for user in times]
    np.testing.assert_allclose(
        found["lengths"], np.quantile(lengths, list(inspect.QUANTILES.values()))
    )
    exact = np.quantile(gaps, list(inspect.QUANTILES.values()), method="inverted_cdf")
    np.testing.assert_allclose(found["gaps"], exact, rtol=0.06)
    assert found["gap_counts"].sum() == len(gaps)
    assert found["busy"].sum() == ds.n_events


def test_command(run, log, capsys, tmp_path):
    directory = run("table", log).directory
    main(["inspect", str(directory)])
    shown = capsys.readouterr().out
    assert "200 users" in shown and "2020-09-13" in shown and "same time" in shown
    pixels = image.imread(directory / "inspect.png")
    assert pixels.shape[:2] == (930, 1500) and pixels[..., :3].std() > 0.05
    main(["inspect", str(directory), "--plot", str(tmp_path / "b.png")])
    assert (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    "rows",
    [
        "u,i,5\n",
        pytest.param("u,i,5\nu,i,5\nu,j,5\n", marks=pytest.mark.slow),
        "u,i,0\nu,i,9000000000\n",
    ],
)
def test_tiny_datasets(run, write, rows):
    path = write("a.csv", "user_id,item_id,timestamp\n" + rows)
    main(["inspect", str(run("table", path, "--k-core", "1").directory)])


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (42, "42 s"),
        (90, "1.5 min"),
        (36_000, "10 h"),
        (86_400 * 3, "3.0 d"),
        (86_400 * 730, "2.0 y"),
    ],
)
def test_span(seconds, text):
    assert inspect.span(seconds) == text
