"""The report of an evaluation: tables for the terminal, and a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tim4rec_jax.files import atomic_write

_NAMES = {"hit": "Hit", "ndcg": "NDCG", "mrr": "MRR"}
_MUCH = 1e-4  # a difference that shows in figures of four decimals
_ORACLES = {"with_time": "best possible", "time_blind": "best blind to time"}
_SLICES = {
    "length": "events before the target",
    "gap": "last gap the model sees",
    "popularity": "training events of the target",
    "known": "whether the target has training events",
}


def print_report(report: dict, console: Console) -> None:
    """Prints the protocol in a line, the metrics as a table, and a table for each further matter.

    Args:
        report: a report with the keys `dataset`, `split`, `exclude_seen`, `users`, `metrics` and
            `standard_errors`. It may have `protocol` (see `tim4rec_jax.evaluation.protocol`),
            `epoch` (of the checkpoint), `by_ties` ("optimistic" and "expected" to metrics),
            `not_a_number` (how many targets have a score of NaN), `slices` (name to the groups
            that `sliced_metrics` returns), `beyond_accuracy` (see there), `sampled` (which part
            of the lists they are of, or "") and `oracle` (name to the
            metrics of the best possible model, which is known for synthetic data).
        console: the console to print to.
    """
    if "protocol" in report:
        console.out(protocol_line(report))
    seen = ", seen items excluded" if report["exclude_seen"] else ""
    title = f"{report['dataset']}, {report['split']} split, {report['users']:,} users{seen}"
    oracle, others = report.get("oracle", {}), _other_ties(report)
    table = Table("metric", box=SIMPLE_HEAD)
    named = (_ORACLES.get(name) or name for name in oracle)
    for heading in ["model", "± s.e.", *(f"ties {how}" for how in others), *named]:
        table.add_column(heading, justify="right")
    for name, value in report["metrics"].items():
        figures = [value, report["standard_errors"][name]]
        figures += [limits.get(name) for limits in (*others.values(), *oracle.values())]
        cells = ("" if figure is None else f"{figure:.4f}" for figure in figures)
        table.add_row(_pretty(name), *cells)
    console.out(title)
    console.print(table)
    for warning in _warnings(report):
        console.out(f"warning: {warning}")
    if "beyond_accuracy" in report:
        console.out("beyond accuracy")
        console.print(_beyond_accuracy(report["beyond_accuracy"]))
        if report.get("sampled"):
            console.out(report["sampled"])
    for by, groups in report.get("slices", {}).items():
        console.out(f"by {_SLICES[by]}")
        table, width = _slice_table(by, groups), console.width
        if _width(table, console) > width:
            table = _slice_table(by, groups, between="\n± ")
        # The terminal wraps a line that is still too long, where Rich would cut the figures.
        console.width = max(width, _width(table, console))
        console.print(table)
        console.width = width


def protocol_line(report: dict) -> str:
    """The protocol of a report in a line, in the words of its files: `split=leave_one_out ...`."""
    told = report["protocol"] | {"users": report["users"], "epoch": report.get("epoch")}
    words = (
        f"{name}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for name, value in told.items()
        if value not in ("", None)
    )
    return f"protocol: {' '.join(words)}"


def _other_ties(report: dict) -> dict[str, dict[str, float]]:
    """The metrics under the other rule of ties, if they differ at all."""
    return {
        how: figures
        for how, figures in report.get("by_ties", {}).items()
        if any(figures[name] != value for name, value in report["metrics"].items())
    }


def _warnings(report: dict) -> Iterator[str]:
    for figures in _other_ties(report).values():
        changes = {name: abs(value - figures[name]) for name, value in report["metrics"].items()}
        name = max(changes, key=lambda name: changes[name])
        if changes[name] > _MUCH:
            yield (
                f"equal scores change {_pretty(name)} by {changes[name]:.4f}: optimistic figures "
                "give each target the best place among its equals, expected ones the mean over "
                "all orders of them"
            )
    if count := report.get("not_a_number", 0):
        yield f"the score of {count:,} targets is NaN, and they count as misses"


def _beyond_accuracy(figures: dict[str, float]) -> Table:
    """A row for each matter and a column for each k."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in figures.items():
        kind, _, k = name.partition("@")
        rows.setdefault(kind, {})[k] = value
    columns = list(dict.fromkeys(k for row in rows.values() for k in row))
    table = Table("lists of k items", *(f"k = {k}" for k in columns), box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, row in rows.items():
        table.add_row(kind, *(f"{row[k]:,.4f}" if k in row else "" for k in columns))
    return table


def _width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(width=1000)).maximum


def _slice_table(by: str, groups: list[dict], between: str = " ± ") -> Table:
    names = list(groups[0]["metrics"])
    cutoff = names[0].partition("@")[2]  # one is enough for a terminal; files hold all
    names = [name for name in names if name.partition("@")[2] == cutoff]
    table = Table(box=SIMPLE_HEAD)
    for heading in (by, "users", *map(_pretty, names)):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in groups:
        figures = (
            f"{group['metrics'][name]:.4f}{between}{group['standard_errors'][name]:.4f}"
            for name in names
        )
        table.add_row(group["bin"], f"{group['users']:,}", *figures)
    return table


def _pretty(name: str) -> str:
    kind, _, cutoff = name.partition("@")
    return f"{_NAMES[kind]}@{cutoff}"


def write_csv(report: dict, path: Path) -> None:
    """Writes one line per figure: split, slice, bin, users, metric, value, standard error.

    The lines of the metrics over all users have the slice `all`. Those under each rule of ties have
    the slice `ties`, and those beyond accuracy the slice `lists`; neither have standard errors.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["split", "slice", "bin", "users", "metric", "value", "standard_error"])
        for by, group in _groups(report):
            for name, value in group["metrics"].items():
                where = [report["split"], by, group.get("bin", ""), group["users"]]
                writer.writerow([*where, name, value, group["standard_errors"].get(name, "")])


def _groups(report: dict) -> Iterator[tuple[str, dict]]:
    yield "all", report
    common = {"users": report["users"], "standard_errors": {}}
    for how, figures in report.get("by_ties", {}).items():
        yield "ties", common | {"bin": how, "metrics": figures}
    if "beyond_accuracy" in report:
        yield "lists", common | {"metrics": report["beyond_accuracy"]}
    for by, groups in report.get("slices", {}).items():
        for group in groups:
            yield by, group
