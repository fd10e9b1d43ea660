"""The frame of studies: errors, files, sentences, and that all studies fit into it."""

import csv
import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from studies import normalisation, width
from studies.report import KEYS, Estimate, Results, answer_page, together
from studies.study import (
    RESULTS,
    SEEDS,
    Arm,
    Training,
    difference,
    main,
    make_data,
    overridden,
    paired,
    read_results,
    train_all,
    update,
)
from tim4rec_jax.commands import trainings
from tim4rec_jax.errors import UserError

NAMES = sorted(path.stem for path in Path(RESULTS).parent.glob("*.py"))
NAMES = [name for name in NAMES if name not in ("__init__", "study", "report")]
STUDIES = {name: importlib.import_module(f"studies.{name}").STUDY for name in NAMES}
PROTOCOL = {"split": "leave_one_out", "part": "test", "order": "exact", "seen": "ranked"}
PROTOCOL |= {"ties": "optimistic", "knows_next_time": False}


def training(arm, seed, gains):
    return Training(arm, seed, Path("nowhere"), {}, np.asarray(gains, float))


def row(arm, seed, value, dataset="ml100k", **more):
    found = {"dataset": dataset, "arm": arm, "seed": seed, **PROTOCOL, "ndcg@10": value}
    found |= {"ndcg@10_se": 0.01, "hit@10": 2 * value, "train_cpu_s": 50.0, "users": 100}
    return found | {"hardware": "2 cores", "jax": "0.10.2", "date": "2026-11-27"} | more


def test_there_are_the_questions():
    assert [
        *("burstiness", "effect_size", "high_dimension", "length", "normalisation", "spectra"),
        *("time_aware_transformers", "width"),
    ] == NAMES
    for name, study in STUDIES.items():
        assert study.name == name and set(study.hours) == set(study.datasets)


@pytest.mark.parametrize("name", NAMES)
def test_the_arms_of_a_study_are_told_apart(name):
    study = STUDIES[name]
    for quick in (False, True):
        grid = study.grid(quick)
        assert 0 < len(grid) <= (4 if quick else 1000)
        names = [(arm.dataset, arm.name) for arm in grid]
        assert len(set(names)) == len(names)
        folders = {arm.folder(Path("runs"), 2020) for arm in grid}
        assert len(folders) == len(grid)
        for arm in grid:
            assert not arm.against or (arm.dataset, arm.against) in names


@pytest.mark.parametrize("name", NAMES)
def test_the_quick_arms_have_settings_that_go_together(name):
    for arm in STUDIES[name].grid(quick=True):
        config = trainings.settings(arm.words(Path("data"), 2020))
        assert (config.seed, config.train.epochs) == (2020, 1)
        assert config.dataset == "data/studies/quick"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_arms_have_settings_that_go_together(name):
    for arm in STUDIES[name].grid():
        trainings.settings(arm.words(Path("data"), 2020))


def test_trainings_are_shared_by_their_settings():
    words = ("model.hidden_size=32", "train.epochs=3")
    one = Arm("a", "ml100k", "ml100k:causal", words)
    same = Arm("b", "ml100k", "ml100k:causal", words[::-1])
    runs = Path("runs")
    assert one.folder(runs, 1) == same.folder(runs, 1) != one.folder(runs, 2)
    assert one.folder(runs, 1) != replace(one, data="other").folder(runs, 1)
    long = replace(one, settings=tuple(f"model.setting_{n}={n}" for n in range(30)))
    longer = replace(long, settings=(*long.settings, "model.z=1"))
    assert len(long.folder(runs, 1).parent.name) < 255
    assert long.folder(runs, 1) != longer.folder(runs, 1)
    assert overridden(words, ("train.epochs=1", "seed=2")) == (
        *("model.hidden_size=32", "train.epochs=1"),
        "seed=2",
    )


def test_a_difference_has_the_errors_of_users_and_of_seeds():
    random = np.random.default_rng(0)
    users, seeds, errors, values = 400, 3, [], []
    for _ in range(300):  # the same experiment again and again: how far do its answers scatter?
        of_user, of_seed = random.normal(0.1, 1.0, users), random.normal(0, 0.05, seeds)
        noise = random.normal(0, 0.5, (seeds, users))
        ours = of_user + of_seed[:, None] + noise
        found = difference(dict(enumerate(ours)), dict(enumerate(np.zeros((seeds, users)))))
        values.append(found["difference"])
        errors.append(found["se"])
    truth = np.std(values)  # its own error is 4 %
    assert truth == pytest.approx(np.sqrt(1 / users + 0.05**2 / 3 + 0.25 / 3 / users), rel=0.13)
    assert 0.9 * truth < np.sqrt(np.mean(np.square(errors))) < 1.15 * truth


def test_only_common_seeds_are_compared():
    plain = Arm("plain", "ml100k", "ml100k")
    timed = replace(plain, name="timed", against="plain")
    found = [training(plain, 1, [0, 1, 0, 1]), training(plain, 2, [0, 0, 0, 0])]
    found += [training(timed, 2, [1, 0, 1, 0]), training(timed, 3, [9, 9, 9, 9])]
    [compared] = paired(found)
    assert (compared["arm"], compared["against"]) == ("timed", "plain")
    assert (compared["difference"], compared["seeds"], compared["se_seeds"]) == (0.5, 1, None)
    assert compared["se"] == compared["se_users"] == pytest.approx(1 / np.sqrt(3) / 2)
    assert paired(found[2:]) == []


def test_new_rows_replace_those_of_the_same_training(tmp_path):
    path = tmp_path / "study.csv"
    update(path, [row("a", 1, 0.1), row("b", 1, 1 / 3)], KEYS["runs"])
    update(path, [row("a", 1, 0.2, width=64)], KEYS["runs"])
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [(r["arm"], r["ndcg@10"], r["width"]) for r in rows] == [
        ("a", "0.2", "64"),
        ("b", "0.3333333333333333", ""),
    ]
    results = Results.read(path, {("ml100k", "a"): None, ("ml100k", "c"): None}, 1)
    assert [r["arm"] for r in results.runs] == ["a"]  # b is no arm of the study any more
    assert results.missing == {"ml100k": ["c"]}


def test_words_follow_the_numbers():
    assert Estimate(0.03, 0.01, 3).compared() == "higher by .0300 ± .0100"
    assert Estimate(-0.03, 0.01, 3).compared() == "lower by .0300 ± .0100"
    assert Estimate(0.03, 0.02, 3).compared() == "no clear difference (.0300 ± .0200)"
    mean = together([Estimate(0.1, 0.03, 3), Estimate(0.3, 0.04, 2)])
    assert mean == pytest.approx((0.2, 0.025, 2))


def test_the_answer_says_what_is_found_and_what_is_missing(tmp_path):
    study, path = STUDIES["normalisation"], tmp_path / "normalisation.csv"
    assert "has not been run yet" in answer_page(read_results(study, path), study)
    seeds = range(2020, 2020 + SEEDS)
    runs = [row(arm, seed, 0.1) for arm in ("none", "log", "rank") for seed in seeds]
    update(path, runs[:-1], KEYS["runs"])
    base = {"dataset": "ml100k", "against": "none", "seeds": 3, "users": 9, "se": 0.01}
    pairs = [{**base, "arm": "log", "difference": 0.03}, {**base, "arm": "rank", "difference": 0.0}]
    update(path.with_suffix(".pairs.csv"), pairs, KEYS["pairs"])
    page = answer_page(read_results(study, path), study)
    assert "log .0300 ± .0100 and rank .0000 ± .0100: a gain is clear for log." in page
    missing = page.partition("fewer seeds than planned:")[2]
    assert f"| ml100k | paper, masked, days, user, rank | {study.hours['ml100k']} |" in missing
    assert f"| beauty | all 7 | {study.hours['beauty']} |" in missing
    pairs[0]["difference"] = -0.03
    update(path.with_suffix(".pairs.csv"), pairs, KEYS["pairs"])
    assert "clear for none of them" in answer_page(read_results(study, path), study)


def test_a_verdict_follows_the_numbers(tmp_path):
    gap = {"seeds": 3, "users": 9, "se": 0.01}
    study, path = STUDIES["high_dimension"], tmp_path / "high_dimension.csv"
    arms = [arm for arm in study.arms("ml100k", False) if arm.factors["encoding"] == "causal"]
    level = {"valid_ndcg@10": 0.1}
    update(path, [row(a.name, 2020, 0.1, **a.factors, **level) for a in arms], KEYS["runs"])
    timed = [arm for arm in arms if arm.against]
    for gains, says in (
        (np.zeros(len(timed)), "The hypothesis cannot be tested"),
        (np.linspace(0.1, 0.3, len(timed)), "No: time has a clear gain in 5 of 5 pairs"),
        (np.linspace(0.3, 0.1, len(timed)), "Yes on ml-100k: there the gain of time falls"),
    ):
        pairs = [
            {
                **gap,
                "dataset": "ml100k",
                "arm": arm.name,
                "against": arm.against,
                "difference": gain,
            }
            for arm, gain in zip(timed, gains, strict=True)
        ]
        update(path.with_suffix(".pairs.csv"), pairs, KEYS["pairs"])
        assert f"**In short.** {says}" in answer_page(read_results(study, path), study)


def test_the_widest_model_is_not_known_to_be_the_best_width():
    study = STUDIES["width"]
    found = {}
    for best in (64, 256):
        runs = [
            row(arm.name, 2020, 0.1, **arm.factors)
            | {"valid_ndcg@10": 0.2 - 0.01 * abs(arm.factors["width"] - best) / 64}
            for arm in study.arms("ml100k", False)
        ]
        found[best] = width.best_widths(Results(runs, [], []))
    assert found == {64: {"ml100k": 64}, 256: {}}


def test_one_seed_is_told():
    study = STUDIES["spectra"]
    spectrum = {"what": "spectrum", "length": 50, "width": 32, "effective_rank_plain": 30.0}
    details = [
        {**spectrum, "dataset": "ml100k", "seed": 2020, "epoch": epoch, "arm": arm, "at": at}
        | {"effective_rank": rank, "difference": 1.0 + at}
        for arm, rank in (("causal 32", 30.0), ("causal 32, 1 epoch", 40.0))
        for epoch in ("initial", "best")
        for at in (1, 2)
    ]
    results = Results([row("causal 32", 2020, 0.1)], [], details)
    page = answer_page(results, study)
    assert "moves the effective rank from 30.00 to 30.00" in page
    assert "with one seed, the error is over heads (32)" in page
    assert "Where there is one seed, the error knows nothing about other seeds." in page


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_answer_is_that_of_the_committed_rows(name):
    path = RESULTS / f"{name}.csv"
    expected = answer_page(read_results(STUDIES[name], path), STUDIES[name])
    assert path.with_suffix(".md").read_text() == expected, f"python -m studies.{name} --report"
    assert path.with_suffix(".png").stat().st_size > 1000


def test_quick_figures_never_become_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--quick answers nothing"):
        main(STUDIES["width"], ["--quick", "--out", str(RESULTS)])
    with pytest.raises(UserError, match="--arms none: there is no such arm; there are 16 x 32"):
        main(STUDIES["width"], ["--arms", "none"])
    with pytest.raises(UserError, match="--datasets ml20m: the study has no such data set"):
        main(STUDIES["width"], ["--datasets", "ml20m"])
    assert not any(tmp_path.iterdir())


def test_what_a_call_trains(tmp_path, monkeypatch):
    study = replace(STUDIES["width"], datasets=("ml100k",))
    calls = []

    def stop(planned, *_):
        calls.append([(arm.name, seed) for arm, seed in planned])
        return [], []

    monkeypatch.setattr("studies.study.train_all", stop)
    words = ["--out", str(tmp_path), "--runs", str(tmp_path), "--arms", "32 x 32 x 32"]
    main(study, [*words, "--seeds", "2"])
    arms = ("32 x 32 x 32", "64 x 32 x 32")  # the second is what the first is compared with
    assert calls.pop() == [(arm, seed) for seed in (2020, 2021) for arm in arms]
    [there] = [arm for arm in study.grid() if arm.name == arms[0]]
    folder = there.folder(tmp_path, 2022) / "run"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    main(study, [*words, "--seeds", "1"])
    assert calls.pop() == [(arms[0], 2020), (arms[1], 2020), (arms[0], 2022)]
    main(study, [*words[:-2], "--datasets"])
    assert calls.pop() == []


@pytest.mark.parametrize("name", NAMES)
def test_a_study_has_a_page_with_its_answer(name):
    page = (RESULTS.parents[1] / "docs" / "studies" / f"{name}.md").read_text()
    results = f"../../studies/results/{name}"
    assert f"](../../studies/results/{name}.png)" in page
    assert f"```{{include}} {results}.md\n```" in page
    assert "**Question.**" in page and "**Hypothesis.**" in page and "## Method" in page


def test_a_log_of_a_study_is_made_beside_one_of_the_same_name(tmp_path):
    (tmp_path / "poisson").mkdir()
    (tmp_path / "poisson" / "dataset.json").write_text("{}")  # the user's own
    made = []
    study = replace(STUDIES["burstiness"], make={"poisson": lambda path, _: made.append(path)})
    arms = [arm for arm in study.grid() if arm.dataset == "poisson"]
    make_data(study, arms, tmp_path, quick=False)
    assert made == [tmp_path / "studies" / "poisson"]
    config = trainings.settings(arms[0].words(tmp_path, 2020))
    assert config.dataset == str(made[0])


def test_a_training_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    arms = [Arm(name, "quick", "quickstart:causal", (f"train.epochs={n}",), data="none")
            for n, name in enumerate(("a", "b", "c"), 1)]  # fmt: skip
    bad = replace(arms[0], name="bad", settings=("train.epochs=-1",))

    def train(folder, words, stop):
        return "error: no memory" if "--config.train.epochs=2" in words else ""

    monkeypatch.setattr(trainings, "train", train)
    monkeypatch.setattr("studies.study.finished", lambda arm, seed, folder: SimpleNamespace(
        arm=arm, figures={"test": {"ndcg@10": 0.1}}))  # fmt: skip
    planned = [(arm, 2020) for arm in (bad, *arms)]
    found, problems = train_all(planned, tmp_path, tmp_path / "runs", processes=2)
    assert [each.arm.name for each in found] == ["a", "c"]
    assert len(problems) == 2 and "quick b 2020: error: no memory" in problems
    assert "config.train.epochs is -1" in problems[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_quick_study_runs_to_its_answer(name, tmp_path):
    before = {path.name: path.read_bytes() for path in RESULTS.iterdir()}
    words = ["--quick", "--runs", str(tmp_path), "--processes", "2"]
    main(STUDIES[name], words)
    folder = tmp_path / "quick" / "results"
    page = (folder / f"{name}.md").read_text()
    assert "not been run" not in page and "Not run yet" not in page
    assert (folder / f"{name}.png").stat().st_size > 5000
    with open(folder / f"{name}.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(STUDIES[name].grid(quick=True))
    main(STUDIES[name], words)  # everything is finished: the same again
    assert (folder / f"{name}.md").read_text() == page
    assert {path.name: path.read_bytes() for path in RESULTS.iterdir()} == before


def test_normalisations_of_a_row():
    gaps = np.array([[[0.0, 60.0, 86_400.0, 60.0, 5.0]]])
    real = np.array([[[True, True, True, True, False]]])
    found = {
        name: np.asarray(function(gaps, real))[0, 0, :4]
        for name, function in normalisation.NORMALISATIONS.items()
    }
    mean = (60 + 86_400 + 60) / 4
    expected = {
        "days": gaps[0, 0, :4] / 86_400,
        "log": np.log1p(gaps[0, 0, :4]) / np.log1p(10 * 365.25 * 86_400),
        "user": gaps[0, 0, :4] / mean,
        "rank": [0.25, 0.75, 1.0, 0.75],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)


def test_the_logarithm_of_a_gap_below_zero():
    # ml-100k has such gaps in the order of RecBole; one of them made a whole training fail.
    gaps, real = np.array([[[0.0, -40.0]]]), np.ones((1, 1, 2), bool)
    np.testing.assert_array_equal(
        normalisation.NORMALISATIONS["log"](gaps, real), np.zeros_like(gaps)
    )
