"""Says what a training takes, before it is started: memory, network, time, disk.

The settings are those of `train.py`; no dataset is needed. Nothing of the size of the model is
allocated. docs/plan.md explains the formulas.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tim4rec_jax.errors import ArgumentParser, UserError, run_main

_EXAMPLES = """\
examples:
  %(prog)s --items 1e6 --users 1e6 --events 1e8 --devices h100
  %(prog)s --items 100e6 --users 100e6 --events 1e9 --devices 16xv5e --config.mesh.data=16 \\
      --config.train.loss=sampled_softmax --config.train.batch_size=4096
  %(prog)s --config beauty:causal --config.model.hidden_size=128 --items 12101 --users 22363 \\
      --events 198502 --devices cpu"""
_LARGEST = 10**13


def main(words: Sequence[str] | None = None, prog: str = "python -m tim4rec_jax.plan") -> None:
    """Runs the command line, or the given words, and prints tables.

    Raises:
      UserError: a setting is wrong, or the devices are not known.
    """
    words = sys.argv[1:] if words is None else words
    settings = [word for word in words if word.startswith("--config.")]
    flags = _parser(prog).parse_args([word for word in words if word not in settings])
    from tim4rec_jax.cli import parse
    from tim4rec_jax.plan import devices, formulas

    config, _ = parse([prog, f"--config={flags.config}", *settings], "")
    count, kind = devices.parse(flags.devices)
    data, catalogue = config.mesh.data, config.mesh.catalogue
    if data is not None and data * catalogue != count:
        raise UserError(
            f"config.mesh.data={data} and config.mesh.catalogue={catalogue} are "
            f"{data * catalogue} devices, and --devices names {count}; make them equal"
        )
    sizes = formulas.Sizes(flags.items, flags.users, flags.events)
    spread = data is not None and count > 1
    layout = formulas.Layout(
        kind, data or count, catalogue if spread else 1, spread, config.train.item_optimizer
    )
    if flags.events < 3 * flags.users:
        raise UserError(
            f"--events {flags.events:,} is less than 3 for each of {flags.users:,} users, which "
            "leave one out takes for validation and test; give more events or fewer users"
        )
    _print(config, sizes, layout, formulas.plan(config, sizes, layout), Console(highlight=False))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name in ("items", "users", "events"):
        parser.add_argument(
            f"--{name}", type=_count, required=True, metavar="N", help="such as 100e6"
        )
    add = parser.add_argument
    add("--devices", default="cpu", help="such as 16xv5e, 8xh100, h200, a100, v5p, v6e, cpu")
    add("--config", default="causal", metavar="FILE[:VARIANT]", help="as for train.py")
    return parser


def _count(text: str) -> int:
    """Reads `100e6`, `1_000` or `12101` as a whole number."""
    if not re.fullmatch(r"[0-9][0-9_]{0,20}([.][0-9]{1,12})?(e[0-9]{1,2})?", text.lower()):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number such as 12101 or 100e6")
    number = float(text.replace("_", ""))
    if not 1 <= number <= _LARGEST or number != int(number):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from 1 to 1e13")
    return int(number)


def _print(config, sizes, layout, plan, console: Console) -> None:
    device, memory = layout.device, sum(plan.memory.values())
    console.out(
        f"{sizes.items:,} items, {sizes.users:,} users, {sizes.events:,} events; "
        f"{layout.number} x {layout.kind}; {config.model.name}, {config.train.objective}, "
        f"{config.train.loss}, {config.train.batch_size:,} rows of {config.data.max_length}"
    )
    table = Table("on each device", "", "", title="memory")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, count in plan.memory.items():
        part = f" ({plan.rows:,} rows at a time)" if name in ("activations", "loss") else ""
        table.add_row(name + part, size(count), f"{count / device.memory:.1%}")
    table.add_section()
    table.add_row("all", size(memory), f"{memory / device.memory:.1%} of {size(device.memory)}")
    console.print(table)
    if plan.network:
        table = Table("sent by each device in a step", "", title="network")
        table.columns[1].justify = "right"
        for name, count in plan.network.items():
            table.add_row(name, size(count))
        console.print(table)
    table = Table("a step takes at least", "", title="time")
    table.columns[1].justify = "right"
    for name, seconds in plan.seconds.items():
        table.add_row(name, duration(seconds) if seconds else "none")
    step = max(plan.seconds.values())
    table.add_section()
    table.add_row(f"an epoch of {plan.steps:,} steps", duration(step * plan.steps))
    console.print(table)
    table = Table("disk and host", "")
    table.columns[1].justify = "right"
    table.add_row("a checkpoint (parameters and optimizer)", size(plan.checkpoint))
    table.add_row("the prepared dataset", size(plan.dataset))
    table.add_row("temporary files of the preparation", size(plan.prepare_disk))
    table.add_row("the preparation, processor time", duration(3600 * plan.prepare_hours))
    table.add_row("index of users, memory of each process", size(plan.host))
    console.print(table)
    for sentence in advice(config, layout, plan):
        console.out(sentence)
    console.out(f"figures of the device: {device.source}")


def advice(config, layout, plan) -> list[str]:
    """Which limit binds, and what to change; each a sentence."""
    said, available, needed = [], layout.device.memory, sum(plan.memory.values())
    remedies = {
        "item table": "spread the item table (--config.mesh.data=N), or take more devices",
        "optimizer": "spread the item table (--config.mesh.data=N), or keep one number for each "
        "row (--config.train.item_optimizer=adagrad)",
        "gradients": "take a sampled loss (--config.train.loss=sampled_softmax) with "
        "--config.train.item_optimizer=lazy_adam or adagrad",
        "activations": "lower config.train.batch_size, or take --config.model.dtype=bfloat16",
        "loss": "take a sampled loss (--config.train.loss=sampled_softmax), or more devices",
        "batches": "lower config.train.batch_size",
        "other parameters": "lower config.model.hidden_size or config.model.num_layers",
        "all events": "take --config.data.placement=host",
    }
    if layout.spread:
        remedies["item table"] = remedies["optimizer"] = "take more devices"
        if layout.optimizer != "adagrad":
            remedies["optimizer"] += ", or --config.train.item_optimizer=adagrad"
    largest = max(plan.memory, key=lambda name: plan.memory[name])
    if needed > available:
        said.append(
            f"It does not fit: {size(needed)} are needed on a device that has {size(available)}. "
            f"The largest part is: {largest}; {remedies[largest]}."
        )
    else:
        said.append(f"It fits: {needed / available:.0%} of the memory of a device is taken.")
    limit = max(plan.seconds, key=lambda name: plan.seconds[name])
    changes = {
        "computing": "a sampled loss, a smaller model, bfloat16, or more devices make it faster",
        "memory": "an optimizer of the rows of the batch (config.train.item_optimizer) and a "
        "sampled loss touch less memory; a larger batch spreads the update over more events"
        if layout.optimizer == "adam"
        else "bfloat16 or more devices make it faster",
        "network": "a larger batch, fewer devices, or faster links make it faster",
    }
    said.append(f"The step is bound by {limit}: {changes[limit]}.")
    return said


def size(count: int | float) -> str:
    """A number of bytes in words, in powers of 1,000."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    power = min(int(math.log(max(count, 1), 1000)), len(units) - 1)
    return f"{count / 1000**power:.3g} {units[power]}" if count < 1e18 else f"{count:.3g} B"


def duration(seconds: int | float) -> str:
    """A time in words."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= length * (1 if unit != "days" else 2):
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


if __name__ == "__main__":
    sys.exit(run_main(main))
