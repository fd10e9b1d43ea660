"""Checks that a run is whole: `tim4rec verify runs/shop`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tim4rec_jax.errors import ArgumentParser


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line, or the given words; gives the exit code, 1 if something is wrong."""
    parser = ArgumentParser(
        prog="tim4rec verify",
        description="Checks the settings, the checkpoints and the dataset of a run, part by part.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("workdir", nargs="?", type=Path, help="directory of a run")
    which.add_argument(
        "--workdir",
        dest="named",
        metavar="WORKDIR",
        type=Path,
        help="the same, as other commands say",
    )
    parser.add_argument("--dataset", type=Path, help="the prepared dataset, if it has moved")
    flags = parser.parse_args(words)
    from tim4rec_jax.verify import verify

    findings = verify(flags.workdir or flags.named, flags.dataset)
    for part, problem, note in findings:
        print(
            f"{'wrong' if problem else 'whole'}  {problem or ' '.join([str(part), note]).strip()}"
        )
    return int(any(finding.problem for finding in findings))
