import csv
import io
import json
import re

import pytest
from rich.console import Console

from tim4rec_jax.evaluation.report import print_report, write_csv
from tim4rec_jax.files import write_json

METRICS = {"hit@10": 0.1234567, "hit@20": 0.25, "ndcg@10": 0.0625}
ERRORS = {"hit@10": 0.01, "hit@20": 0.02, "ndcg@10": 0.03}
GROUPS = [
    {"bin": "0 s – 2 min", "users": 900, "metrics": METRICS, "standard_errors": ERRORS},
    {"bin": "1 h – 2 d", "users": 934, "metrics": METRICS, "standard_errors": ERRORS},
]


@pytest.fixture
def report():
    return {
        "dataset": "shop",
        "split": "test",
        "exclude_seen": False,
        "users": 1834,
        "metrics": METRICS,
        "standard_errors": ERRORS,
    }


def printed(report, width=100):
    console = Console(width=width, file=io.StringIO())
    print_report(report, console)
    return console.file.getvalue()


def cells(text, label):
    line = next(line for line in text.splitlines() if label in line)
    return re.split(r" {2,}", line.strip())


def test_table(report):
    text = printed(report)
    assert "shop, test split, 1,834 users" in text
    assert "excluded" not in text
    assert cells(text, "Hit@10") == ["Hit@10", "0.1235", "0.0100"]
    assert "seen items excluded" in printed(report | {"exclude_seen": True})


def test_a_name_is_printed_as_it_is(report):
    assert "[red]:apple:, test split" in printed(report | {"dataset": "[red]:apple:"})


def test_what_could_be_reached_stands_beside(report):
    oracle = {"with_time": {"hit@10": 0.9}, "time_blind": {"hit@10": 0.5}}
    text = printed(report | {"oracle": oracle})
    assert cells(text, "Hit@10")[3:] == ["0.9000", "0.5000"]
    assert cells(text, "Hit@20")[3:] == []
    assert "best blind to time" in text


def test_slices(report):
    text = printed(report | {"slices": {"gap": GROUPS}})
    figures = ["0.1235 ± 0.0100", "0.0625 ± 0.0300"]
    assert cells(text, "1 h – 2 d") == ["1 h – 2 d", "934", *figures]
    assert "Hit@20" not in text.split("by last gap")[1]


@pytest.mark.parametrize("width", [20, 45, 60, 80])
def test_no_figure_is_cut(report, width):
    """Three metrics, and the widest groups that there can be."""
    metrics = METRICS | {"mrr@10": 0.0377}
    errors = ERRORS | {"mrr@10": 0.0041}
    group = {"bin": "1,000,000 – 1,234,567", "users": 1_000_000}
    groups = [group | {"metrics": metrics, "standard_errors": errors}]
    text = printed(report | {"slices": {"popularity": groups}}, width)
    slices = text.split("by training events")[1]
    assert "…" not in slices
    for figure in ("1,234,567", "1,000,000", "0.1235", "0.0100", "0.0625", "0.0300", "0.0377"):
        assert figure in slices


def test_json_keeps_all_digits(report, tmp_path):
    write_json(tmp_path / "eval.json", report | {"slices": {"gap": GROUPS}})
    assert json.loads((tmp_path / "eval.json").read_text()) == report | {"slices": {"gap": GROUPS}}


def test_csv(report, tmp_path):
    write_csv(report | {"slices": {"gap": GROUPS}}, tmp_path / "eval.csv")
    with (tmp_path / "eval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3
    assert rows[0] == {
        "split": "test",
        "slice": "all",
        "bin": "",
        "users": "1834",
        "metric": "hit@10",
        "value": "0.1234567",
        "standard_error": "0.01",
    }
    assert (rows[-1]["slice"], rows[-1]["bin"], rows[-1]["users"]) == ("gap", "1 h – 2 d", "934")
