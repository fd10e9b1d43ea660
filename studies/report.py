"""What a study's numbers say: estimates with their errors, sentences, the picture, the page.

Everything here is made from the files of results alone.
"""

import csv
import dataclasses
import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tim4rec_jax.files import atomic_write

Row = dict[str, Any]
# What names a row of each of the three files. In the details, `what` was measured and `at` says
# where: in which layer, at which length, in which group of users.
KEYS = {
    "runs": ("dataset", "arm", "seed"),
    "pairs": ("dataset", "arm", "against"),
    "details": ("dataset", "arm", "seed", "what", "at"),
}
PROTOCOL = ("split", "part", "order", "seen", "ties", "knows_next_time")
# Readable on white and on black pages: the picture brings its own paper.
PAPER, INK, GREY = "#fbfbf9", "#1f2328", "#6e7781"
COLORS = ("#c2410c", "#33658a", "#2f7d4f", "#8a4fa3", "#b58900", "#4a5568", "#c2185b", "#00838f")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": cycler(color=COLORS),
}
# Names of data sets for people.
DATASETS = {
    "ml100k": "ml-100k",
    "ml1m": "ML-1M",
    "beauty": "Amazon-Beauty",
    "kuairand": "the KuaiRand slice",
    "quickstart": "the synthetic log",
    "quick": "the synthetic log of --quick",
}


class Estimate(NamedTuple):
    """A number with its standard error, and the number of seeds behind it."""

    value: float
    error: float
    seeds: int

    def __str__(self) -> str:
        return f"{short(self.value)} ± {short(self.error)}"

    @property
    def clear(self) -> bool:
        """Whether the value is more than twice its standard error away from zero."""
        return abs(self.value) > 2 * self.error

    def compared(self) -> str:
        """The value in words, if it is a difference."""
        if not self.clear:
            return f"no clear difference ({self})"
        return f"{'higher' if self.value > 0 else 'lower'} by {short(abs(self.value))} ± " + short(
            self.error
        )


def short(value: float) -> str:
    """`.0123` for a metric; numbers from 1 on with three digits."""
    if abs(value) < 1:
        return f"{value:.4f}".replace("0.", ".", 1)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclasses.dataclass(frozen=True)
class Results:
    """The rows of a study's files, with numbers for what looks like one.

    Attributes:
      runs: a row for each training.
      pairs: a row for each two arms that are compared.
      details: what else was measured.
      missing: data sets with the arms that have fewer seeds than the study asks for.
    """

    runs: list[Row]
    pairs: list[Row]
    details: list[Row]
    missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, planned: Collection[tuple[str, str]], seeds: int) -> "Results":
        """Reads NAME.csv and the files beside it; a file that is missing has no rows.

        Args:
          path: of NAME.csv.
          planned: data sets and names of the arms of the whole study, in the order in which rows
            are reported. Rows of other arms, which the study had once, are left out.
          seeds: how many each arm should have.
        """
        place = {arm: number for number, arm in enumerate(planned)}

        def rows(suffix: str, only: bool = True) -> list[Row]:
            file = path.with_suffix(suffix)
            if not file.exists():
                return []
            with open(file, newline="") as text:
                found = [{k: _value(v) for k, v in row.items()} for row in csv.DictReader(text)]
            if not only:
                return found
            known = [row for row in found if (row["dataset"], row["arm"]) in place]
            return sorted(known, key=lambda row: place[row["dataset"], row["arm"]])

        runs, missing = rows(".csv"), {}
        counts: dict[tuple[str, str], int] = {}
        for row in runs:
            counts[row["dataset"], row["arm"]] = counts.get((row["dataset"], row["arm"]), 0) + 1
        for dataset, arm in planned:
            if counts.get((dataset, arm), 0) < seeds:
                missing.setdefault(dataset, []).append(arm)
        return cls(runs, rows(".pairs.csv"), rows(".details.csv", only=False), missing)

    @property
    def datasets(self) -> list[str]:
        """The data sets that have results."""
        return list(dict.fromkeys(row["dataset"] for row in self.runs))

    def select(self, **values: Any) -> list[Row]:
        """The trainings with these values in these columns."""
        return select(self.runs, **values)

    def level(self, metric: str = "ndcg@10", **values: Any) -> Estimate | None:
        """The mean of a metric over the trainings with these values; None: there are none.

        The error of NDCG@10 has a part from users, who are a sample, and one from seeds.
        """
        rows = self.select(**values)
        if not rows:
            return None
        found = [row[metric] for row in rows]
        users = statistics.mean(r["ndcg@10_se"] for r in rows) if metric == "ndcg@10" else 0.0
        seeds = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
        return Estimate(statistics.mean(found), math.hypot(users, seeds), len(found))

    def difference(self, dataset: str, arm: str, against: str = "") -> Estimate | None:
        """The difference of NDCG@10 of an arm and the one that it is compared with, by users."""
        for row in select(self.pairs, dataset=dataset, arm=arm):
            if not against or row["against"] == against:
                return Estimate(row["difference"], row["se"], int(row["seeds"]))
        return None

    def arms(self, dataset: str) -> list[str]:
        """The arms with results on a data set, in the order of the grid."""
        return list(dict.fromkeys(row["arm"] for row in self.select(dataset=dataset)))


def select(rows: Sequence[Row], **values: Any) -> list[Row]:
    """The rows with these values in these columns; `at_` stands for the column `at`."""
    return [row for row in rows if all(row.get(k) == v for k, v in values.items())]


def _value(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def together(estimates: Sequence[Estimate]) -> Estimate | None:
    """The mean of differences on several data sets, each of the same weight; None of none."""
    if not estimates:
        return None
    error = math.sqrt(sum(each.error**2 for each in estimates)) / len(estimates)
    mean = statistics.mean(each.value for each in estimates)
    return Estimate(mean, error, min(each.seeds for each in estimates))


def join(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def named(dataset: str) -> str:
    """The name of a data set for people."""
    return DATASETS.get(dataset, dataset)


def answer_page(results: Results, study: Any) -> str:
    """The answer of a study in Markdown: verdict, sentences, protocol, table, what is missing."""
    there = results.runs or results.details
    sentences = study.answer(results) if there else ["This study has not been run yet."]
    verdict = study.verdict(results) if there else ""
    parts = [
        f"<!-- Made by `python -m studies.{study.name} --report` from the tables beside it. -->",
        *([f"**In short.** {verdict}"] if verdict else []),
        "\n".join(f"- {sentence}" for sentence in sentences),
        *_tables(results),
        *_missing(results, study),
    ]
    return "\n\n".join(parts) + "\n"


def write_report(path: Path, results: Results, study: Any) -> None:
    """Writes the picture and the answer of a study beside its NAME.csv.

    Args:
      path: of NAME.csv.
      results: of the study.
      study: a `studies.study.Study`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path.with_suffix(".md"), "w") as file:
        file.write(answer_page(results, study))
    with matplotlib.rc_context(STYLE):
        figure = plt.figure(figsize=(9, 4.2), layout="constrained")
        if results.runs or results.details:
            study.draw(results, figure)
        if not figure.axes:
            figure.text(0.5, 0.5, "not run yet", ha="center", va="center", color=GREY)
        elif results.missing:
            figure.suptitle("not all arms have run yet", x=1, ha="right", color=GREY, size=8)
        # Without a date and a version, so that the same rows give the same file.
        figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
        plt.close(figure)


def _tables(results: Results) -> list[str]:
    """A table for each protocol, because figures of two do not belong into one column."""
    by_protocol: dict[str, list[Row]] = {}
    for row in results.runs:
        words = ", ".join(f"{name} {row[name]}" for name in PROTOCOL)
        by_protocol.setdefault(words, []).append(row)
    parts = []
    for words, runs in by_protocol.items():
        machines = join(list(dict.fromkeys(str(row["hardware"]) for row in runs)))
        versions = join(list(dict.fromkeys(str(row["jax"]) for row in runs)))
        dates = sorted({str(row["date"]) for row in runs})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        parts += [
            f"Protocol: full ranking, {words}. Machine: {machines}; jax {versions}; {when}.",
            _table(
                results, [dataset for dataset in results.datasets if select(runs, dataset=dataset)]
            ),
        ]
    if parts:
        legend = (
            "± is a standard error over users and seeds. Differences of NDCG@10 are paired over "
            "users."
        )
        shown = [results.level(dataset=d, arm=a) for d in results.datasets for a in results.arms(d)]
        if any(level.seeds == 1 for level in shown if level):
            legend += " Where there is one seed, the error knows nothing about other seeds."
        parts.append(legend)
    return parts


def _table(results: Results, datasets: Sequence[str]) -> str:
    rows = [["data", "arm", "seeds", "NDCG@10", "Hit@10", "difference", "processor s"]]
    for dataset in datasets:
        for arm in results.arms(dataset):
            level = results.level(dataset=dataset, arm=arm)
            hit = results.level("hit@10", dataset=dataset, arm=arm)
            cost = results.level("train_cpu_s", dataset=dataset, arm=arm)
            gap = results.difference(dataset, arm)
            against = [r["against"] for r in select(results.pairs, dataset=dataset, arm=arm)]
            assert level and hit and cost
            told = f"{gap} against {against[0]}" if gap else ""
            seconds = "" if math.isnan(cost.value) else f"{cost.value:,.0f}"
            cells = [dataset, arm, str(level.seeds), str(level), short(hit.value), told, seconds]
            rows.append(cells)
    return _markdown(rows)


def _missing(results: Results, study: Any) -> list[str]:
    if not results.missing:
        return []
    rows = [["data", "arms", "processor hours of all arms"]]
    for dataset, arms in results.missing.items():
        none = not select(results.runs, dataset=dataset)
        hours = study.hours.get(dataset)
        told = f"all {len(arms)}" if none else ", ".join(arms)
        rows.append([dataset, told, f"{hours:g}" if hours else ""])
    return ["Not run yet, or with fewer seeds than planned:", _markdown(rows)]


def _markdown(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def panels(figure: Figure, titles: Sequence[str], **kwargs: Any) -> list[Axes]:
    """Panels with titles, at most two beside each other, because their axes have long names."""
    columns = min(len(titles), 2)
    rows = math.ceil(len(titles) / columns)
    figure.set_size_inches(9, 4.2 if rows == 1 else 3.5 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)
    for panel, title in zip(axes, titles, strict=False):
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
    for panel in axes[len(titles) :]:
        panel.set_axis_off()
    return axes[: len(titles)]


def dots(panel: Axes, labels: Sequence[str], estimates: Sequence[Estimate], color: str) -> None:
    """Draws estimates with bars of twice their error, one below the other, with names."""
    places = range(len(labels))[::-1]
    values = [each.value for each in estimates]
    errors = [2 * each.error for each in estimates]
    panel.errorbar(values, places, xerr=errors, fmt="o", color=color, capsize=3)
    panel.set_yticks(list(places), labels)
    panel.set_ylim(-0.6, len(labels) - 0.4)
