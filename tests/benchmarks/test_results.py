"""The tables of the pages are those of the CSV files, and none of them mixes two protocols."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import results
from benchmarks.results import BLOCK, PAGES, RESULTS, pick, table
from benchmarks.results_tables import RANKED, TABLES, Table
from tim4rec_jax.commands import compare_report
from tim4rec_jax.commands import results as commands_results
from tim4rec_jax.commands.results import (
    COLUMNS,
    KEY,
    METRICS,
    PROTOCOL,
    append,
    means,
    read,
    rows_of_runs,
)
from tim4rec_jax.errors import UserError
from tim4rec_jax.models import DEFAULT_MODEL
from tim4rec_jax.presets import load_config

# A figure of a table: `.1234`, `.1234 ± .0056`.
FIGURE = re.compile(r"^\.\d{4}( ± \.\d{4})?$")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tables_of_a_page_are_those_of_the_files(page):
    text = page.read_text()
    blocks = BLOCK.findall(text)
    assert blocks and text.count("<!-- table:") == len(blocks)
    for _, name, written, _ in blocks:
        assert written == table(name), f"run `python -m benchmarks.results`: {page}, {name}"


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.stem)
def test_no_table_of_quality_is_written_by_hand(page):
    for line in BLOCK.sub("", page.read_text()).splitlines():
        if line.startswith("|"):
            assert not any(FIGURE.match(cell.strip()) for cell in line.split("|")), line


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.stem)
def test_figures_in_sentences_are_in_the_files(page):
    rows = read(RESULTS)
    known = {f"{float(row[metric]):.4f}"[1:] for row in rows for metric in METRICS if row[metric]}
    known |= {".8660", ".4969", ".6583", ".3446"}  # the best possible figures of synthetic data
    prose = re.sub(r"(?m)^\|.*$", "", BLOCK.sub("", page.read_text()))
    found = re.findall(r"(?<![\d.])\.\d{4}\b", prose)
    assert [figure for figure in found if figure not in known] == []


def test_every_row_says_its_protocol_seed_command_machine_and_date():
    rows = read(RESULTS)
    assert len({tuple(row[column] for column in KEY) for row in rows}) == len(rows)
    for row in rows:
        needed = ("dataset", "model", "seed", *PROTOCOL, "ndcg@10", "hardware", "code", "command")
        assert all(row[column] for column in needed), row
        assert re.fullmatch(r"20\d\d(-20\d\d \(mean\))?", row["seed"]), row
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]), row
        assert row["seen"] in ("ranked", "masked") and row["order"] in ("exact", "recbole"), row
        assert row["knows_next_time"] in ("yes", "no"), row
        assert all(0 <= float(row[metric]) <= 1 for metric in METRICS if row[metric]), row
    # A model with this setting, and no other one, knows the time of the target.
    for row in rows:
        told = "model.knows_next_time=True" in row["settings"].split()
        assert (row["knows_next_time"] == "yes") == told, row


def test_a_table_cannot_mix_protocols(monkeypatch):
    choice = TABLES["next-time-known"].chosen[0]
    rows = read(RESULTS)
    with pytest.raises(UserError, match="no row"):
        pick(rows, RANKED, choice)
    monkeypatch.setitem(TABLES, "loose", Table({}, [*TABLES["readme"].chosen, choice]))
    with pytest.raises(UserError, match="would mix the protocols"):
        table("loose")


def test_a_page_with_a_changed_figure_is_noticed():
    page = PAGES[0].read_text()
    changed = page.replace(".1347 ±", ".1374 ±")
    assert changed != page == results.rewritten(changed)


def test_quoted_figures_have_a_source_and_a_protocol():
    rows = results.quoted()
    assert {row["seen"] for row in rows} == {"ranked", "masked"}
    for row in rows:
        assert all(row[column] for column in ("dataset", "model", *PROTOCOL, "ndcg@10", "source"))
        masked = re.search(r"HSTU|FuXi|eSASRec|BSARec|cross-entropy|LRURec", row["model"])
        if masked and "2409.16182" not in row["source"]:
            assert row["seen"] == "masked", row
        if re.match(r"HSTU-large|FuXi", row["model"]):
            assert row["knows_next_time"] == "yes", row


def test_compare_prints_quoted_figures_of_its_own_protocol():
    named = [row for row in results.quoted() if row["compare"]]
    assert len({row["compare"] for row in named}) == len(named)
    assert {(row["split"], row["part"], row["seen"]) for row in named} == {
        ("leave_one_out", "test", "ranked")
    }
    for row in named:
        load_config(row["compare"].removesuffix(f":{DEFAULT_MODEL}"))
    assert compare_report._published("kuairand")["tim4rec"] == ".1109 / .0611"
    assert compare_report._published("own") == {}


def test_the_picture_shows_the_points_of_the_file():
    from benchmarks.results_picture import digest

    assert digest(read(RESULTS)) in results.PICTURE.read_text()


def test_a_row_replaces_the_same_figure_and_no_other(tmp_path):
    row = dict.fromkeys(COLUMNS, "") | {"dataset": "shop", "seen": "ranked", "ndcg@10": "0.1"}
    path = tmp_path / "results.csv"
    append(path, [row, row | {"seen": "masked"}])
    append(path, [row | {"ndcg@10": "0.2"}])
    assert [(each["seen"], each["ndcg@10"]) for each in read(path)] == [
        ("ranked", "0.2"),
        ("masked", "0.1"),
    ]


def test_runs_of_consecutive_seeds_have_a_mean():
    row = dict.fromkeys(COLUMNS, "") | {"ndcg@10": "0.1", "best_epoch": "3", "epochs": "9"}
    rows = [
        row | {"seed": "2021", "ndcg@10": "0.3", "best_epoch": "5", "command": "x --seed=2021"},
        row | {"seed": "2020", "mrr@10": "0.5", "train_cpu_s": "10", "p": "0.1"},
        row | {"seed": "2020", "seen": "masked"},  # another figure, of one seed
    ]
    [mean] = means(rows)
    assert mean["seed"] == "2020-2021 (mean)" and mean["command"] == "x --seed=SEED"
    assert (mean["ndcg@10"], mean["ndcg@10_sd"]) == ("0.200000", "0.141421")
    assert (mean["best_epoch"], mean["epochs"], mean["p"]) == ("3 5", "9", "")
    assert mean["mrr@10"] == mean["mrr@10_sd"] == mean["train_cpu_s"] == ""  # not of both seeds
    [mean] = means([rows[0] | {"train_cpu_s": "10"}, rows[1] | {"train_cpu_s": ""}])
    assert mean["train_cpu_s"] == ""  # and not that of the last seed
    assert not means(row | {"seed": seed} for seed in ("2020", "2022"))


PLACES = RANKED | {"dataset": "shop", "model": "m", "ndcg@10": "0.1", "code": "1"}


@pytest.fixture
def runs(monkeypatch):
    """Rows and the NDCG@10 of 400 users of runs that are named MODEL/SEED."""
    random = np.random.default_rng(0)
    users = random.uniform(size=400)

    def rows_of_run(run):
        row = dict.fromkeys(COLUMNS, "") | PLACES | {"variant": run.parent.name, "seed": run.name}
        row["dataset"] = "other" if row["variant"] == "elsewhere" else "shop"
        return [row | {"part": "valid"}, row, row | {"seen": "masked"}]

    def gains(run):
        worse = 0.1 if run.parent.name == "worse" else 0
        noise = random.normal(scale=0.1, size=(2, len(users)))
        return {"ranked": users - worse + noise[0], "masked": users + noise[1]}

    monkeypatch.setattr(commands_results, "rows_of_run", rows_of_run)
    monkeypatch.setattr(commands_results, "_gains", gains)


def test_rows_of_runs_say_how_clear_a_difference_is(runs):
    ours = [Path("ours/2020"), Path("ours/2021")]
    others = [Path("worse/2020"), Path("worse/2021"), Path("alike/2020")]
    rows = rows_of_runs(others, ours)
    assert len(rows) == 3 * 5 + 3 * 2  # each run once, and a mean of two of the models
    assert len(rows_of_runs([*ours, *others], ours)) == len(rows)
    told = {(row["variant"], row["seed"], row["seen"]): row["p"] for row in rows if row["p"]}
    assert set(told) == {
        *(("worse", "2020-2021 (mean)", seen) for seen in ("ranked", "masked")),
        *(("alike", "2020", seen) for seen in ("ranked", "masked")),
    }
    assert float(told["worse", "2020-2021 (mean)", "ranked"]) < 1e-6
    assert (
        float(told["worse", "2020-2021 (mean)", "masked"])
        > 0.01
        < float(told["alike", "2020", "ranked"])
    )
    assert all(row["part"] == "test" and row["p_against"] == "ours" for row in rows if row["p"])
    assert not any(row["p"] for row in rows_of_runs([*ours, *others]))


def test_runs_that_cannot_be_compared_are_refused(runs):
    with pytest.raises(UserError, match="--against must name all runs of one model"):
        rows_of_runs([Path("worse/2020")], [Path("ours/2020"), Path("alike/2020")])
    with pytest.raises(UserError, match="--against must name all runs of one model"):
        rows_of_runs([Path("ours/2021")], [Path("ours/2020")])
    with pytest.raises(UserError, match="has dataset other, and ours/2020 has shop"):
        rows_of_runs([Path("elsewhere/2020")], [Path("ours/2020")])


def test_a_table_of_something_else_is_not_replaced(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is no table of results"):
        append(path, [])
    assert path.read_text() == "a,b\n1,2\n"
