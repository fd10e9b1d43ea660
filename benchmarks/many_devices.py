"""What a training step costs on several devices, and with a large catalogue.

    python -m benchmarks.many_devices devices [--items 65000]        total processor time, 1 and 8
    python -m benchmarks.many_devices catalogue [--items 10000 ...]  a step against the catalogue
    python -m benchmarks.many_devices tpu [--topology v5e:4x4]       compiled for chips, memory

`devices` runs the exact cross-entropy on 1 device and on 8 simulated ones (8 x 1, 2 x 4, 1 x 8 of
`mesh.data` x `mesh.catalogue`). A processor has no more cores for eight simulated devices, so what
counts is the processor time of all together: a perfect split costs as much as one device.

`catalogue` runs a sampled loss at a fixed batch, with each optimizer of the item table, every size
in a process of its own, and reports seconds a step and the largest memory of the process.

`tpu` compiles the step ahead of time with the compiler of libtpu (see `benchmarks.tpu_compile`),
without a TPU: bytes on each chip, and the largest message between chips.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROWS, LENGTH, NEGATIVES, WIDTH = 256, 50, 512, 64
MANY_ROWS = 2048  # of `devices`: the batch of the paper


def settings_for(items: int, loss: str, item_optimizer: str, rows: int, length: int):
    """A causal TiM4Rec of width 64, its settings and the structure of the model."""
    from flax import nnx

    from tim4rec_jax import config as config_lib
    from tim4rec_jax.models import build

    config = config_lib.default()
    config.model.update(time_encoding="causal", repeat_bias=loss != "cross_entropy")
    config.data.max_length = length
    config.train.update(
        loss=loss, item_optimizer=item_optimizer, negatives=NEGATIVES, batch_size=rows
    )
    config = config_lib.resolve(config)
    make = partial(build, config.model, n_items=items, max_length=length)
    return config, make, nnx.eval_shape(make)


def prepared_step(config, structure, placement, items: int):
    """Settings of a step, as `make_steps` makes them, and the frequencies of the items."""
    import numpy as np
    from flax import nnx

    from tim4rec_jax import item_rows
    from tim4rec_jax.training.losses import Loss
    from tim4rec_jax.training.negatives import item_frequencies
    from tim4rec_jax.training.row_optimizers import ByRow
    from tim4rec_jax.training.state import make_optimizer
    from tim4rec_jax.training.step import StepSettings

    train, by_row = config.train, None
    if placement.by_item is not None:
        optimizer = None if train.item_optimizer == "adam" else train.item_optimizer
        by_row = ByRow(placement.mesh, structure.item_rows, optimizer, train.learning_rate)
    settings = StepSettings(
        nnx.graphdef(structure),
        make_optimizer(train.learning_rate, 0.0),
        loss=Loss(train.loss, train.negatives),
        devices=placement.devices,
        by_row=by_row,
    )
    frequencies = None
    if train.loss == "sampled_softmax":
        counts = 1_000_000 // np.arange(1, items + 1)
        frequencies = item_rows.spread(item_frequencies(counts), ("within",), placement)
    return settings, frequencies


def measure(
    items: int,
    loss: str,
    item_optimizer: str,
    mesh: tuple[int, int] | None,
    steps: int,
    rows: int = ROWS,
):
    """Seconds and processor seconds of a step, and the largest memory of the process."""
    import jax
    import numpy as np
    from flax import nnx

    from tim4rec_jax import item_rows
    from tim4rec_jax.runtime import data_sharding, item_sharding
    from tim4rec_jax.training.state import init_state
    from tim4rec_jax.training.step import train_step

    config, make, structure = settings_for(items, loss, item_optimizer, rows, LENGTH)
    spread = mesh is not None or item_optimizer != "adam"
    placement = item_sharding(rows, *(mesh or (1, 1))) if spread else data_sharding(rows)
    settings, frequencies = prepared_step(config, structure, placement, items)
    names = structure.item_rows if spread else ()
    make_state = partial(init_state, tx=settings.tx, seed=0, by_row=settings.by_row)

    def draw():  # as `train` does
        return make_state(item_rows.completed(nnx.state(make()), names, placement.mesh.size))

    whole = jax.eval_shape(lambda: make_state(nnx.state(make())))
    shapes = item_rows.shapes(whole, names, placement)
    state = jax.jit(draw, out_shardings=jax.tree.map(lambda shape: shape.sharding, shapes))()
    rng = np.random.default_rng(0)

    def batch():
        x = {
            "items": rng.integers(1, items + 1, (rows, LENGTH)).astype(np.int32),
            "lengths": np.full(rows, LENGTH, np.int32),
            "gaps": rng.exponential(1e5, (rows, LENGTH)).astype(np.float32),
            "targets": rng.integers(1, items + 1, rows).astype(np.int32),
            "weights": np.ones(rows, np.float32),
        }
        return jax.device_put(x, placement.by_row)

    losses = []
    for _ in range(2):  # the first compiles, and both touch all memory
        state, metrics = train_step(state, batch(), settings, frequencies)
        losses.append(float(metrics["loss"]))
    begun, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        state, metrics = train_step(state, batch(), settings, frequencies)
        losses.append(float(metrics["loss"]))
    return {
        "seconds": (time.perf_counter() - begun) / steps,
        "processor": (time.process_time() - processor) / steps,
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "loss": losses[-1],
    }


def in_a_process(devices: int, *arguments) -> dict:
    """Runs `measure` in a process of its own, with simulated devices."""
    code = (
        f"from benchmarks.many_devices import measure; import json; "
        f"print(json.dumps(measure(*{arguments!r})))"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr else "killed"}
    return json.loads(done.stdout.splitlines()[-1])


def devices(flags) -> None:
    """Prints the table of `devices`."""
    print(
        f"{flags.items[0]:,} items, cross_entropy over all, {MANY_ROWS:,} rows of {LENGTH} events"
    )
    print("| devices | s a step | processor s a step | of one device | loss |")
    print("|---|---|---|---|---|", flush=True)
    one = None
    for mesh in (None, (8, 1), (2, 4), (1, 8)):
        found = in_a_process(
            8 if mesh else 1, flags.items[0], "cross_entropy", "adam", mesh, flags.steps, MANY_ROWS
        )
        name = "1" if mesh is None else f"{mesh[0]} x {mesh[1]}"
        if "error" in found:
            print(f"| {name} | {found['error']} | | | |", flush=True)
            continue
        one = one or found["processor"]
        print(
            f"| {name} | {found['seconds']:.2f} | {found['processor']:.2f} | "
            f"{found['processor'] / one:.2f} | {found['loss']:.5f} |",
            flush=True,
        )


def catalogue(flags) -> None:
    """Prints the table of `catalogue`."""
    print(f"sampled_softmax over {NEGATIVES} items, {ROWS} rows of {LENGTH} events")
    print("| items | optimizer | s a step | processor s a step | memory GB |")
    print("|---|---|---|---|---|", flush=True)
    for items in flags.items:
        for optimizer in flags.optimizers:
            found = in_a_process(1, items, "sampled_softmax", optimizer, None, flags.steps)
            figures = found.get("error") or (
                f"{found['seconds']:.3f} | {found['processor']:.3f} | {found['memory_gb']:.2f}"
            )
            print(f"| {items:,} | {optimizer} | {figures} |", flush=True)


def tpu(flags) -> None:
    """Prints what the compiler says of the step on all chips of a topology."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    sys.path.append(str(Path(__file__).parents[1] / ".venv" / "tpu"))
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from tim4rec_jax import item_rows
    from tim4rec_jax.runtime import AXES, Placement, make_mesh
    from tim4rec_jax.ssd import compile_for
    from tim4rec_jax.training.negatives import ItemFrequencies
    from tim4rec_jax.training.state import init_state
    from tim4rec_jax.training.step import train_step

    chips = topologies.get_topology_desc(flags.topology, "tpu").devices
    items, rows = flags.items[0], flags.rows * len(chips)
    mesh = make_mesh(len(chips), 1, chips)
    place = partial(NamedSharding, mesh)
    placement = Placement(
        len(chips), place(PartitionSpec("data")), place(PartitionSpec()), place(PartitionSpec(AXES))
    )
    for optimizer in flags.optimizers:
        loss = "sampled_softmax"
        config, _, structure = settings_for(items, loss, optimizer, rows, LENGTH)
        config.train.loss = "bpr"  # `prepared_step` would count events of all items
        settings, _ = prepared_step(config, structure, placement, items)
        settings = _with_loss(settings, loss)
        names = structure.item_rows

        def state_of(params, settings=settings):
            return init_state(params, settings.tx, 0, settings.by_row)

        from flax import nnx

        whole = jax.eval_shape(state_of, nnx.state(structure))
        state = item_rows.shapes(whole, names, placement)

        def array(shape, dtype, sharding):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        by_row, blocks = placement.by_row, -(-(items + 1) // 64)
        batch = {
            "items": array((rows, LENGTH), jnp.int32, by_row),
            "lengths": array((rows,), jnp.int32, by_row),
            "gaps": array((rows, LENGTH), jnp.float32, by_row),
            "targets": array((rows,), jnp.int32, by_row),
            "weights": array((rows,), jnp.float32, by_row),
        }
        frequencies = ItemFrequencies(
            array((blocks, 2), jnp.uint32, placement.replicated),
            array((item_rows.padded(64 * blocks, mesh.size), 2), jnp.uint32, placement.by_item),
        )
        begun = time.perf_counter()
        with compile_for("tpu"):
            lowered = train_step.lower(state, batch, settings, frequencies)
        program = lowered.compile()
        memory, text = program.memory_analysis(), program.as_text()
        held = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )
        print(
            f"{items:,} x {WIDTH} items, {optimizer}, {len(chips)} chips of {flags.topology}, "
            f"{flags.rows:,} rows of {LENGTH} a chip: held {held / 1e9:.2f} GB, temporary "
            f"{memory.temp_size_in_bytes / 1e9:.2f} GB, together "
            f"{(held + memory.temp_size_in_bytes) / 1e9:.2f} GB a chip; compiled in "
            f"{time.perf_counter() - begun:.0f} s"
        )
        batch_rows = (rows * (LENGTH + 1) + len(chips) * (NEGATIVES + 1)) * WIDTH * 4
        messages = largest_messages(text)
        for kind, size in messages.items():
            print(f"  {kind}: {size / 1e6:.1f} MB at most")
        largest = max(messages.values())
        assert largest <= batch_rows, (largest, batch_rows)
        print(f"  no message is larger than the rows of the batch, {batch_rows / 1e6:.1f} MB")


def _with_loss(settings, name: str):
    import dataclasses

    return dataclasses.replace(settings, loss=dataclasses.replace(settings.loss, name=name))


SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


def largest_messages(text: str) -> dict[str, int]:
    """Bytes of the largest array that each kind of message between chips takes or gives."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.search(rf" ({KINDS})(-start)?\(", line):
            for kind, shape in re.findall(r"\b(\w+)\[([\d,]*)\]", line.split(", metadata=")[0]):
                if kind in SIZES:
                    size = SIZES[kind]
                    for number in filter(None, shape.split(",")):
                        size *= int(number)
                    found[match[1]] = max(found.get(match[1], 0), size)
    return found


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_devices", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=["devices", "catalogue", "tpu"])
    parser.add_argument("--items", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--optimizers", nargs="+", default=["adam", "lazy_adam", "adagrad"])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--rows", type=int, default=2048, help="of a batch on each chip, for tpu")
    flags = parser.parse_args()
    defaults = {
        "devices": [65_000],
        "catalogue": [10_000, 100_000, 1_000_000, 10_000_000],
        "tpu": [100_000_000],
    }
    flags.items = flags.items or defaults[flags.what]
    {"devices": devices, "catalogue": catalogue, "tpu": tpu}[flags.what](flags)


if __name__ == "__main__":
    main()
