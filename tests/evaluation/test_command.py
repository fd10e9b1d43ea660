"""`eval.py` on a run directory as train.py leaves it."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.small_dataset import random_histories, write_dataset
from tests.serving.tiny_run import save_run
from tim4rec_jax.commands.eval import BEYOND_ACCURACY
from tim4rec_jax.data import open_dataset, train_item_counts
from tim4rec_jax.evaluation import evaluate
from tim4rec_jax.evaluation.beyond_accuracy import NAMES
from tim4rec_jax.run import load_model

EVAL = Path(__file__).parents[2] / "eval.py"
LENGTHS = [*range(1, 14), 30, 2]
ORACLE = {
    split: {"with_time": {"hit@10": 0.875}, "time_blind": {"hit@10": 0.5}}
    for split in ("valid", "test")
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    dataset = write_dataset(folder / "data", random_histories(LENGTHS))
    metadata = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps(metadata | {"oracle": ORACLE}))
    save_run(folder / "run", dataset, time_encoding="paper")
    (folder / "run" / "metrics.json").write_text("untouched")
    return folder


@pytest.fixture
def command(monkeypatch):
    """Runs eval.py in this process; gives its exit code."""

    def run(*flags):
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, flags)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(EVAL), run_name="__main__")
        return exit.value.code

    return run


def test_figures_are_those_of_the_best_checkpoint(folder, command, capsys):
    assert command("--workdir", folder / "run") == 0
    report = json.loads((folder / "run" / "eval_test.json").read_text())
    config, model = load_model(folder / "run")
    settings = dict(max_length=6, batch_size=8, convention=config.data.convention)
    figures, _ = evaluate(model, open_dataset(folder / "data"), "test", **settings)
    assert report["metrics"] == pytest.approx(figures, rel=1e-12)
    assert (report["users"], report["split"], report["exclude_seen"]) == (14, "test", False)
    assert (folder / "run" / "metrics.json").read_text() == "untouched"
    printed = capsys.readouterr().out
    assert "0.8750" in printed  # the best that any model could reach
    assert f"{figures['ndcg@10']:.4f}" in printed


def test_all_files(folder, command, tmp_path, capsys):
    out = {name: tmp_path / f"out.{name}" for name in ("csv", "json", "predictions")}
    flags = [f"--{name}={path}" for name, path in out.items()]
    flags += ["--split=valid", "--exclude-seen", "--by=length,gap,popularity", "--top-k=3"]
    assert command("--workdir", folder / "run", *flags) == 0
    report = json.loads(out["json"].read_text())
    assert list(report["slices"]) == ["length", "gap", "popularity"]
    assert "oracle" not in report  # it reckons with all items
    assert len(out["csv"].read_text().splitlines()) > 9 * 5
    table = pq.read_table(out["predictions"])
    assert len(table) == 12 * 3
    assert set(table["user"].to_pylist()) == {f"u{row}" for row in range(15)} - {"u0", "u1", "u14"}
    assert not (folder / "run" / "eval_valid_exclude_seen.json").exists()
    assert "by last gap" in capsys.readouterr().out


def test_all_equal_scores_are_told(folder, command, tmp_path, capsys):
    """A model that knows nothing has Hit@10 = 1 under the optimistic rule, and says so."""
    run = save_run(tmp_path / "run", folder / "data", lambda leaf: leaf * 0, time_encoding="paper")
    files = ["--ranks", tmp_path / "ranks.parquet", "--csv", tmp_path / "out.csv", "--ks=3,10"]
    assert command("--workdir", run, *files) == 0
    report, printed = json.loads((run / "eval_test.json").read_text()), capsys.readouterr().out
    assert report["metrics"]["hit@10"] == report["by_ties"]["optimistic"]["hit@10"] == 1
    assert report["by_ties"]["expected"]["hit@10"] == pytest.approx(10 / 30)
    assert "ties expected" in printed and "0.3333" in printed
    assert "warning: equal scores change MRR@3 by 0.9389" in printed
    told = "split=leave_one_out part=test order=exact seen=ranked ties=optimistic"
    assert f"protocol: dataset=small model=tim4rec seed=2020 {told}" in printed
    assert "knows_next_time=False ks=3,10 users=14\n" in printed
    table = pq.read_table(tmp_path / "ranks.parquet")
    assert table.to_pylist() == [
        {"user": f"u{row}", "rank": 1, "ties": 29} for row in range(15) if LENGTHS[row] > 1
    ]
    assert "test,lists,,14,diversity@3," in (tmp_path / "out.csv").read_text()
    assert command("--workdir", run, "--ties=expected", "--by=length", "--accuracy-only") == 0
    report = json.loads((run / "eval_test.json").read_text())
    assert report["metrics"] == report["by_ties"]["expected"]
    assert report["protocol"]["ties"] == "expected"
    assert report["slices"]["length"][0]["metrics"]["hit@20"] == pytest.approx(20 / 30)
    assert "beyond_accuracy" not in report and "lists of k" not in capsys.readouterr().out


def test_lists_are_those_of_the_predictions(folder, command, tmp_path):
    flags = ["--predictions", tmp_path / "best.parquet", "--top-k=5", "--ks=5", "--exclude-seen"]
    assert command("--workdir", folder / "run", *flags) == 0
    found = json.loads((folder / "run" / "eval_test_exclude_seen.json").read_text())
    best, ds = pq.read_table(tmp_path / "best.parquet"), open_dataset(folder / "data")
    assert found["beyond_accuracy"]["coverage@5"] == len(set(best["item"].to_pylist())) / 30
    counts = dict(zip(ds.item_ids.to_pylist(), train_item_counts(ds), strict=True))
    by_user = {}
    for row in best.to_pylist():
        by_user.setdefault(row["user"], []).append(counts[row["item"]])
    mean = np.mean([np.mean(events) for events in by_user.values()])
    assert found["beyond_accuracy"]["popularity@5"] == pytest.approx(mean)


def damaged(folder, tmp_path, damage):
    workdir = tmp_path / "run"
    shutil.copytree(folder / "run", workdir)
    damage(workdir / "best" / "1" / "default")
    return workdir


def test_half_a_checkpoint(folder, command, tmp_path, capsys):
    def damage(checkpoint):
        for file in checkpoint.rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    check_sentence(
        command("--workdir", damaged(folder, tmp_path, damage)), capsys, "cannot be read"
    )


def test_no_checkpoint(folder, command, tmp_path, capsys):
    workdir = damaged(folder, tmp_path, lambda checkpoint: shutil.rmtree(checkpoint.parent))
    check_sentence(command("--workdir", workdir), capsys, "no best checkpoint")


def test_no_run(command, tmp_path, capsys):
    check_sentence(command("--workdir", tmp_path), capsys, "no run directory")


def test_another_dataset(folder, command, tmp_path, capsys):
    other = write_dataset(tmp_path / "other", random_histories(LENGTHS, n_items=29), n_items=29)
    code = command("--workdir", folder / "run", "--dataset", other)
    check_sentence(code, capsys, "was trained on 30 items and")


def test_another_dataset_of_the_same_size(folder, command, tmp_path, capsys):
    other = write_dataset(tmp_path / "other", random_histories(LENGTHS, seed=1))
    code = command("--workdir", folder / "run", "--dataset", other)
    check_sentence(code, capsys, "is not the dataset that the run in")


def test_a_dataset_that_has_moved(folder, command, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "moved")
    assert command("--workdir", folder / "run", "--dataset", tmp_path / "moved") == 0


def test_results_name_their_data(folder, command, tmp_path):
    out, best = tmp_path / "out.json", tmp_path / "best.parquet"
    flags = ["--json", out, "--predictions", best, "--top-k", 10**30]
    assert command("--workdir", folder / "run", *flags) == 0
    content = json.loads((folder / "data" / "dataset.json").read_text())["content"]
    assert json.loads(out.read_text())["content"] == content
    schema = pq.read_schema(best)
    assert json.loads(schema.metadata[b"tim4rec.content"]) == content
    assert pq.read_table(best)["rank"].to_numpy().max() == 30  # all that there are


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--json", "{out}", "--csv", "{out}"], "two results cannot both be written to"),
        (["--json", "{run}/config.json"], "belongs to a run or a dataset and is not replaced"),
        (["--csv", "{data}/items.parquet"], "belongs to a run or a dataset and is not replaced"),
        (["--predictions", "{run}/best/1/_CHECKPOINT_METADATA"], "belongs to a run"),
    ],
)
def test_nothing_of_a_run_or_a_dataset_is_replaced(folder, command, tmp_path, capsys, flags, words):
    places = dict(run=folder / "run", data=folder / "data", out=tmp_path / "out")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code = command("--workdir", folder / "run", *(flag.format(**places) for flag in flags))
    check_sentence(code, capsys, words)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not list(tmp_path.iterdir())


def test_batches_too_large_for_the_memory(folder, command, capsys, monkeypatch):
    monkeypatch.setattr("tim4rec_jax.runtime.host_memory", lambda: 1000)
    check_sentence(command("--workdir", folder / "run"), capsys, "batches of 8 users with 6 events")


def test_weights_that_are_not_finite(folder, command, tmp_path, capsys):
    workdir = save_run(tmp_path / "run", folder / "data", lambda leaf: leaf * np.nan)
    check_sentence(command("--workdir", workdir), capsys, "not finite")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--workdir"),
        (["--split", "train"], "'train'"),
        (["--by", "length,age"], "'age'"),
        (["--ks", "10,0"], "'0' is not a whole number of 1 or more"),
        (["--ties", "worst"], "'worst'"),
        (["--top-k", "0"], "'0' is not a whole number of 1 or more"),
        (["--csv", "no/such/folder/x.csv"], "the folder no/such/folder does not exist"),
        (["--json", "."], "is a folder"),
        (["--dataset", "nowhere"], "nowhere is not a prepared dataset"),
    ],
)
def test_bad_flags(folder, command, flags, words, capsys):
    expected = 1 if {"--by", "--dataset"} & {*flags} else 2  # those two are read after the others
    flags = ["--workdir", folder / "run", *flags] if flags else []
    check_sentence(command(*flags), capsys, words, expected)


def test_help_defines_what_is_measured(command, capsys):
    assert command("--help") == 0
    said = capsys.readouterr().out
    assert tuple(BEYOND_ACCURACY) == NAMES and all(f"\n  {name}: " in said for name in NAMES)


def check_sentence(code, capsys, words, expected=1):
    message = capsys.readouterr().err
    assert code == expected
    assert message.startswith("error: ")
    assert words in message
    assert message.count("\n") == 1
