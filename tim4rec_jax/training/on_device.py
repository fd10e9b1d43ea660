"""Training from an event log that lies on the device.

A step of a few milliseconds leaves the host no time to gather windows and send them. Here only
the numbers of samples cross the bus, for several steps at once; the batches are those of
`tim4rec_jax.data`, value for value.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tim4rec_jax.data import Convention, Dataset, PackedBatches, TrainBatches, days
from tim4rec_jax.training.step import TrainState, micro_count, update

# Of the device's memory, or of as much as the smallest GPU of interest has.
_SHARE, _MEMORY = 0.25, 16 * 2**30


class EventLog(NamedTuple):
    """All events, user after user.

    Attributes:
      items: int32 [E], item indices.
      times: float32 [E], what gaps come from: times rounded to float32 (`recbole`), or the exact
        time since the event before, whoever's it is (`exact`).
      dates: float32 [E], days since 1970.
    """

    items: Any
    times: Any
    dates: Any


def event_log(dataset: Dataset, convention: Convention) -> EventLog:
    """The log of a dataset, in host memory."""
    items = np.concatenate([chunk.items for chunk in dataset.chunks])
    times = np.concatenate([chunk.timestamps for chunk in dataset.chunks])
    dates = days(times)
    if convention == "exact":
        times = np.diff(times, prepend=times[:1])
    return EventLog(items, times.astype(np.float32), dates)


def choose_placement(asked: str, dataset: Dataset) -> str:
    """`device` or `host`; `auto` is the device if that is not the host's own and the log fits."""
    if asked != "auto":
        return asked
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return "host"
    memory = (device.memory_stats() or {}).get("bytes_limit", _MEMORY)
    # Event numbers are int32.
    fits = dataset.n_events < 2**31 and 12 * dataset.n_events <= _SHARE * memory
    return "device" if fits else "host"


def prefix_batch(
    log: EventLog,
    rows: dict[str, jax.Array],
    *,
    width: int,
    max_length: int,
    convention: Convention,
) -> dict[str, jax.Array]:
    """`tim4rec_jax.data.prefix_batch` on the device.

    Args:
      log: of the dataset, with the same convention.
      rows: of `TrainBatches.rows`.
      width: columns of `items`.
      max_length: columns of `gaps`.
      convention: of the gaps.
    """
    lengths, stops = rows["lengths"], rows["stops"]
    column = jnp.arange(max_length)
    events = (stops - lengths)[:, None] + column
    real = column < lengths[:, None]
    # What is no event is gathered from the row's own target, which is always there.
    events = jnp.where(real, events, stops[:, None])
    items = jnp.where(real, log.items[events], 0)[:, :width]
    times = jnp.where(real, log.times[events], 0)
    gaps = jnp.diff(times, axis=1, prepend=times[:, :1]) if convention == "recbole" else times
    return {
        "items": items,
        "lengths": lengths,
        "gaps": gaps.at[:, 0].set(0),
        "targets": log.items[stops],
        "waits": log.times[stops],  # only models with exact gaps use them
        "dates": log.dates[stops - 1],
        "users": rows["users"],
        "weights": rows["weights"],
    }


def packed_batch(log: EventLog, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """An element of `tim4rec_jax.data.PackedBatches` on the device, from its `rows`."""
    events, first, weights = rows["events"], rows["first"], rows["weights"]
    real = weights > 0
    following = jnp.where(real, events + 1, 0)
    return {
        "items": jnp.where(real, log.items[events], 0),
        "gaps": jnp.where(real & ~first, log.times[events], 0),
        "segment_ids": jnp.cumsum(first, axis=1, dtype=jnp.int32),
        "targets": jnp.where(real, log.items[following], 0),
        "waits": jnp.where(real, log.times[following], 0),
        "dates": jnp.where(real, log.dates[events], 0),
        "weights": weights,
    }


class Layout(NamedTuple):
    """How batches are gathered from their rows; static, so hashable."""

    packed: bool
    buckets: tuple[int, ...]
    max_length: int
    convention: Convention
    devices: int

    def batch(self, log: EventLog, rows: dict[str, jax.Array], width: int) -> dict[str, jax.Array]:
        """A batch whose items have `width` columns, one of `buckets`."""
        if self.packed:
            return packed_batch(log, rows)
        return prefix_batch(
            log, rows, width=width, max_length=self.max_length, convention=self.convention
        )


def layout(batches: TrainBatches | PackedBatches, convention: Convention, devices: int) -> Layout:
    """How the batches of `batches` are gathered and spread over `devices`."""
    packed = isinstance(batches, PackedBatches)
    return Layout(packed, batches.buckets, batches.max_length, convention, devices)


@functools.partial(jax.jit, static_argnames=("layout", "needed", "settings"), donate_argnums=0)
def train_steps(
    state: TrainState,
    log: EventLog,
    rows: dict[str, jax.Array],
    up_to: jax.Array | None,
    *,
    layout: Layout,
    needed: tuple[str, ...],
    settings: tuple[tuple[str, Any], ...],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Several updates, one after the other, in one dispatch.

    Args:
      state: donated.
      log: of the dataset.
      rows: of the steps' batches, each array with a leading axis of steps.
      up_to: as for `tim4rec_jax.training.step.update`.
      layout: of the batches.
      needed: the arrays of a batch that the model and the objective use.
      settings: other arguments of `update`, as pairs.

    Returns:
      The state after the last step, and its metrics.
    """
    count = next(v for name, v in rows.items() if name != "bucket").shape[1]

    def with_width(width):
        micro = micro_count(count, width, layout.devices)

        def one(state, rows):
            batch = layout.batch(log, rows, width)
            batch = {name: batch[name] for name in needed if name in batch}
            return update(state, batch, micro=micro, up_to=up_to, **dict(settings))

        return one

    def step(state, rows):
        rows = dict(rows)
        bucket = rows.pop("bucket")
        return jax.lax.switch(bucket, [with_width(w) for w in layout.buckets], state, rows)

    state, metrics = jax.lax.scan(step, state, rows)
    return state, jax.tree.map(lambda each: each[-1], metrics)
