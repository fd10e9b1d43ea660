"""The tables and the picture of `tim4rec compare`."""

import csv
import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ticker import LogFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from tim4rec_jax.evaluation.metrics import per_user
from tim4rec_jax.evaluation.significance import paired_p_values

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# What of the protocol tells tables apart.
PROTOCOL = ("split", "part", "order", "seen", "ties", "knows_next_time")
# Figures of other people. Its column `compare` has CONFIG:MODEL where a figure follows the protocol
# of `tim4rec compare`: full ranking, items of the history ranked, leave-one-out. The orders of
# events differ.
QUOTED = Path(__file__).with_name("quoted.csv")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
      dataset: name of the config.
      model: name of the model or of the config's variant.
      seed: seed of the training.
      problem: why it failed; empty for a finished run.
      figures: what `compare.measure` returns.
      ranks: rank of each user's target in the test; 0 for a user without a target.
      ties: number of other items with the score of each user's target.
    """

    dataset: str
    model: str
    seed: int
    problem: str
    figures: dict
    ranks: np.ndarray | None
    ties: np.ndarray | None = None

    def row(self) -> dict:
        """Returns the run as a row of the CSV file."""
        row = {"dataset": self.dataset, "model": self.model, "seed": self.seed}
        if self.problem:
            return row | {"problem": self.problem}
        told = self.protocol()
        named = {name: told[name] for name in ("config", "variant", *PROTOCOL) if name in told}
        figures = {f"test {name}": value for name, value in self.figures["test"].items()}
        return row | named | self.costs() | figures

    def protocol(self) -> dict:
        """Returns the protocol of its figures; see `tim4rec_jax.evaluation.protocol`."""
        return self.figures.get("protocol", {})

    def gains(self) -> np.ndarray:
        """Returns the NDCG@10 of each user with a target."""
        assert self.ranks is not None, "the run has failed"
        tested = self.ranks > 0
        ties = self.ties if self.protocol().get("ties") == "expected" else None
        return per_user(self.ranks[tested], (10,), None if ties is None else ties[tested])[
            "ndcg@10"
        ]

    def costs(self) -> dict:
        """Returns epochs, seconds of processor time, megabytes, and other costs."""
        told = self.figures
        per_epoch = told["cpu"] / told["epochs"]
        return {
            "parameters": told["parameters"],
            "MFLOP a sample": told["flops"] / 1e6,
            "best epoch": told["best_epoch"],
            "epochs": told["epochs"],
            "s an epoch": per_epoch,
            "s to best": per_epoch * told["best_epoch"],
            "inference s": told["inference"],
            "peak MB": told["memory"],
        }


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The search of a model's settings on validation, which came before its runs.

    Attributes:
      dataset: name of the config.
      model: name of the model or of the config's variant.
      trials: how many ended how: "complete", "pruned", "fail".
      valid: NDCG@10 on validation of the best.
      cpu: seconds of processor time of all trials.
      settings: the best settings by their full names; empty for a model that learns nothing.
    """

    dataset: str
    model: str
    trials: dict[str, int] = dataclasses.field(default_factory=dict)
    valid: float = float("nan")
    cpu: float = 0.0
    settings: dict = dataclasses.field(default_factory=dict)


def _groups(found: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """Groups finished runs by dataset and model, in the order of the command line."""
    groups: dict = {}
    for run in found:
        models = groups.setdefault(run.dataset, {})
        models.setdefault(run.model, [])
        if not run.problem:
            models[run.model].append(run)
    return groups


def spread(values: list[float]) -> str:
    """Returns the mean and, for several values, the standard deviation: `.1234 ± .0056`."""
    text = f"{statistics.mean(values):.4f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.4f}"
    return text.replace("0.", ".")


def p_values(models: dict[str, list[Run]]) -> dict[str, float]:
    """The `paired_p_values` of NDCG@10, which is the mean over seeds for each user.

    Args:
      models: finished runs by model, of one dataset; a model without runs is left out.
    """
    trained = {name: runs for name, runs in models.items() if runs}
    return paired_p_values(
        {name: np.mean([run.gains() for run in runs], 0) for name, runs in trained.items()}
    )


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def markdown(found: list[Run], tunings: Sequence[Tuning] = ()) -> str:
    """Returns Markdown tables for each dataset: quality, cost, and the search of settings."""
    lines = []
    for dataset, models in _groups(found).items():
        finished = {name: runs for name, runs in models.items() if runs}
        failed = [run for run in found if run.dataset == dataset and run.problem]
        lines += [f"## {dataset}", ""]
        if finished:
            lines += _protocol([run for runs in finished.values() for run in runs])
            lines += [*_quality(dataset, finished), *_cost(finished)]
        lines += _searches([tuning for tuning in tunings if tuning.dataset == dataset])
        lines += [f"- {run.model}, seed {run.seed}: {run.problem}" for run in failed]
        lines += [""] * bool(failed)
    return "\n".join(lines)


def _protocol(runs: list[Run]) -> list[str]:
    """Says under which protocol the figures of a table were measured, and where it is not one."""
    told = {
        name: list(dict.fromkeys(str(run.protocol().get(name)) for run in runs))
        for name in PROTOCOL
        if any(name in run.protocol() for run in runs)
    }
    if not told:
        return []
    words = (f"{name} {' or '.join(values)}" for name, values in told.items())
    lines = [f"Protocol: {', '.join(words)}.", ""]
    if mixed := [name for name, values in told.items() if len(values) > 1]:
        lines += [f"These figures are not comparable where {' and '.join(mixed)} differs.", ""]
    return lines


def print_result(console: Console, found: list[Run]) -> None:
    """Prints the test figures at 10 of the finished runs, a table for each dataset."""
    for dataset, models in _groups(found).items():
        finished = {name: runs for name, runs in models.items() if runs}
        if not finished:
            continue
        first, p = next(iter(finished)), p_values(finished)
        names = [name for name in finished[first][0].figures["test"] if name.endswith("@10")]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("model")
        for name in (*map(_label, names), f"p against {first}", "processor s"):
            table.add_column(name, justify="right")
        for model, runs in finished.items():
            values = [spread([run.figures["test"][name] for run in runs]) for name in names]
            chance = f"{p[model]:.2g}" if model in p else ""
            cost = sum(run.figures["cpu"] for run in runs)
            table.add_row(model, *values, chance, _rounded(cost))
        console.out(f"\n{dataset}, test figures in the mean over seeds:")
        console.print(table)


def _label(metric: str) -> str:
    return metric.upper().replace("HIT", "Hit")


def _quality(dataset: str, models: dict[str, list[Run]]) -> list[str]:
    first, p = next(iter(models)), p_values(models)
    published = _published(dataset)
    rows, names = [], _by_cut_off(models[first][0].figures["test"])
    for name, runs in models.items():
        values = [spread([run.figures["test"][metric] for run in runs]) for metric in names]
        chance = f"{p[name]:.2g}" if name in p else ""
        rows.append([name, str(len(runs)), *values, chance, published.get(name, "")])
    header = ["model", "seeds", *map(_label, names), f"p against {first}"]
    header.append("published Hit@10 / NDCG@10")
    if not any(published.get(name) for name in models):
        header, rows = header[:-1], [row[:-1] for row in rows]
    caption = (
        f"Mean and standard deviation over seeds. p is that of a paired t-test of NDCG@10 over "
        f"users against {first}, corrected for the number of models (Holm)."
    )
    return [caption, "", *_table(header, rows)]


def _published(dataset: str) -> dict[str, str]:
    """Published Hit@10 / NDCG@10 by the name of the model, for the config of this name."""
    with open(QUOTED, newline="") as file:
        named = [(row["compare"].partition(":"), row) for row in csv.DictReader(file)]
    return {
        model: " / ".join(row[metric].removeprefix("0") for metric in ("hit@10", "ndcg@10"))
        for (config, _, model), row in named
        if config == dataset
    }


def _by_cut_off(names: Iterable[str]) -> list[str]:
    """Puts hit@10, ndcg@10, mrr@10 before hit@20."""
    return sorted(names, key=lambda name: int(name.partition("@")[2]))


def _searches(tunings: list[Tuning]) -> list[str]:
    if not tunings:
        return []
    header = ["model", "trials", "stopped early", "failed", "validation NDCG@10", "processor s"]
    rows = []
    for found in tunings:
        stopped, failed = (str(found.trials.get(state, 0)) for state in ("pruned", "fail"))
        chosen = ", ".join(f"`{name}={value}`" for name, value in found.settings.items())
        figure = f"{found.valid:.4f}".replace("0.", ".", 1) if found.settings else ""
        count = str(sum(found.trials.values()))
        rows.append([found.model, count, stopped, failed, figure, f"{found.cpu:.0f}", chosen])
    caption = (
        "Settings were searched with the first seed and the same number of trials for each model, "
        "and judged on validation. Seconds are those of all trials."
    )
    return [caption, "", *_table([*header, "chosen"], rows)]


def _cost(models: dict[str, list[Run]]) -> list[str]:
    costs = {name: [run.costs() for run in runs] for name, runs in models.items()}
    keys = list(next(iter(costs.values()))[0])
    rows = [
        [name, *(_rounded(statistics.mean(cost[key] for cost in each)) for key in keys)]
        for name, each in costs.items()
    ]
    caption = (
        "Cost, in the mean over seeds. Seconds are processor seconds of all threads, those of "
        "training with start and compilation."
    )
    return [caption, "", *_table(["model", *keys], rows)]


def _rounded(value: float | int) -> str:
    if math.isnan(value):  # a run that was trained elsewhere
        return ""
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 1 else 2
    return f"{value:,.{digits}f}"


def picture(found: list[Run], path: Path) -> None:
    """Draws NDCG@10 against the processor time to the best epoch, a panel for each dataset."""
    groups = {name: {m: r for m, r in ms.items() if r} for name, ms in _groups(found).items()}
    groups = {name: models for name, models in groups.items() if models}
    if not groups:
        return
    figure, panels = plt.subplots(
        1, len(groups), figsize=(6 * len(groups), 4.5), squeeze=False, layout="constrained"
    )
    for panel, (dataset, models) in zip(panels[0], groups.items(), strict=True):
        for name, runs in models.items():
            quality = [run.figures["test"]["ndcg@10"] for run in runs]
            cost = [run.costs()["s to best"] for run in runs]
            at = statistics.mean(cost), statistics.mean(quality)
            deviation = statistics.stdev(quality) if len(quality) > 1 else 0
            panel.errorbar(*at, yerr=deviation, fmt="o", capsize=3)
            panel.annotate(name, at, textcoords="offset points", xytext=(6, 5))
        panel.set(xscale="log", title=dataset, ylabel="test NDCG@10")
        panel.xaxis.set_major_formatter(LogFormatter())  # 20 instead of 2 x 10^1
        panel.xaxis.set_minor_formatter(LogFormatter())
        panel.set_xlabel("processor seconds to the best epoch")
        panel.margins(0.15)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
