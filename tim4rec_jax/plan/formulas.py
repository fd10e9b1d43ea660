"""What a training takes: memory, network, time, disk. docs/plan.md explains each formula.

The letters are those of the code: B rows of a batch, L positions of a row, D width of the item
vectors, V rows of the item table. P is the number of all other parameters. A batch is split over
`data` devices; the item table is spread over all devices, or over none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tim4rec_jax.config import Config
from tim4rec_jax.data.pipeline import PREFETCH
from tim4rec_jax.models import build
from tim4rec_jax.plan.devices import DEVICES, Device
from tim4rec_jax.plan.program import Cost, cost
from tim4rec_jax.runtime import compile_for
from tim4rec_jax.scoring import HistoryItems
from tim4rec_jax.training.losses import Loss, block_rows
from tim4rec_jax.training.negatives import Drawn
from tim4rec_jax.training.objectives import OBJECTIVES
from tim4rec_jax.training.step import num_microbatches

BYTES = 4  # of a float32 or an int32
# Arrays of floats that an optimizer keeps for each parameter.
OPTIMIZERS = {"adam": 2, "lazy_adam": 2, "adagrad": 0}
# Processor seconds and bytes of temporary disk for each event: benchmarks/RESULTS.md.
PREPARE_SECONDS, PREPARE_DISK = 4.3e-6, 100
ID_BYTES = 12  # of a user's or an item's original id
EVENT_BYTES = 12  # of an event in sequences.arrow: the item as int32, the time as int64
ON_DEVICE = 16  # of an event in the log on a device
_SHARE = 0.25  # of a device's memory that the log of all events may take


class Sizes(NamedTuple):
    """How large the data is, after the filters of the preparation."""

    items: int
    users: int
    events: int


class Layout(NamedTuple):
    """The devices, and how the work is spread over them.

    Attributes:
      kind: a key of `DEVICES`.
      data: number of parts of the rows of a batch.
      items: devices that compute the scores of the same rows, each for its part of the items.
      spread: whether the item table is spread over all devices, or each has all of it.
      optimizer: of the item table: `adam` updates all rows in each step; `lazy_adam` and `adagrad`
        (row-wise, with one number for each row) only those of the step.
    """

    kind: str
    data: int = 1
    items: int = 1
    spread: bool = False
    optimizer: str = "adam"

    @property
    def device(self) -> Device:
        """The figures of one device."""
        return DEVICES[self.kind]

    @property
    def number(self) -> int:
        """Number of devices."""
        return self.data * self.items


class Structure(NamedTuple):
    """The shape of a model.

    Attributes:
      rows: of the item table.
      width: of the item vectors.
      others: number of all other parameters.
      model: the model, with shapes for arrays.
    """

    rows: int
    width: int
    others: int
    model: Any


class Plan(NamedTuple):
    """What a training takes.

    Attributes:
      memory: bytes on each device, by what they are for.
      network: bytes that each device sends in a step, by what they are for.
      seconds: what a step takes at least, by what limits it.
      rows: of a micro-batch on one device.
      steps: in an epoch.
      checkpoint: bytes of parameters and optimizer.
      host: bytes of memory that the index of users takes.
      prepare_hours: processor hours of the preparation.
      prepare_disk: bytes of temporary files of the preparation.
      dataset: bytes of the prepared dataset.
    """

    memory: dict[str, Any]
    network: dict[str, Any]
    seconds: dict[str, Any]
    rows: int
    steps: int
    checkpoint: int | float
    host: int | float
    prepare_hours: int | float
    prepare_disk: int | float
    dataset: int | float


def structure(config: Config, items: int, users: int = 0) -> Structure:
    """The shape of a run's model; nothing of its size is allocated."""
    length = config.data.max_length
    model: Any = nnx.eval_shape(
        lambda: build(config.model, n_items=items, n_users=users, max_length=length)
    )
    rows, width = model.item_embedding.embedding.shape
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return Structure(rows, width, count - rows * width, model)


def platform(kind: str) -> str:
    """What JAX calls the platform of a kind of device."""
    return "cpu" if kind == "cpu" else "tpu" if kind.startswith("v") else "gpu"


def local_model(config: Config, found: Structure, rows: int, layout: Layout) -> Any:
    """The model that a device computes with: where tables are spread, it has only few of the rows.

    Arguments are those of `step_memory`.
    """
    asked = _asked_rows(config, found, rows, layout._replace(data=1))
    if not layout.spread and layout.optimizer == "adam":
        return found.model
    return structure(config, max(1, min(asked, found.rows) - 1)).model


def encoder_cost(config: Config, model: Any, rows: int) -> Cost:
    """The cost of hidden states and of the gradient through the model, without the loss.

    Args:
      config: the settings, resolved.
      model: with shapes for arrays.
      rows: of a micro-batch.
    """
    graphdef, params = nnx.split(model)
    changed, fixed = nnx.split_state(params, nnx.Param, ...)

    def summed(hidden, table, targets, weights, **history):
        return jnp.sum(weights[:, None] * hidden)

    def value(params, batch, seeds):
        model = nnx.merge(graphdef, params, fixed)
        return OBJECTIVES[config.train.objective].loss(model, batch, seeds, summed)

    seeds = jax.ShapeDtypeStruct((rows,), jnp.uint32)
    return cost(jax.value_and_grad(value), changed, batch_shapes(config, model, rows), seeds)


def batch_shapes(config: Config, model: Any, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a micro-batch, as the objective takes them."""
    length, objective = config.data.max_length, config.train.objective
    by_row, by_event, targets = (rows,), (rows, length), (rows, 1)
    ints, floats = ["items"], ["gaps"]
    shapes = {}
    if objective == "every_position":
        ints += ["segment_ids"]
        targets = by_event
    elif objective == "cloze":
        targets = (rows, min(max(1, int(model.mask_ratio * length)), length))
        shapes["positions"] = jax.ShapeDtypeStruct(targets, jnp.int32)
    else:
        targets = by_row
    shapes |= {name: jax.ShapeDtypeStruct(by_event, jnp.int32) for name in ints}
    shapes |= {name: jax.ShapeDtypeStruct(by_event, jnp.float32) for name in floats}
    shapes["lengths"] = jax.ShapeDtypeStruct(by_row, jnp.int32)
    shapes["users"] = jax.ShapeDtypeStruct(by_row, jnp.int32)
    shapes["targets"] = jax.ShapeDtypeStruct(targets, jnp.int32)
    shapes["weights"] = jax.ShapeDtypeStruct(targets, jnp.float32)
    at = by_event if objective == "every_position" else by_row
    shapes["time_to_next"] = shapes["dates"] = jax.ShapeDtypeStruct(at, jnp.float32)
    return shapes


def loss_cost(config: Config, found: Structure, rows: int, items: int) -> Cost:
    """The cost of the loss of a micro-batch and of its gradient.

    Args:
      config: the settings, resolved.
      found: the shape of the model.
      rows: of a micro-batch.
      items: rows of the item table that the loss is given.
    """
    batch, drawn = batch_shapes(config, found.model, rows), None
    targets = math.prod(batch["targets"].shape)
    how = Loss(config.train.loss, config.train.negatives, config.train.calibration)
    shape: Any = jax.ShapeDtypeStruct
    if how.is_sampled:
        count = (how.negatives,)
        drawn = Drawn(shape(count, jnp.int32), shape(count, jnp.float32))

    def value(inputs, targets, weights, drawn, items, first):
        hidden, table, bias = inputs
        history: dict = {}
        if found.model.offset is not None:
            at: Any = (first, first) if config.train.objective == "every_position" else ()
            history["history"] = HistoryItems(items, bias, *at)
        return how.of(drawn, found.rows)(hidden, table, targets, weights, **history)

    shapes = (
        (
            shape((targets, found.width), found.model.dtype),
            shape((items, found.width), jnp.float32),
            shape((), jnp.float32),
        ),
        shape((targets,), jnp.int32),
        shape((targets,), jnp.float32),
        drawn,
        batch["items"],
        shape((targets,), jnp.int32),
    )
    return cost(jax.value_and_grad(value), *shapes, turns=_blocks(targets, items))


def _blocks(targets: int, items: int) -> int:
    """Number of blocks in which the full cross-entropy goes over its targets."""
    return -(-targets // block_rows(items))


def step_memory(
    config: Config, found: Structure, rows: int, microbatches: int, layout: Layout
) -> dict[str, Any]:
    """Bytes on each device while a step runs.

    Args:
      config: the settings, resolved.
      found: the shape of the model.
      rows: of a batch on one device.
      microbatches: number of its parts.
      layout: of the devices.
    """
    part = -(-rows // microbatches)
    held = table_rows(found, layout)
    table, others = held * found.width, found.others
    updated = _rows_of_gradient(config, found, rows, layout)
    kept = OPTIMIZERS[layout.optimizer]
    # Micro-batches add their gradients to a sum.
    gradients = (others + updated * found.width) * BYTES * (1 if microbatches == 1 else 2)
    with compile_for(platform(layout.kind)):
        loss = loss_cost(config, found, part, _scored_rows(config, found, rows, layout))
    if layout.spread and not _is_sampled(config):
        # The rows of all devices along `data`, and their gradient.
        gathered = _scored_rows(config, found, rows, layout) * found.width * BYTES
        loss = loss._replace(memory=loss.memory + 2 * gathered)
    batch = batch_shapes(config, found.model, rows)
    in_batch = sum(math.prod(leaf.shape) * BYTES for leaf in batch.values())
    return {
        "item table": table * BYTES,
        "other parameters": others * BYTES,
        "optimizer": (kept * table + 2 * others) * BYTES
        + (held * BYTES if layout.optimizer == "adagrad" else 0),
        "gradients": gradients,
        "activations": encoder_cost(config, local_model(config, found, rows, layout), part).memory,
        "loss": loss.memory,
        "batches": 2 * in_batch if platform(layout.kind) != "cpu" else PREFETCH * in_batch,
    }


def table_rows(found: Structure, layout: Layout) -> int:
    """Rows of the item table on each device."""
    return -(-found.rows // layout.number) if layout.spread else found.rows


def _is_sampled(config: Config) -> bool:
    return Loss(config.train.loss).is_sampled


def _asked_rows(config: Config, found: Structure, rows: int, layout: Layout) -> int:
    """Most rows of the item table that the batch of all devices asks for."""
    asked = layout.data * rows * config.data.max_length
    if _is_sampled(config):
        asked += config.train.negatives
        asked += layout.data * math.prod(batch_shapes(config, found.model, rows)["targets"].shape)
    return min(asked, found.rows)


def _scored_rows(config: Config, found: Structure, rows: int, layout: Layout) -> int:
    """Rows of the item table that the loss on one device is given."""
    if not layout.spread and layout.optimizer == "adam":
        return found.rows
    if _is_sampled(config):
        return min(_asked_rows(config, found, rows, layout._replace(data=1)), found.rows)
    return -(-found.rows // layout.items)


def _rows_of_gradient(config: Config, found: Structure, rows: int, layout: Layout) -> int:
    """Rows of the item table on one device that a step has gradients for."""
    held = table_rows(found, layout)
    if layout.optimizer == "adam" or not _is_sampled(config):
        return held
    return min(held, _asked_rows(config, found, rows, layout))


def sent(config: Config, found: Structure, rows: int, layout: Layout) -> dict[str, Any]:
    """Bytes that each device sends in a step.

    A sum over n devices sends 2 (n - 1) / n times its bytes, and a part of it half of that.
    """
    n, width = layout.number, found.width * BYTES
    if n == 1:
        return {}

    def share(count: int) -> int | float:
        return (count - 1) / count

    if not layout.spread:
        whole = found.rows * width + found.others * BYTES
        return {"sum of all gradients": 2 * share(n) * whole}
    asked = _asked_rows(config, found, rows, layout)
    found_sent = {
        "sum of gradients": 2 * share(n) * found.others * BYTES,
        "rows of the batch, and their gradients": 2 * share(n) * asked * width,
    }
    if not _is_sampled(config):
        part = -(-found.rows // layout.items) * width
        targets = math.prod(batch_shapes(config, found.model, rows)["targets"].shape)
        found_sent["item table along data, and its gradient"] = 2 * share(layout.data) * part
        found_sent["gradient of hidden states along items"] = (
            2 * share(layout.items) * targets * width
        )
    return {name: count for name, count in found_sent.items() if count}


def step_seconds(
    config: Config, found: Structure, rows: int, microbatches: int, layout: Layout
) -> dict[str, Any]:
    """What a step takes at least, if computing, memory and network never wait for one another."""
    part, device = -(-rows // microbatches), layout.device
    encoder = encoder_cost(config, local_model(config, found, rows, layout), part)
    with compile_for(platform(layout.kind)):
        loss = loss_cost(config, found, part, _scored_rows(config, found, rows, layout))
    operations = microbatches * (encoder.operations + loss.operations)
    traffic = microbatches * (encoder.traffic + loss.traffic)
    # Of each parameter that an update changes: the gradient, the parameter and two means are read,
    # and the last three are written.
    updated = _rows_of_gradient(config, found, rows, layout) * found.width + found.others
    traffic += 7 * updated * BYTES
    speed = device.bfloat16 if found.model.dtype == jnp.bfloat16 else device.float32
    link = device.link if layout.number <= device.group else device.outside
    return {
        "computing": operations / speed,
        "memory": traffic / device.bandwidth,
        "network": sum(sent(config, found, rows, layout).values()) / link,
    }


def epoch_steps(config: Config, sizes: Sizes) -> int:
    """Steps of an epoch, if no row of a packed batch has room left."""
    samples = max(sizes.events - 3 * sizes.users, 1)  # the first event, validation and test
    if config.train.objective == "every_position":
        samples = -(-(sizes.events - 2 * sizes.users) // config.data.max_length)
    return max(1, -(-samples // config.train.batch_size))


def plan(config: Config, sizes: Sizes, layout: Layout) -> Plan:
    """All figures of a training.

    Args:
      config: the settings, resolved.
      sizes: of the data.
      layout: of the devices.
    """
    found = structure(config, sizes.items, sizes.users)
    rows = -(-config.train.batch_size // layout.data)
    with compile_for(platform(layout.kind)):
        microbatches = num_microbatches(rows, config.data.max_length, 1, config.train.objective)
    memory = step_memory(config, found, rows, microbatches, layout)
    log = ON_DEVICE * sizes.events
    if platform(layout.kind) != "cpu" and log <= _SHARE * layout.device.memory:
        memory["all events"] = log
    parameters = found.rows * found.width + found.others
    optimizer = OPTIMIZERS[layout.optimizer] * found.rows * found.width + 2 * found.others
    optimizer += found.rows if layout.optimizer == "adagrad" else 0
    index = (ID_BYTES + 12) * sizes.users  # ids, and three offsets
    return Plan(
        memory=memory,
        network=sent(config, found, rows, layout),
        seconds=step_seconds(config, found, rows, microbatches, layout),
        rows=-(-rows // microbatches),
        steps=epoch_steps(config, sizes),
        checkpoint=(parameters + optimizer) * BYTES,
        host=40 * sizes.users,
        prepare_hours=PREPARE_SECONDS * sizes.events / 3600,
        prepare_disk=PREPARE_DISK * sizes.events,
        dataset=EVENT_BYTES * sizes.events + index + (ID_BYTES + 12) * sizes.items,
    )
