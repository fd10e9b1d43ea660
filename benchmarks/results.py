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
from typing import NamedTuple

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
RANKED = {
    "split": "leave_one_out",
    "part": "test",
    "order": "recbole",
    "seen": "ranked",
    "ties": "optimistic",
    "knows_next_time": "no",
}
MASKED = RANKED | {"seen": "masked"}
# The settings that `tim4rec compare` gave to every model, by the name of the dataset.
COMPARED = {
    "ml-100k": "train.objective=every_position train.batch_size=32 train.schedule=cosine "
    "train.epochs=30 train.patience=30",
    "beauty": "train.objective=every_position train.schedule=cosine train.epochs=25 "
    "train.patience=25 train.batch_size=32 model.repeat_bias=True",
    "kuairand-slice": "train.objective=every_position train.schedule=cosine train.epochs=25 "
    "train.patience=25 train.batch_size=64 model.repeat_bias=True model.date_bias_knots=28",
}
COMPARED["beauty-mixed"] = COMPARED["beauty"]
# What a search of six trials chose for each model on ml-100k, besides what all trials had.
_ALIKE = "data.shuffle_ties=True train.epochs=16 train.patience=16"
_PACKED = f"{_ALIKE} model.repeat_bias=True train.objective=every_position train.batch_size=32 " + (
    "train.schedule=cosine"
)
_SMALL = "model.hidden_size=32 train.learning_rate=0.00329 train.weight_decay=0.0001"
_SHALLOW = "model.hidden_size=128 model.n_layers=1"
TUNED = {
    "lrurec": f"{_PACKED} {_SHALLOW} model.dropout_prob=0.445 train.learning_rate=0.00559",
    "causal": f"{_ALIKE} {_SMALL} model.dropout_prob=0.411",
    "gru4rec": f"{_PACKED} model.dropout_prob=0.445 model.embedding_size=32 model.num_layers=1 "
    "train.learning_rate=0.00559",
    "esasrec": f"{_PACKED} {_SHALLOW} model.dropout_prob=0.445 train.learning_rate=0.00559",
    "mamba4rec": _PACKED,
    "ssd4rec": f"{_PACKED} {_SMALL} model.dropout_prob=0.411",
    "sasrec": f"{_PACKED} {_SHALLOW} model.attn_dropout_prob=0.338 model.hidden_dropout_prob=0.534",
    "hstu": f"{_PACKED} {_SMALL} model.hidden_dropout_prob=0.411",
}
# The same on the KuaiRand slice.
_OURS_ALIKE = "model.neighbours=64 model.repeat_last=True train.epochs=8 train.patience=8"
_ALL_ALIKE = f"{_OURS_ALIKE} model.date_bias_knots=28 model.repeat_bias=True " + (
    "train.objective=every_position train.batch_size=64 train.schedule=cosine"
)
_FAST = "model.dropout_prob=0.445 train.learning_rate=0.00559"
TUNED_KUAIRAND = {
    "lrurec": f"{_ALL_ALIKE} {_FAST} {_SHALLOW}",
    "hstu": f"{_ALL_ALIKE} {_SHALLOW} model.hidden_dropout_prob=0.445 train.learning_rate=0.00559",
    "causal": f"{_OURS_ALIKE} {_SMALL} model.dropout_prob=0.411",
    "gru4rec": f"{_ALL_ALIKE} {_FAST} model.embedding_size=32 model.num_layers=1",
    "sasrec": f"{_ALL_ALIKE} {_SMALL} model.attn_dropout_prob=0.14 model.hidden_dropout_prob=0.411",
    "mamba4rec": f"{_ALL_ALIKE} {_FAST} model.hidden_size=128 model.num_layers=1",
}


class Table(NamedTuple):
    """A table of a page.

    Attributes:
      protocol: what `PROTOCOL` is in all of its rows.
      chosen: dataset, variant and settings of each row. Of several rows of the CSV file, the one
        with most seeds is taken.
      columns: headings, which are keys of `CELLS`.
      seed: "" or the seed of all rows.
      masked: whether to put the figures with the items of the history masked beside, in columns of
        their own; `protocol` has them ranked.
    """

    protocol: dict[str, str]
    chosen: list[tuple[str, str, str]]
    columns: Sequence[str] = ("data", "config", "seeds", "Hit@10", "NDCG@10", "MRR@10", "best")
    seed: str = ""
    masked: bool = False


def _models(dataset: str, models: str, own: str = "", compared: str = "", alone: str = "") -> list:
    """Choices of models that were compared.

    Args:
      dataset: its name.
      models: variants; "-" is the config itself.
      own: settings of the causal variant.
      compared: settings of the others, besides those in `COMPARED`.
      alone: models that were trained with the settings of their config.
    """
    choices = []
    for model in models.split():
        variant = "" if model == "-" else model
        settings = own if variant == "causal" else f"{COMPARED[dataset]} {compared}"
        choices.append((dataset, variant, "" if model in alone.split() else settings))
    return choices


def _pure(dataset: str, models: str, own: str) -> list:
    """Choices of the causal variant with time and without, and others, none with an addition.

    Args:
      dataset: its name.
      models: variants of the others.
      own: settings that take the additions from the causal variant.
    """
    settings = " ".join(s for s in COMPARED[dataset].split() if not s.startswith("model."))
    ours = [(dataset, "causal", own), (dataset, "causal", f"{own} {NO_TIME}")]
    return ours + [(dataset, model, settings) for model in models.split()]


def _tuned(dataset: str, settings: dict[str, str]) -> list:
    """Choices of models with the settings that a search has found, by their variants."""
    return [(dataset, *each) for each in settings.items()]


NO_BIAS, NO_TIME = "model.repeat_bias=False", "model.is_time=False"
MIXED = "model.dropout_prob=0.5 model.output_std=0.02"
SLICE = "model.date_bias_knots=0 model.output_std=0.02"
MODELS_ML100K = "causal lrurec - hstu mamba4rec ssd4rec tisasrec gru4rec bert4rec sasrec caser"
BOTH = ("data", "config", "seeds", "Hit@10", "NDCG@10", "masked Hit@10", "masked NDCG@10")
TIES = "data.shuffle_ties=True train.learning_rate=0.003"
NEAR = "model.neighbours=64"
AGAIN = f"{NEAR} model.repeat_last=True"
AFTER = f"{NEAR} model.neighbours_follow=True model.neighbour_weight=2.0"
WIDE = "model.dropout_prob=0.3 model.hidden_size=128 train.epochs=30 train.learning_rate=0.001 " + (
    "train.patience=30"
)
TUNED_ALIKE = ("model", "seeds", "Hit@10", "NDCG@10", "masked Hit@10", "masked NDCG@10", "p")
PURE = ("model", "seeds", "Hit@10", "NDCG@10", "best", "p")
COMPARISON = ("model", "seeds", "Hit@10", "NDCG@10", "MRR@10", "best", "p")
TABLES = {
    "readme": Table(
        RANKED,
        [
            ("ml-100k", "", ""),
            ("ml-100k", "sasrec", COMPARED["ml-100k"]),
            ("ml-100k", "causal", NO_BIAS),
            ("ml-100k", "causal", ""),
            ("ml-100k", "causal", TIES),
            ("ml-1m", "causal", NO_BIAS),
            ("ml-1m", "causal", ""),
            ("ml-1m", "causal", WIDE),
            ("beauty", "official", ""),
            ("beauty", "causal", NO_BIAS),
            ("beauty", "causal", ""),
            ("beauty", "causal", AFTER),
            ("kuairand-slice", "", "train.patience=5"),
            ("kuairand-slice", "causal", ""),
            ("kuairand-slice", "causal", NEAR),
            ("kuairand-slice", "causal", AGAIN),
        ],
        ("data", "config", "seeds", "Hit@10", "NDCG@10"),
    ),
    "time": Table(
        RANKED,
        [
            ("ml-100k", "", ""),
            ("ml-100k", "", NO_TIME),
            ("ml-100k", "", "model.time_encoding=masked"),
            ("ml-100k", "causal", ""),
            ("ml-100k", "causal", NO_TIME),
            ("ml-100k", "causal", NO_BIAS),
            ("ml-100k", "causal", f"{NO_TIME} {NO_BIAS}"),
            ("ml-1m", "causal", ""),
            ("ml-1m", "causal", NO_BIAS),
            ("beauty", "sasrec", "train.patience=10"),
            ("beauty", "official", ""),
            ("beauty", "causal", ""),
            ("beauty", "causal", NO_TIME),
            ("beauty", "causal", NO_BIAS),
            ("beauty-mixed", "sasrec", "train.patience=10"),
            ("beauty-mixed", "official", ""),
            ("beauty-mixed", "causal", ""),
            ("beauty-mixed", "causal", MIXED),
            ("beauty-mixed", "causal", f"{NO_TIME} {MIXED}"),
            ("beauty-mixed", "causal", f"{NO_BIAS} {MIXED}"),
            ("kuairand-slice", "", "train.patience=5"),
            ("kuairand-slice", "causal", ""),
            ("kuairand-slice", "causal", "model.output_std=0.02"),
            ("kuairand-slice", "causal", SLICE),
            ("kuairand-slice", "causal", f"{NO_TIME} {SLICE}"),
            ("kuairand-slice", "causal", f"{NO_BIAS} {SLICE}"),
            ("synthetic", "", ""),
            ("synthetic", "causal", ""),
        ],
    ),
    "ml-100k": Table(
        RANKED,
        _models(
            "ml-100k",
            f"{MODELS_ML100K} popularity",
            own=NO_BIAS,
            alone="- bert4rec caser popularity",
        ),
        COMPARISON,
    ),
    "ml-100k-bias": Table(
        RANKED,
        _models("ml-100k", "causal hstu sasrec", compared="model.repeat_bias=True"),
        COMPARISON,
    ),
    "ml-100k-tuned": Table(RANKED, _tuned("ml-100k", TUNED), TUNED_ALIKE, masked=True),
    "kuairand-slice-tuned": Table(
        RANKED, _tuned("kuairand-slice", TUNED_KUAIRAND), TUNED_ALIKE, masked=True
    ),
    "ml-100k-pure": Table(
        MASKED, _pure("ml-100k", "hstu tisasrec lrurec sasrec esasrec", NO_BIAS), PURE
    ),
    "beauty-pure": Table(MASKED, _pure("beauty", "sasrec hstu tisasrec", NO_BIAS), PURE),
    "kuairand-slice-pure": Table(
        MASKED,
        _pure("kuairand-slice", "hstu sasrec tisasrec", f"model.date_bias_knots=0 {NO_BIAS}"),
        PURE,
    ),
    "ml-100k-bands": Table(
        RANKED,
        [("ml-100k", "causal", ""), ("ml-100k", "causal", "model.band_events=5")],
        BOTH,
        seed="2020",
        masked=True,
    ),
    "ml-100k-ties": Table(
        RANKED,
        [
            ("ml-100k", "causal", ""),
            ("ml-100k", "causal", TIES),
            ("ml-100k", "sasrec", f"{COMPARED['ml-100k']} model.repeat_bias=True"),
            ("ml-100k", "sasrec", f"{COMPARED['ml-100k']} model.repeat_bias=True {TIES}"),
        ],
        ("data", "config", "seeds", "Hit@10", "NDCG@10", "best"),
    ),
    "neighbours": Table(
        RANKED,
        [
            ("beauty", "causal", ""),
            ("beauty", "causal", NEAR),
            ("beauty", "causal", AFTER),
            ("kuairand-slice", "causal", ""),
            ("kuairand-slice", "causal", NEAR),
            ("kuairand-slice", "causal", AGAIN),
            ("kuairand-slice", "mamba4rec", COMPARED["kuairand-slice"]),
            ("kuairand-slice", "mamba4rec", f"{COMPARED['kuairand-slice']} {NEAR}"),
            ("kuairand-slice", "mamba4rec", f"{COMPARED['kuairand-slice']} {AGAIN}"),
        ],
        ("data", "config", "seeds", "Hit@10", "NDCG@10", "best"),
    ),
    "neighbours-masked": Table(
        MASKED,
        [
            ("beauty", "causal", NEAR),
            ("beauty", "causal", AFTER),
            ("kuairand-slice", "causal", ""),
            ("kuairand-slice", "causal", NEAR),
            ("kuairand-slice", "causal", AGAIN),
            ("kuairand-slice", "mamba4rec", f"{COMPARED['kuairand-slice']} {NEAR}"),
            ("kuairand-slice", "mamba4rec", f"{COMPARED['kuairand-slice']} {AGAIN}"),
        ],
        ("data", "config", "seeds", "Hit@10", "NDCG@10", "best"),
    ),
    "ml-1m": Table(RANKED, [("ml-1m", "causal", ""), ("ml-1m", "causal", WIDE)], seed="2020"),
    "ml-1m-exact": Table(RANKED | {"order": "exact"}, [("ml-1m", "causal", "")]),
    "beauty": Table(
        RANKED, _models("beauty", "lrurec sasrec causal hstu"), COMPARISON, seed="2020"
    ),
    "beauty-after": Table(
        RANKED, _models("beauty", "causal lrurec sasrec", AFTER, AFTER), COMPARISON, seed="2020"
    ),
    "beauty-mixed": Table(
        RANKED, _models("beauty-mixed", "causal mamba4rec ssd4rec sasrec"), COMPARISON
    ),
    "kuairand-slice": Table(
        RANKED, _models("kuairand-slice", "mamba4rec sasrec causal ssd4rec"), COMPARISON
    ),
    "next-time-unknown": Table(
        RANKED,
        [
            ("ml-100k", "causal", ""),
            ("ml-100k", "hstu", f"{COMPARED['ml-100k']} model.repeat_bias=True"),
            ("kuairand-slice", "causal", ""),
            ("kuairand-slice", "causal", NEAR),
        ],
    ),
    "next-time-known": Table(
        RANKED | {"knows_next_time": "yes"},
        [
            ("ml-100k", "causal", "model.knows_next_time=True"),
            (
                "ml-100k",
                "hstu",
                f"{COMPARED['ml-100k']} model.repeat_bias=True model.knows_next_time=True",
            ),
            ("kuairand-slice", "causal", "model.knows_next_time=True"),
            ("kuairand-slice", "causal", f"model.knows_next_time=True {NEAR}"),
        ],
    ),
    "both": Table(
        RANKED,
        [
            ("ml-100k", "causal", ""),
            ("ml-100k", "sasrec", f"{COMPARED['ml-100k']} model.repeat_bias=True"),
            ("ml-100k", "causal", NO_BIAS),
            ("ml-100k", "sasrec", COMPARED["ml-100k"]),
            ("ml-100k", "popularity", ""),
            ("beauty", "popularity", ""),
            ("kuairand-slice", "causal", ""),
            ("kuairand-slice", "popularity", ""),
        ],
        BOTH,
        seed="2020",
        masked=True,
    ),
    "history": Table(
        RANKED | {"part": "valid"},
        [
            ("ml-1m", "causal", NO_BIAS),
            ("beauty-mixed", "causal", f"{NO_BIAS} {MIXED}"),
            ("ml-100k", "causal", NO_BIAS),
            ("ml-100k", "causal", ""),
            ("ml-100k", "hstu", COMPARED["ml-100k"]),
            ("ml-100k", "lrurec", COMPARED["ml-100k"]),
        ],
        ("data", "config", "seeds", "NDCG@10", "masked NDCG@10"),
        seed="2020",
        masked=True,
    ),
    "global-time": Table(
        RANKED | {"split": "global_time"},
        [
            ("kuairand-slice", "causal", f"data.split=global_time {SLICE}"),
            ("kuairand-slice", "causal", "data.split=global_time model.output_std=0.02"),
        ],
    ),
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
