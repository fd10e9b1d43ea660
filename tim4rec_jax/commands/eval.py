"""Evaluates a trained run by full ranking: `python eval.py --workdir runs/quickstart`."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from tim4rec_jax.errors import ArgumentParser
from tim4rec_jax.files import named_file

# What `tim4rec_jax.evaluation.beyond_accuracy` measures, for `--help`.
BEYOND_ACCURACY = {
    "coverage": "share of the catalogue that is in the list of somebody",
    "gini": "inequality of how often the items of the catalogue are listed; 0: all as often, near "
    "1: few items have all places",
    "popularity": "mean number of training events of a listed item",
    "novelty": "mean self-information of a listed item: -log2 of the share of users who have it in "
    "training",
    "diversity": "mean of 1 - cosine over the pairs of a list, where two items are alike if the "
    "same users have them in training",
    "serendipity": "mean over a list of max(P_user - P_all, 0) for the target, and 0 for other "
    "items; P = (items + 1 - place) / items, for the place in the list and in the order of "
    "popularity",
}


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name the directory of a run")
    return Path(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _flags(words: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog="Beyond accuracy, for lists of the k best items:\n"
        + "\n".join(
            textwrap.fill(f"{name}: {text}", 80, initial_indent="  ", subsequent_indent="    ")
            for name, text in BEYOND_ACCURACY.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", type=_folder, required=True, help="directory of a run, as train.py wrote it")
    add("--split", choices=("valid", "test"), default="test", help="default: test")
    add(
        "--exclude-seen",
        action="store_true",
        help="items the user has had do not compete with the target",
    )
    add(
        "--ks",
        type=_counts,
        metavar="K,...",
        help="cut-offs of all figures (default: eval.ks of the run, 10,20,50 unless it is set)",
    )
    add(
        "--ties",
        choices=("optimistic", "expected"),
        help="the place of a target among items with its very score: the best one, or the mean "
        "over all orders (default: eval.ties of the run, optimistic unless it is set)",
    )
    add(
        "--accuracy-only",
        action="store_true",
        help="leave out coverage, novelty and so on, which need the best items of every user",
    )
    add(
        "--by",
        type=lambda text: text.split(","),
        default=[],
        metavar="SLICE,...",
        help="metrics by groups of users: history length, last gap, popularity of the target, "
        "whether it has training events (length,gap,popularity,known)",
    )
    add("--json", type=named_file, metavar="FILE", help="default: WORKDIR/eval_SPLIT.json")
    add("--csv", type=named_file, metavar="FILE", help="the figures as a table too, one per line")
    add(
        "--ranks",
        type=named_file,
        metavar="FILE",
        help="the rank of every user's target to a Parquet file, for paired tests: user, rank (1 + "
        "the items with a greater score), ties (the other items with the same score)",
    )
    add(
        "--predictions",
        type=named_file,
        metavar="FILE",
        help="the best items of every user to a file: user, rank, item, score",
    )
    add("--top-k", type=_count, default=10, metavar="K", help="how many of them (default: 10)")
    add("--dataset", type=Path, help="the prepared dataset, if it has moved since the training")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None, prog: str = "python eval.py") -> None:
    """Runs the command line, or the given words."""
    flags = _flags(words, prog)
    # Imports JAX, which `--help` and a mistyped flag need not wait for.
    from tim4rec_jax.evaluation.evaluate_run import evaluate_run

    evaluate_run(**vars(flags))
