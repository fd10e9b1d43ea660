"""The command `tim4rec` of an installed package; `python -m tim4rec_jax` is the same.

In a clone of the repository, `train.py`, `eval.py`, `python -m data_prep` and so on do the same
under their own names.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tim4rec_jax
from tim4rec_jax.errors import UsageError, UserError, run_main

_EXAMPLES = """\
examples:
  tim4rec prepare table events.csv --user uid --item sku --time at --out data/shop
  tim4rec train --config causal --config.dataset=data/shop --workdir runs/shop
  tim4rec recommend --workdir runs/shop --event A17 1700000000 --event B02 1700003600"""
# What the messages of the parts say, and what they are called here.
_NAMES = {
    "python -m tim4rec_jax.serving": "tim4rec",
    "python -m benchmarks.compare": "tim4rec compare",
    "python -m data_prep": "tim4rec prepare",
    "python -m tim4rec_jax.plan": "tim4rec plan",
    "python train.py": "tim4rec train",
    "python eval.py": "tim4rec eval",
    "train.py": "tim4rec train",
    "eval.py": "tim4rec eval",
}


class Command(NamedTuple):
    """A command.

    Attributes:
      help: what it does.
      run: does it, given the words after its name.
    """

    help: str
    run: Callable[[list[str]], int | None]


# Each command imports what only it needs.


def _prepare(words: list[str]) -> None:
    from tim4rec_jax.data_prep.__main__ import main

    main(words, prog="tim4rec prepare")


def _train(words: list[str]) -> None:
    from tim4rec_jax.commands.train import main

    main(words)


def _eval(words: list[str]) -> None:
    from tim4rec_jax.commands.eval import main

    main(words, prog="tim4rec eval")


def _compare(words: list[str]) -> None:
    from tim4rec_jax.commands.compare import main

    main(words, prog="tim4rec compare")


def _tune(words: list[str]) -> None:
    from tim4rec_jax.commands.tune import main

    main(words)


def _verify(words: list[str]) -> int:
    from tim4rec_jax.commands.verify import main

    return main(words)


def _add_items(words: list[str]) -> None:
    from tim4rec_jax.commands.add_items import main

    main(words)


def _plan(words: list[str]) -> None:
    from tim4rec_jax.plan.__main__ import main

    main(words, prog="tim4rec plan")


def _serving(command: str) -> Callable[[list[str]], int | None]:
    def run(words: list[str]) -> int | None:
        from tim4rec_jax.serving.__main__ import main

        return main([command, *words], prog="tim4rec")

    return run


COMMANDS = {
    "prepare": Command("turn an event log into a dataset", _prepare),
    "train": Command("train a model", _train),
    "eval": Command("evaluate a trained model", _eval),
    "recommend": Command("recommend to one history", _serving("recommend")),
    "batch": Command("recommend to all users of a log", _serving("batch")),
    "serve": Command("recommend over HTTP", _serving("serve")),
    "export": Command("write a model that needs only jax", _serving("export")),
    "explain": Command("draw what a recommendation rests on", _serving("explain")),
    "compare": Command("train several models and compare them", _compare),
    "add-items": Command("have a run know new items by their features", _add_items),
    "plan": Command("say what a training takes before it starts", _plan),
    "tune": Command("search settings by validation", _tune),
    "verify": Command("check that a run is whole", _verify),
}


def main(words: Sequence[str] | None = None) -> int | None:
    """Runs the command line, or the given words."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help", "help"):
        lines = [f"  {name:<10}{command.help}" for name, command in COMMANDS.items()]
        print(
            "usage: tim4rec COMMAND ...\n\ncommands (`tim4rec COMMAND --help` tells their flags):"
        )
        print("\n".join(lines), _EXAMPLES, sep="\n\n")
        return None
    name, *rest = words
    if name == "--version":
        print(f"tim4rec-jax {tim4rec_jax.__version__}")
        return None
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UsageError(f"{name!r} is no command of tim4rec; {hint}")
    helps = {"-h", "--help"} & set(rest)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed) if helps else contextlib.nullcontext():
            return COMMANDS[name].run(rest)
    except UserError as error:
        raise type(error)(_named(str(error))) from error
    finally:
        if helps:
            print(_named(printed.getvalue()), end="")


def _named(text: str) -> str:
    """The text with the commands as they are called here."""
    for old, new in _NAMES.items():  # not within the name of a file
        text = re.sub(rf"(?<![\w./-]){re.escape(old)}(?!\w)", new, text)
    return text


def script() -> int:
    """What `tim4rec` starts."""
    return run_main(main)


if __name__ == "__main__":
    sys.exit(script())
