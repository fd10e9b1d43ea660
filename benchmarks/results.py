"""The tables of results in README.md, docs/results.md and benchmarks/RESULTS.md, and the picture.

    python -m benchmarks.results             # writes them anew from the files below
    python -m benchmarks.results add RUN...  # first adds the figures of finished runs, and the
                                             # means of those that differ in their seed alone
    python -m benchmarks.results add RUN... --against RUN...  # and p values of the difference

`results.csv` has a row for each run and protocol. The figures of other people are in
`tim4rec_jax/commands/quoted.csv`, because `tim4rec compare` prints them, too. Only what stands
between `<!-- table: NAME -->` and `<!-- end -->` is written. A table has one protocol: rows of
another one cannot get into it.
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.results_tables import NO_TIME, TABLES
from tim4rec_jax.commands.compare_report import QUOTED
from tim4rec_jax.commands.results import COLUMNS, PROTOCOL, append, read, rows_of_runs
from tim4rec_jax.errors import UserError, run_main

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
PICTURE = HERE.parent / "docs/pictures/quality_and_cost.svg"
PAGES = [HERE.parent / page for page in ("README.md", "docs/results.md", "benchmarks/RESULTS.md")]
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Row = dict[str, str]
NAMES = {
    "ml-100k": "ml-100k",
    "ml-1m": "ML-1M",
    "beauty": "Amazon-Beauty",
    "beauty-mixed": "Amazon-Beauty, mixed",
    "kuairand-slice": "KuaiRand, a slice",
    "kuairand-slice-clicks": "KuaiRand, clicks of a slice",
    "synthetic": "synthetic",
}
MODELS = {
    "tim4rec": "TiM4Rec",
    "ssd4rec": "SSD4Rec*",
    "mamba4rec": "Mamba4Rec",
    "lrurec": "LRURec",
    "gru4rec": "GRU4Rec",
    "sasrec": "SASRec",
    "tisasrec": "TiSASRec",
    "bert4rec": "BERT4Rec",
    "hstu": "HSTU",
    "esasrec": "eSASRec",
    "bsarec": "BSARec",
    "caser": "Caser",
    "popularity": "Popularity",
}


def _decimal(text: str) -> str:
    """`.1234`, as figures between 0 and 1 are written here."""
    return f"{float(text):.4f}".removeprefix("0") if text else ""


def _figure(metric: str):
    def cell(row: Row) -> str:
        deviation = row.get(f"{metric}_sd", "")
        return _decimal(row[metric]) + (f" ± {_decimal(deviation)}" if deviation else "")

    return cell


def _config(row: Row) -> str:
    name = f"`{row['config']}.py:{row['variant']}`".replace(":`", "`")
    if not row["config"]:
        name = row["variant"]
    settings = row["settings"].split()
    if "train.objective=every_position" in settings:
        settings = ["every position", *(s for s in settings if not s.startswith("train."))]
    return ", ".join([name, *(f"`{s}`" if "=" in s else s for s in settings)])


def _best(row: Row) -> str:
    best, epochs = row["best_epoch"].split(), row["epochs"].split()
    if len(epochs) == 1:
        epochs *= max(len(best), 1)
    return ", ".join(f"{a}/{b}" for a, b in zip(best, epochs, strict=bool(best)))


def model_name(row: Row) -> str:
    """The name of the model of a row, as tables and the picture have it."""
    forms = {"causal": "causal", "official": "as published", "": "as published"}
    form = forms.get(row["variant"], "") if row["model"] == "tim4rec" else ""
    if NO_TIME in row["settings"].split():
        form += " without time"
    return f"{MODELS[row['model']]} {form}".strip()


def _p(row: Row) -> str:
    return f"{float(row['p']):.2g}".removeprefix("0") if row["p"] else ""


CELLS = {
    "data": lambda row: NAMES.get(row["dataset"], row["dataset"]),
    "model": model_name,
    "config": _config,
    "seeds": lambda row: row["seed"].removesuffix(" (mean)"),
    "Hit@10": _figure("hit@10"),
    "NDCG@10": _figure("ndcg@10"),
    "MRR@10": _figure("mrr@10"),
    "masked Hit@10": _figure("masked hit@10"),
    "masked NDCG@10": _figure("masked ndcg@10"),
    "best": _best,
    "p": _p,
    "cpu s": lambda row: row["train_cpu_s"],
    "inference s": lambda row: row["inference_cpu_s"],
    "peak MB": lambda row: row["peak_mb"],
    "parameters": lambda row: row["parameters"],
    "MFLOP": lambda row: row["mflop"],
    "note": lambda row: row["note"],
}
HEADINGS = {"best": "best epoch / epochs", "p": "p against causal"}


def seeds(row: Row) -> int:
    """The number of seeds that a row is the mean of: `2020-2022 (mean)` has 3."""
    first, _, last = row["seed"].removesuffix(" (mean)").partition("-")
    return int(last or first) - int(first) + 1


def protocol_of(rows: Iterable[Row]) -> dict[str, str]:
    """The protocol of rows.

    Raises:
      UserError: they have several, so they do not belong in one table.
    """
    found = {tuple(row[column] for column in PROTOCOL) for row in rows}
    if len(found) != 1:
        raise UserError(f"a table would mix the protocols {sorted(found)}")
    return dict(zip(PROTOCOL, found.pop(), strict=True))


def pick(
    rows: list[Row], protocol: dict[str, str], choice: tuple[str, str, str], seed: str = ""
) -> Row:
    """The row of a choice: that of the seed, or that with the most seeds.

    Raises:
      UserError: there is none.
    """
    dataset, variant, settings = choice
    wanted = set(settings.split())
    found = [
        row
        for row in rows
        if (row["dataset"], row["variant"]) == (dataset, variant)
        and all(row[column] == value for column, value in protocol.items())
        and set(row["settings"].split()) == wanted
        and seed in ("", row["seed"])
        and not row["note"].startswith("after epoch")
    ]
    if not found:
        raise UserError(f"{RESULTS.name} has no row for {choice} with {protocol}")
    return max(found, key=lambda row: (seeds(row), row["p"] != "", row["mrr@10"] != ""))


def in_words(protocol: dict[str, str]) -> str:
    """What readers must know of a protocol to compare its figures, as one line."""
    parts = {"valid": "validation", "test": "test"}
    words = [
        f"{protocol['split'].replace('_', '-')}, {parts[protocol['part']]}",
        f"items of the history {protocol['seen']}",
        f"event order {protocol['order']}",
        f"ties {protocol['ties']}",
        "time of the target " + ("known" if protocol["knows_next_time"] == "yes" else "not known"),
    ]
    return "Protocol: full ranking, " + ", ".join(words) + "."


def _heading(column: str, both: bool) -> str:
    """Of a column; where a table has both protocols, it says which of them the figures follow."""
    if column.startswith("masked "):
        return column.removeprefix("masked ") + ", masked"
    if both and "@" in column:
        return f"{column}, ranked"
    return HEADINGS.get(column, column)


def _markdown(columns: Sequence[str], rows: Iterable[Row], cells=None) -> list[str]:
    cells = cells or CELLS
    both = any(column.startswith("masked ") for column in columns)
    headings = [_heading(column, both) for column in columns]
    lines = [headings, ["---"] * len(columns)]
    lines += [[cells[column](row) for column in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _origin(rows: Sequence[Row]) -> str:
    """Machine, versions and dates of the rows, as one line."""

    def several(column: str) -> str:
        return " or ".join(sorted({row[column] for row in rows if row[column]}))

    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"Machine: {several('hardware')}; jax {several('jax')}; code {several('code')}; {when}."


def table(name: str) -> str:
    """The text of a block: protocol, table and where its figures come from."""
    if name == "all":
        return _all(read(RESULTS))
    if name.startswith("quoted-"):
        return _quoted(name.removeprefix("quoted-"))
    if name not in TABLES:
        raise UserError(f"there is no table {name}; there are {', '.join(TABLES)}")
    rows, chosen = read(RESULTS), TABLES[name]
    picked = [pick(rows, chosen.protocol, choice, chosen.seed) for choice in chosen.chosen]
    words = in_words(protocol_of(picked))
    if chosen.masked:
        beside = chosen.protocol | {"seen": "masked"}
        others = [pick(rows, beside, choice, chosen.seed) for choice in chosen.chosen]
        protocol_of(others)
        words = words.replace("history ranked", "history ranked or masked, as the column says")
        picked = [
            row | {f"masked {column}": other[column] for column in COLUMNS}
            for row, other in zip(picked, others, strict=True)
        ]
    lines = [words, "", *_markdown(chosen.columns, picked)]
    return "\n".join([*lines, "", _origin(picked), ""])


def quoted() -> list[Row]:
    """The figures of other people."""
    with open(QUOTED, newline="") as file:
        return list(csv.DictReader(file))


def _quoted(seen: str) -> str:
    """Tables of figures of other people, one for each protocol they can be told to have."""
    rows = [row for row in quoted() if row["seen"] == seen]
    cells = {**CELLS, "model": lambda row: row["model"], "source": lambda row: row["source"]}
    lines = []
    for protocol in dict.fromkeys(tuple(row[column] for column in PROTOCOL) for row in rows):
        those = [row for row in rows if tuple(row[column] for column in PROTOCOL) == protocol]
        lines += [in_words(protocol_of(those)), ""]
        columns = ("data", "model", "Hit@10", "NDCG@10", "source")
        lines += [*_markdown(columns, those, cells), ""]
    return "\n".join(lines)


def _all(rows: list[Row]) -> str:
    """Every row of `results.csv`: a table for each dataset and protocol, costs, commands."""
    runs = {name: number for number, name in enumerate(dict.fromkeys(map(_run, rows)), 1)}
    cells = {**CELLS, "run": lambda row: str(runs[_run(row)])}
    lines = []
    for dataset, name in NAMES.items():
        those = [row for row in rows if row["dataset"] == dataset]
        if not those:
            continue
        lines += [f"### {name}", ""]
        for protocol in dict.fromkeys(tuple(row[c] for c in PROTOCOL) for row in those):
            part = [row for row in those if tuple(row[c] for c in PROTOCOL) == protocol]
            lines += [in_words(protocol_of(part)), ""]
            columns = ["config", "seeds", "Hit@10", "NDCG@10", "MRR@10", "best", "p", "run", "note"]
            for column in ("p", "note"):
                if not any(row[column] for row in part):
                    columns.remove(column)
            lines += [*_markdown(columns, part, cells), ""]
        costs = [row for row in those if row["parameters"] and row["seen"] == "ranked"]
        costs = [row for row in costs if row["part"] == "test"]
        if costs:
            lines += ["What these runs cost, in seconds of processor time of all threads:", ""]
            columns = ("config", "seeds", "cpu s", "inference s", "peak MB", "parameters", "MFLOP")
            lines += [*_markdown((*columns, "run"), costs, cells), ""]
    lines += ["### Runs", "", "A `SEED` stands for each of the seeds of the row.", ""]
    for (command, hardware, jax, code, date), number in runs.items():
        versions = f"{hardware}; jax {jax}; code {code}; {date}".replace("jax ;", "").strip()
        lines.append(f"{number}. `{command}` ({versions})")
    return "\n".join([*lines, ""])


def _run(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in ("command", "hardware", "jax", "code", "date"))


def rewritten(text: str) -> str:
    """A page with its tables written anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{table(match[2])}{match[4]}", text)


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command line, or the given words."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="add")
    add = commands.add_parser("add", help="add the figures of finished runs to results.csv")
    add.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    add.add_argument(
        "--against",
        nargs="+",
        default=[],
        type=Path,
        metavar="RUN",
        help="runs of one model that the others are compared with, on NDCG@10 user by user; they "
        "are added, too",
    )
    flags = parser.parse_args(words)
    if flags.command:
        rows = rows_of_runs(flags.runs, flags.against)
        append(RESULTS, rows)
        print(f"added {len(rows)} rows to {RESULTS}")
    from benchmarks.results_picture import draw  # late, because matplotlib takes long to import

    draw(read(RESULTS), PICTURE)
    for page in PAGES:
        text = rewritten(page.read_text())
        if text != page.read_text():
            page.write_text(text)
            print(f"wrote the tables of {page}")


if __name__ == "__main__":
    sys.exit(run_main(main))
