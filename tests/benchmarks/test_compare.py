"""The tables of the comparison: what they say of finished runs, and of runs that failed."""

import csv
import hashlib
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from tests.data.small_dataset import random_histories, write_dataset
from tests.serving.tiny_run import save_run, tiny_dataset
from tim4rec_jax.cli import parse
from tim4rec_jax.commands import compare
from tim4rec_jax.commands.compare import arguments, measure, train, write_csv
from tim4rec_jax.commands.compare_report import (
    Run,
    Tuning,
    markdown,
    p_values,
    picture,
    print_result,
    spread,
)
from tim4rec_jax.commands.results import COLUMNS, _gains, changed_settings, read, rows_of_run
from tim4rec_jax.commands.trainings import settings
from tim4rec_jax.data import open_dataset
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import evaluate
from tim4rec_jax.evaluation.evaluate import batch_settings
from tim4rec_jax.evaluation.evaluate_run import evaluate_run
from tim4rec_jax.evaluation.metrics import metrics, per_user
from tim4rec_jax.evaluation.significance import paired_p_values
from tim4rec_jax.run import load_model, read_settings, write_settings

RNG = np.random.default_rng(0)
USERS = 400


def run(model, ranks, seed=2020):
    figures = {
        "test": metrics(ranks[ranks > 0]),
        "cpu": 120.0,
        "memory": 1000.0,
        "epochs": 10,
        "best_epoch": 5,
        "parameters": 215_346,
        "flops": 2.9e6,
        "inference": 0.5,
    }
    return Run("beauty", model, seed, "", figures, ranks)


def ranks(best):
    found = RNG.integers(1, best, USERS)
    found[:20] = 0  # without a target
    return found


GOOD, SAME, BAD = (run(name, ranks(best)) for name, best in (("a", 30), ("b", 30), ("c", 300)))
FAILED = Run("beauty", "d", 2021, "error: no memory", {}, None)


def test_a_paired_test_over_users_tells_models_apart():
    found = p_values({"a": [GOOD], "b": [SAME], "c": [BAD]})
    assert found["b"] > 0.05 > 1e-6 > found["c"]
    assert p_values({"a": [GOOD], "same": [GOOD]}) == {"same": 1.0}


def test_holm_multiplies_the_smallest_by_the_number_of_models():
    alone = p_values({"a": [GOOD], "c": [BAD]})["c"]
    among_two = p_values({"a": [GOOD], "b": [SAME], "c": [BAD]})["c"]
    assert among_two == pytest.approx(2 * alone)


def test_holm_multiplies_each_by_the_number_that_are_left():
    rng = np.random.default_rng(0)
    first = rng.normal(size=200)
    others = {str(n): first + rng.normal(0.05 * n, 1, 200) for n in (1, 3, 5)}
    raw = {name: stats.ttest_rel(gains, first).pvalue for name, gains in others.items()}
    found, (a, b, c) = paired_p_values({"first": first} | others), sorted(raw, key=raw.get)
    second = max(3 * raw[a], 2 * raw[b])
    assert [found[a], found[b]] == pytest.approx([3 * raw[a], second])
    assert found[c] == pytest.approx(max(second, raw[c]))


def test_a_single_user_tells_no_models_apart():
    assert paired_p_values({"a": np.array([0.3]), "b": np.array([0.1])}) == {"b": 1.0}


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
def test_what_is_measured_is_the_test_of_the_run(tmp_path, split):
    dataset = write_dataset(tmp_path / "data", random_histories([20] * 9))
    run = save_run(tmp_path / "run", dataset)
    config = read_settings(run / "config.json")
    config.data.split = split
    write_settings(config, run / "config.json")
    (run / "metrics.json").write_text("{}")
    (tmp_path / "cost.json").write_text('{"cpu": 1.0, "memory": 1.0}')
    config, model = load_model(run)
    ds, expected = open_dataset(dataset).split(split), {}
    for seen in ("ranked", "masked"):
        settings = batch_settings(config) | {"exclude_seen": seen == "masked"}
        figures, found = evaluate(model, ds, "test", **settings)
        expected[seen] = per_user(found[found > 0], (10,))["ndcg@10"]
        if seen == "ranked":
            assert measure(tmp_path)["test"] == pytest.approx(figures)
            report = evaluate_run(run, accuracy_only=True)
            assert report["metrics"] == pytest.approx(figures)
    assert not np.array_equal(expected["ranked"], expected["masked"])
    for seen, gains in _gains(run).items():
        np.testing.assert_array_equal(gains, expected[seen])


def test_tables_and_files(tmp_path):
    found = [GOOD, run("a", ranks(30), 2021), BAD, FAILED]
    lines = markdown(found).splitlines()
    assert lines[0] == "## beauty"
    rows = {line.split(" | ")[0]: line for line in lines}
    values = [each.figures["test"]["hit@10"] for each in found[:2]]
    assert any(line.startswith(f"| a | 2 | {spread(values)} |") for line in lines)
    assert rows["- d, seed 2021: error: no memory"]
    assert rows["| a"] == "| a | 215,346 | 2.9 | 5 | 10 | 12 | 60 | 0.50 | 1,000 |"
    write_csv(tmp_path / "table.csv", found)
    with open(tmp_path / "table.csv") as file:
        written = list(csv.DictReader(file))
    assert float(written[2]["test ndcg@10"]) == BAD.figures["test"]["ndcg@10"]
    assert (written[3]["problem"], written[3]["test hit@10"]) == ("error: no memory", "")
    assert all(f"test {name}" in written[0] for name in GOOD.figures["test"])
    picture(found, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 5000


def test_the_figures_are_printed_and_no_column_is_empty(capsys):
    print_result(Console(width=90), [GOOD, BAD, FAILED])
    said = capsys.readouterr().out
    assert "NDCG@10" in said and "p against a" in said
    assert all(spread([each.figures["test"]["ndcg@10"]]) in said for each in (GOOD, BAD))
    assert "published" not in markdown([GOOD, BAD])


def test_tables_name_their_protocol(tmp_path):
    told = {"config": "beauty", "variant": "", "split": "leave_one_out", "part": "test"}
    told |= {"order": "exact", "seen": "ranked", "ties": "optimistic", "knows_next_time": False}
    found = [replace(each, figures=each.figures | {"protocol": told}) for each in (GOOD, BAD)]
    text = markdown(found)
    said = "Protocol: split leave_one_out, part test, order exact, seen ranked, ties optimistic"
    assert f"## beauty\n\n{said}, knows_next_time False.\n" in text
    assert "comparable" not in text
    write_csv(tmp_path / "table.csv", found)
    with open(tmp_path / "table.csv") as file:
        row = next(csv.DictReader(file))
    assert {name: row[name] for name in told} == {name: str(v) for name, v in told.items()}
    other = replace(BAD, figures=BAD.figures | {"protocol": told | {"knows_next_time": True}})
    text = markdown([found[0], other])
    assert "knows_next_time False or True.\n" in text
    assert "not comparable where knows_next_time differs" in text


def test_users_are_compared_under_the_rule_of_ties_of_the_figures():
    tied = replace(GOOD, ties=np.where(GOOD.ranks > 0, 500, 0))
    np.testing.assert_array_equal(tied.gains(), GOOD.gains())
    expected = replace(tied, figures=tied.figures | {"protocol": {"ties": "expected"}})
    assert expected.gains().mean() < GOOD.gains().mean() / 10


def test_the_searches_of_settings_stand_below():
    tunings = [
        Tuning("beauty", "a", {"complete": 3, "pruned": 2}, 0.0512, 61.4, {"train.epochs": 9}),
        Tuning("beauty", "popularity"),
        Tuning("steam", "a", {"complete": 5}, 0.0612, 100.0, {"train.epochs": 9}),
    ]
    lines = markdown([GOOD], tunings).splitlines()
    assert "| a | 5 | 2 | 0 | .0512 | 61 | `train.epochs=9` |" in lines
    assert "| popularity | 0 | 0 | 0 |  | 0 |  |" in lines
    assert not any(".0612" in line for line in lines)


def test_the_published_stand_beside():
    assert ".0842 / .0421" in markdown([run("sasrec", ranks(30))])


def test_a_training_that_fails_says_why(tmp_path):
    missing = [f"dataset={tmp_path / 'none'}"]
    problem = train(tmp_path, arguments("ml100k", "tim4rec", 2020, missing))
    assert problem.startswith(f"error: {tmp_path / 'none'} is not a prepared dataset")
    assert problem in (tmp_path / "train.log").read_text()
    assert (tmp_path / "cost.json").exists()


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run, and the command line that made it."""
    dataset = tiny_dataset(tmp_path / "data")
    words = arguments("own", "causal", 2020, [f"dataset={dataset}", "train.epochs=3"])
    config, run = settings(words), tmp_path / "run"
    run.mkdir()
    write_settings(config, run / "config.json")
    shutil.copyfile(dataset / "dataset.json", run / "dataset.json")
    (run / "metrics.json").write_text('{"seconds": 1}')
    return tmp_path, words


def test_a_finished_run_is_reused_for_the_same_settings_and_data_only(finished):
    folder, words = finished
    assert train(folder, words) == ""
    other = [word.replace("epochs=3", "epochs=4") for word in words]
    assert "other settings: train.epochs (3 -> 4)" in train(folder, other)
    metadata = json.loads((folder / "data" / "dataset.json").read_text())
    metadata["content"]["sequences"] = "other"
    (folder / "data" / "dataset.json").write_text(json.dumps(metadata))
    assert "is not the dataset that the run" in train(folder, words)
    assert not (folder / "train.log").exists()


def test_measurements_of_an_earlier_run_are_not_reused(finished, monkeypatch):
    folder, _ = finished
    digest = hashlib.sha256((folder / "run" / "metrics.json").read_bytes()).hexdigest()
    (folder / "measured.json").write_text(json.dumps({"run": digest, "flops": 7}))
    monkeypatch.setattr(compare, "load_model", None)  # with which it measures again
    with pytest.raises(TypeError):
        measure(folder)  # an earlier version kept no ties
    (folder / "ties.npy").touch()
    assert measure(folder)["flops"] == 7
    (folder / "run" / "metrics.json").write_text('{"seconds": 2}')
    with pytest.raises(TypeError):
        measure(folder)


def test_the_rows_of_a_run_say_how_to_make_it_again(finished, monkeypatch):
    folder, words = finished
    figures = {"hit@10": 0.25, "ndcg@10": 0.125}
    told = {"test": figures, "test_standard_errors": figures, "users": 3}
    told |= {
        "valid": figures | {"ndcg@10": 0.75},
        "epochs": 3,
        "best_epoch": 2,
        "jax": "0.10.2",
        "device": "cpu",
    }
    (folder / "run" / "metrics.json").write_text(json.dumps(told))
    masked = {"metrics": figures | {"ndcg@10": 0.5}, "protocol": {"ties": "optimistic"}}
    (folder / "run" / "eval_test_exclude_seen.json").write_text(json.dumps(masked))
    (folder / "cost.json").write_text(json.dumps({"cpu": 12.6, "memory": 800.2}))
    rows = rows_of_run(folder / "run")
    found = [(row["part"], row["seen"], row["ndcg@10"]) for row in rows]
    assert found == [
        ("valid", "ranked", "0.750000"),
        ("test", "ranked", "0.125000"),
        ("test", "masked", "0.500000"),
    ]
    for row in rows:
        assert (row["config"], row["variant"], row["settings"]) == (
            "own",
            "causal",
            "train.epochs=3",
        )
        assert (row["train_cpu_s"], row["peak_mb"], row["knows_next_time"]) == ("13", "800", "no")
        assert all(row[column] for column in ("dataset", "order", "hardware", "code", "date"))
    again = rows[0]["command"].replace("configs/own.py:causal", "own:causal").split()[1:]
    made, _ = parse([*again, words[-2]], usage="")
    assert made == parse(["train.py", *words], usage="")[0]
    # Masked figures of fewer cut-offs, as `eval.py --exclude-seen --ks 5` leaves them.
    (folder / "run" / "eval_test_exclude_seen.json").write_text(
        json.dumps(masked | {"metrics": {"ndcg@5": 0.5}})
    )
    monkeypatch.setattr("tim4rec_jax.evaluation.evaluate_run.evaluate_run", lambda *_, **__: masked)
    assert rows_of_run(folder / "run") == rows
    metadata = json.loads((folder / "run" / "dataset.json").read_text())
    metadata["content"]["sequences"] = "other"
    (folder / "run" / "dataset.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="is not the dataset that the run in"):
        rows_of_run(folder / "run")


def test_a_setting_that_follows_from_others_is_not_named():
    words = ["train.py", "--config=ml100k:tisasrec", "--config.train.objective=every_position"]
    assert changed_settings(parse(words, usage="")[0]) == ["train.objective=every_position"]
    words[-1] = "--config.data.convention=exact"
    assert changed_settings(parse(words, usage="")[0]) == ["data.convention=exact"]


def test_finished_runs_are_added_to_a_table_of_results(tmp_path, monkeypatch):
    row = dict.fromkeys(COLUMNS, "") | {"dataset": "beauty", "ndcg@10": "0.1"}
    asked = []

    def rows_of_runs(runs, against):
        asked.append((list(runs), against))
        return [row]

    found = [replace(GOOD, model="sasrec"), replace(BAD, model="hstu"), FAILED]
    monkeypatch.setattr(compare, "runs", lambda flags: (found, []))
    monkeypatch.setattr(compare, "rows_of_runs", rows_of_runs)
    words = ["--datasets", "beauty", "--models", "sasrec", "hstu", f"--runs={tmp_path}"]
    words += [f"--out={tmp_path / 'table-v1.2'}", f"--results={tmp_path / 'results.csv'}"]
    with pytest.raises(UserError, match="1 of 3 runs failed"):
        compare.main(words)
    sasrec, hstu = (tmp_path / "beauty" / name / "2020" / "run" for name in ("sasrec", "hstu"))
    assert asked == [([sasrec, hstu], [sasrec])]
    assert read(tmp_path / "results.csv") == [row]
    assert {path.name for path in tmp_path.glob("table*")} == {
        f"table-v1.2.{kind}" for kind in ("md", "csv", "png")
    }


def test_every_model_is_searched_with_the_same_budget_before_its_seeds(tmp_path, monkeypatch):
    """The trainings of the search are made up, and those of the seeds are only listed."""
    tiny_dataset(tmp_path / "ml-100k")
    searched, trained = [], []

    def trial(folder, words, stop):
        searched.append(words)
        (folder / "run").mkdir(parents=True)
        record = {"kind": "valid", "epoch": 1, "ndcg@10": 0.1 + 0.01 * len(searched)}
        (folder / "run" / "log.jsonl").write_text(json.dumps(record) + "\n")
        return ""

    def seed(folder, words):
        trained.append((folder, words))
        return "not trained here"

    monkeypatch.setattr(compare.trainings, "train", trial)
    monkeypatch.setattr(compare, "train", seed)
    words = f"--data {tmp_path} --runs {tmp_path}/runs --out {tmp_path}/table --seeds 2 --tune 2"
    names = ["--datasets", "ml100k", "--models", "sasrec", "popularity", "--", "train.epochs=1"]
    with pytest.raises(UserError, match="4 of 4 runs failed"):
        compare.main([*words.split(), *names])
    assert len(searched) == 2
    chosen = [word for word in searched[1] if "weight_decay" in word or "hidden_size" in word]
    assert len(chosen) == 2
    by_folder = {"/".join(folder.parts[-2:]): words for folder, words in trained}
    assert set(by_folder) == {f"{m}/{s}" for m in ("sasrec", "popularity") for s in (2020, 2021)}
    assert set(chosen) <= set(by_folder["sasrec/2021"])
    assert "--config.train.epochs=1" in by_folder["sasrec/2021"]
    assert not any("hidden_size" in word for word in by_folder["popularity/2020"])
    table = (tmp_path / "table.md").read_text()
    assert re.search(r"\| sasrec \| 2 \| 0 \| 0 \| .1200 \| 0 \| `train.learning_rate=", table)
