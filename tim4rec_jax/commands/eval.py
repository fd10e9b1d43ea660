"""Evaluates a trained run by full ranking: `python eval.py --workdir runs/quickstart`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tim4rec_jax.errors import UserError
from tim4rec_jax.files import named_file


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name the directory of a run")
    return Path(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _flags(words: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python eval.py", description=__doc__)
    add = parser.add_argument
    add("--workdir", type=_folder, required=True, help="directory of a run, as train.py wrote it")
    add("--split", choices=("valid", "test"), default="test", help="default: test")
    add(
        "--exclude-seen",
        action="store_true",
        help="items the user has had do not compete with the target",
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
        "--predictions",
        type=named_file,
        metavar="FILE",
        help="the best items of every user to a Parquet file: user, rank, item, score",
    )
    add("--top-k", type=_count, default=10, metavar="K", help="how many of them (default: 10)")
    add("--dataset", type=Path, help="the prepared dataset, if it has moved since the training")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command line, or the given words."""
    flags = _flags(words)
    # Imports JAX, which `--help` and a mistyped flag need not wait for.
    from tim4rec_jax.evaluation.evaluate import evaluate_run

    evaluate_run(**vars(flags))
