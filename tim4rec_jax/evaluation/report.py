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
_ORACLES = {"with_time": "best possible", "time_blind": "best blind to time"}
_SLICES = {
    "length": "events before the target",
    "gap": "last gap the model sees",
    "popularity": "training events of the target",
    "known": "whether the target has training events",
}


def print_report(report: dict, console: Console) -> None:
    """Prints the metrics as a table, and one more table for each slice.

    Args:
        report: a report with the keys `dataset`, `split`, `exclude_seen`, `users`, `metrics` and
            `standard_errors`. It may have `slices` (name to the groups that `sliced_metrics`
            returns) and `oracle` (name to the metrics of the best possible model, which is known
            for synthetic data).
        console: the console to print to.
    """
    seen = ", seen items excluded" if report["exclude_seen"] else ""
    title = f"{report['dataset']}, {report['split']} split, {report['users']:,} users{seen}"
    oracle = report.get("oracle", {})
    table = Table("metric", box=SIMPLE_HEAD)
    for heading in ["model", "± s.e.", *(_ORACLES.get(name) or name for name in oracle)]:
        table.add_column(heading, justify="right")
    for name, value in report["metrics"].items():
        figures = [value, report["standard_errors"][name]]
        figures += [limits.get(name) for limits in oracle.values()]
        cells = ("" if figure is None else f"{figure:.4f}" for figure in figures)
        table.add_row(_pretty(name), *cells)
    console.print(title, table, sep="\n")
    for by, groups in report.get("slices", {}).items():
        console.print(f"by {_SLICES[by]}")
        table, width = _slice_table(by, groups), console.width
        if _width(table, console) > width:
            table = _slice_table(by, groups, between="\n± ")
        # The terminal wraps a line that is still too long, where Rich would cut the figures.
        console.width = max(width, _width(table, console))
        console.print(table)
        console.width = width


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

    The lines of the metrics over all users have the slice `all`.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["split", "slice", "bin", "users", "metric", "value", "standard_error"])
        for by, group in _groups(report):
            for name, value in group["metrics"].items():
                where = [report["split"], by, group.get("bin", ""), group["users"]]
                writer.writerow([*where, name, value, group["standard_errors"][name]])


def _groups(report: dict) -> Iterator[tuple[str, dict]]:
    yield "all", report
    for by, groups in report.get("slices", {}).items():
        for group in groups:
            yield by, group
