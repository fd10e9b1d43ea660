"""Searches settings by validation: `tim4rec tune --config ml100k:causal --trials 30`.

Each trial is a training with other settings, stopped early if it falls behind. The test split
decides nothing. The same command again goes on with a search that was stopped, and more --trials
extend one that is finished. The best settings are written to OUT/best.py, which --config of
`train.py` takes.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tim4rec_jax.errors import ArgumentParser, UserError
from tim4rec_jax.files import named_folder, positive_count

_EXAMPLES = """\
ranges: LOW:HIGH, log:LOW:HIGH (small values as often as large ones), or A,B,C

examples:
  tim4rec tune --config causal --config.dataset=data/shop --trials 30
  tim4rec tune --config ml100k:causal --trials 10 --config.train.epochs=10 \\
      --set train.learning_rate=log:1e-4:1e-2 model.dropout_prob=0.1:0.5 model.hidden_size=32,64"""


def _range(text: str) -> tuple[str, str]:
    name, equals, words = text.partition("=")
    if not (name and equals and words):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form SETTING=RANGE")
    return name.removeprefix("config."), words


def _flags(words: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="tim4rec tune",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--config", required=True, metavar="FILE[:VARIANT]", help="as for train.py, by name or path"
    )
    add(
        "--trials",
        type=positive_count,
        required=True,
        metavar="N",
        help="trainings, all starts together",
    )
    add("--out", type=named_folder, metavar="DIR", help="default: runs/tune-FILE[-VARIANT]")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--set",
        type=_range,
        nargs="+",
        default=[],
        metavar="SETTING=RANGE",
        help="what to search, for example train.learning_rate=log:1e-4:1e-2; default: learning "
        "rate, weight decay, dropout, width and layers",
    )
    what.add_argument("--search", type=Path, metavar="FILE.yaml", help="the same as a file")
    words = sys.argv[1:] if words is None else words
    fixed = [word for word in words if word.startswith("--config.")]
    flags = parser.parse_args([word for word in words if word not in fixed])
    flags.fixed = fixed
    for word in fixed:
        if not re.match(r"--config\.[\w.]+=", word):
            parser.error(f"{word!r} has no value; a setting is given as --config.NAME=VALUE")
        if word.startswith("--config.model.name="):
            parser.error("name the model as the variant: --config FILE:MODEL")
    searched = [name for name, _ in flags.set]
    for name in searched:
        if searched.count(name) > 1:
            parser.error(f"{name} is given twice after --set")
    return flags


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command line, or the given words."""
    flags = _flags(words)
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("tune needs Optuna: pip install 'tim4rec-jax[tune]'") from error
    # They import JAX, which `--help` and a mistyped flag need not wait for.
    from rich.console import Console

    from tim4rec_jax.commands import search, search_report, search_space, trainings

    path, _, variant = flags.config.partition(":")
    name = Path(path).stem + (f"-{variant}" if variant else "")
    shared = [f"--config={flags.config}", *flags.fixed]
    ranges = search_space.read_space(flags.search) if flags.search else dict(flags.set)
    ranges = ranges or search_space.default_space(trainings.settings(shared), shared)
    if not ranges:
        raise UserError(f"{flags.config} learns nothing, so that there is nothing to search")
    plan = search.Plan(shared, ranges, flags.trials, flags.out or Path(f"runs/tune-{name}"))
    console = Console(highlight=False)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        study = search.search(plan, console)
    except KeyboardInterrupt:
        print("\nstopped; the study is kept: run the same command to go on", flush=True)
        raise
    search_report.print_result(console, study, plan.out)
