"""A model behind a few compiled programs, which any number of threads may call.

Rows and lengths are padded to powers of two, so that histories of all lengths share few programs.
A service pads to even fewer sizes, and compiles all of them before it begins (`compile_ahead`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int64, UInt8

from tim4rec_jax.config import Config
from tim4rec_jax.data import EventLog, collate, days, time_gaps
from tim4rec_jax.errors import UserError
from tim4rec_jax.layers.neighbours import RECENT, NeighbourTable
from tim4rec_jax.models import SequenceModel, condition_on_time, encode_batch, inputs
from tim4rec_jax.serving.history import Events
from tim4rec_jax.serving.top_items import top_items

MAX_ROWS = 1024  # how many histories are computed at once
# How many events of each user one call of the compiled loop takes. Each number is a program for
# each number of users; the loop itself ends after the last event.
_STEPS = (1, 16, 512)
_MIN_WIDTH = 8
_IDS_AT_ONCE = 1 << 16
# The sizes of a service. A CPU gains nothing by more rows, and the step loop ends after the last
# event of each user, whatever there is room for.
_SERVICE_ROWS, _SERVICE_WIDTH = (1, 4, 16, 32, 64), 32
_SERVICE_STEPS, _SERVICE_KS = (512,), (16, 128, 1024)


class Sizes(NamedTuple):
    """The only sizes that anything is padded to once `CompiledModel.compile_ahead` has run.

    Attributes:
        rows: the numbers of histories computed at once.
        widths: the numbers of events of a history, the longest of them `max_length`.
        steps: the numbers of new events of a user that one call takes.
        ks: the numbers of items looked for.
    """

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    steps: tuple[int, ...]
    ks: tuple[int, ...]


def _at_least(size: int, sizes: Sequence[int]) -> int:
    return next((candidate for candidate in sizes if candidate >= size), sizes[-1])


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is `size` or more, and at least `least`."""
    return max(least, 1 << max(size - 1, 0).bit_length())


class NewEvents(NamedTuple):
    """Events that a user's state has not taken in yet.

    Attributes:
        state: the state before them, as `CompiledModel.advance` returned it; `None` for a user
            without earlier events.
        since: the time of the last event that the state has taken in; `None` without a state.
        items: the items of the new events, as indices of the catalogue.
        timestamps: the times of the new events, in whole seconds since 1970.
    """

    state: bytes | None
    since: int | None
    items: Int[np.ndarray, " n"]
    timestamps: Int64[np.ndarray, " n"]


class CompiledModel:
    """Computes the hidden states of histories, the states of users, and the best items for them.

    Attributes:
        sequence_model: the model itself.
        max_length: how many events at the end of a history the model is given.
        convention: the convention of its time gaps.
        table: the item embeddings, [V+1, D]; row 0 is padding.
        repeat_bias: what the model adds to the scores of items that the history holds, or `None`.
        neighbours: what it adds to the scores of items near the last events, or `None`.
        last_bias: what it adds besides to the score of each item where it comes last, or `None`.
        supports_step: whether users have a state of fixed size; see `advance`.
        knows_next_time: whether the moment of the prediction can be given.
        no_events: the state of a user without events, if the model supports steps.
        fingerprint: a digest of everything that a user's state depends on.
        sizes: the sizes that everything is padded to, or `None` for powers of two; see
            `compile_ahead`.
    """

    def __init__(
        self,
        config: Config,
        model: SequenceModel,
        item_ids: Sequence[str],
        state_dtype: Literal["float32", "bfloat16"] = "float32",
    ):
        """Prepares a model; nothing is compiled yet.

        Args:
            config: the settings of the run, as `tim4rec_jax.run.load_model` returns them.
            model: the model, likewise.
            item_ids: the original id of every item.
            state_dtype: of the states of users between events. bfloat16 halves what a store
                keeps, and rounds the state after each call of `advance`. The hidden state, with
                which items are scored, stays float32.
        """
        self.sequence_model = model
        # A call with a list of arrays takes a third of the time of one with the state of a module.
        self._params, structure = jax.tree.flatten(nnx.split(model))
        self._programs = _programs(structure)
        self._inputs = inputs(model)
        self.max_length: int = config.data.max_length
        self.convention = config.data.convention
        self.sizes: Sizes | None = None
        self.supports_step, self.knows_next_time = model.supports_step, model.knows_next_time
        self.table: Array = model.item_table()
        self._top_items = jax.jit(lambda *arrays, k: top_items(*arrays, k=k), static_argnames="k")
        self.repeat_bias: Array | None = model.repeat_bias()
        self.neighbours: NeighbourTable | None = None
        if model.neighbours is not None:
            self.neighbours = model.neighbours.table()
        self.last_bias: Array | None = model.last_bias()
        self.fingerprint = _fingerprint(config, self._params, item_ids)
        if state_dtype != "float32":
            self.fingerprint += f" {state_dtype}"
        self.no_events = b""
        if self.supports_step:
            one = jnp.zeros(1, jnp.int32), jnp.zeros(1)
            state = jax.jit(lambda: model.init_state(1))()
            _, hidden = jax.eval_shape(model.step, state, *one)
            initial = jax.tree.map(np.asarray, state), np.zeros(hidden.shape, hidden.dtype)
            self._initial, self._carry = jax.tree.flatten(initial)
            narrow = jnp.dtype(state_dtype)
            self._stored = [
                narrow if leaf.dtype == np.float32 else leaf.dtype for leaf in self._initial[:-1]
            ] + [self._initial[-1].dtype]
            [self.no_events] = self._pack(initial, 1)

    @property
    def max_rows(self) -> int:
        """How many histories are computed at once, at most."""
        return self.sizes.rows[-1] if self.sizes else MAX_ROWS

    def padded(self, count: int) -> int:
        """How many rows are computed for `count` histories: R in the shapes below."""
        return _at_least(count, self.sizes.rows) if self.sizes else power_of_two(count)

    def compile_ahead(self) -> None:
        """Compiles a few programs, and uses no others from now on.

        Afterwards nothing is compiled any more, whatever the number and the lengths of histories
        and filters, as long as `k` is at most 1,000 and no call has more than `max_rows` rows.
        Other sizes would compile a program each, which takes a second and is never freed.
        """
        widths = {min(_SERVICE_WIDTH, self.max_length), self.max_length}
        sizes = Sizes(_SERVICE_ROWS, tuple(sorted(widths)), _SERVICE_STEPS, _SERVICE_KS)
        self.sizes = sizes
        for rows in sizes.rows:
            moments = np.ones(rows, np.int64) if self.knows_next_time else None
            for width in sizes.widths:
                items, times = np.ones(rows * width, np.int32), np.zeros(rows * width, np.int64)
                events = Events(items, times, np.arange(rows + 1) * width)
                hidden = self.condition(self.encode(events, moments), events, moments)
                for k in sizes.ks:
                    self.best(hidden, k, self.marks(rows))
            for steps in sizes.steps if self.supports_step else ():
                new = NewEvents(None, None, np.ones(steps, np.int64), np.zeros(steps, np.int64))
                self.advance([new] * rows)

    def encode(
        self,
        events: Events,
        moments: Int64[np.ndarray, " B"] | None = None,
        width: int | None = None,
    ) -> Float[Array, "R D"]:
        """The hidden states that items are scored with, after B histories.

        Rows B to R, which is a power of two, and the rows of empty histories mean nothing.

        Args:
            events: the histories. The model is given their last `max_length` events.
            moments: the times of the predictions, in whole seconds since 1970, for a model that
                knows them.
            width: the least length that histories are padded to. Each length is one more program
                to compile. `None` takes the power of two that the longest history needs.

        Raises:
            UserError: a moment is before the last event of its history.
        """
        count = len(events.offsets) - 1
        rows = self.padded(count)
        starts, lengths = np.zeros((2, rows), np.int64)
        lengths[:count] = np.minimum(np.diff(events.offsets), self.max_length)
        starts[:count] = events.offsets[1:] - lengths[:count]
        needed = power_of_two(int(lengths.max()), _MIN_WIDTH)
        width = min(max(needed, width or 0), self.max_length)
        if self.sizes:
            width = _at_least(width, self.sizes.widths)
        # An event that no history holds stands for the one that follows the last history.
        log = EventLog(np.append(events.items, np.int32(0)), np.append(events.timestamps, 0))
        batch = collate(
            log,
            starts,
            lengths,
            width=width,
            max_length=self.max_length,
            convention=self.convention,
        )
        batch["lengths"] = np.maximum(batch["lengths"], 1)
        batch["users"] = np.full(rows, -1, np.int32)  # nobody whom the model knows
        if moments is not None:
            batch["time_to_next"] = _padded(_time_to_next(events, moments), rows)
        return self._programs.encode(self._params, self._needed(batch))

    def condition(
        self,
        hidden: Float[Array | np.ndarray, "R D"],
        events: Events,
        moments: Int64[np.ndarray, " B"] | None = None,
    ) -> Float[Array | np.ndarray, "R D"]:
        """What `encode` does to the hidden states of the model, for those of users' states.

        Args:
            hidden: the last hidden states of users, as `hidden` returns them.
            events: all their events, of which only the last times matter.
            moments: as for `encode`.

        Raises:
            UserError: a moment is before the last event of its history.
        """
        batch = {}
        if "dates" in self._inputs:
            batch["dates"] = _padded(days(events.last_times()), len(hidden))
        if moments is not None:
            batch["time_to_next"] = _padded(_time_to_next(events, moments), len(hidden))
        # From the host, because arrays of the device would be a program of their own.
        return (
            self._programs.condition(self._params, np.asarray(hidden), batch) if batch else hidden
        )

    def marks(self, count: int) -> UInt8[np.ndarray, "R V_and_1"]:
        """Marks for `best` that say nothing yet, for `count` histories."""
        return np.zeros((self.padded(count), len(self.table)), np.uint8)

    def best(
        self,
        hidden: Float[Array | np.ndarray, "R D"],
        k: int,
        marks: UInt8[np.ndarray, "R V_and_1"],
        recent: Int[np.ndarray, "R S"] | None = None,
    ) -> tuple[Float[np.ndarray, "R k"], Int[np.ndarray, "R k"]]:
        """The scores and the items of the `k` best; see `top_items`.

        Args:
            hidden: the hidden states to score with.
            k: how many items.
            marks: from `marks`. To an item marked as repeated the model's repeat bias is added.
            recent: the last `RECENT` items of each history, the last one first, 0 for none. Only a
                model with neighbours or a last bias needs them; `None` adds neither.
        """
        padded = power_of_two(k, 16)
        if self.sizes and k <= self.sizes.ks[-1]:
            padded = _at_least(k, self.sizes.ks)
        # From the host, because arrays of the device would be a program of their own.
        hidden = np.asarray(hidden)
        near, last = None, None
        if recent is None:
            recent = np.zeros((len(hidden), RECENT), np.int32)
        if self.neighbours is not None:
            near = self.neighbours, recent
        if self.last_bias is not None:
            last = self.last_bias, recent[:, :2]
        arrays = (hidden, self.table, marks, self.repeat_bias, near, last)
        scores, items = self._top_items(*arrays, k=padded)
        return np.asarray(scores)[:, :k], np.asarray(items)[:, :k]

    def advance(self, users: Sequence[NewEvents]) -> list[bytes]:
        """The states of users after new events, of a model that supports steps.

        At most `max_rows` users are computed at once.

        Args:
            users: one or more new events of each user, in order of time.

        Returns:
            A state per user, as bytes: the model's own state and the last hidden state.
        """
        if len(users) > self.max_rows:
            parts = [users[n : n + self.max_rows] for n in range(0, len(users), self.max_rows)]
            return [state for part in parts for state in self.advance(part)]
        rows = self.padded(len(users))
        counts = np.zeros(rows, np.int32)
        counts[: len(users)] = [len(user.items) for user in users]
        longest = int(counts.max())
        width = _at_least(longest, self.sizes.steps if self.sizes else _STEPS)
        inside = np.arange(-(-longest // width) * width) < counts[:, None]
        items, gaps = np.zeros(inside.shape, np.int32), np.zeros(inside.shape, np.float32)
        items[inside] = np.concatenate([user.items for user in users])
        gaps[inside] = self._gaps(users)
        carry = self._unpack([user.state for user in users], rows)
        for first in range(0, inside.shape[1], width):
            part = (array[:, first : first + width] for array in (items, gaps))
            left = np.clip(counts - first, 0, width)
            # From the host, because arrays of the device would be a program of their own.
            carry = jax.tree.map(np.asarray, carry)
            carry = self._programs.advance(self._params, carry, *part, left)
        return self._pack(carry, len(users))

    def hidden(self, state: bytes) -> Float[np.ndarray, "1 D"]:
        """The hidden state that a user's state ends with; see `condition`."""
        like = self._initial[-1]
        return np.frombuffer(state, like.dtype, offset=len(state) - like.nbytes).reshape(like.shape)

    def _needed(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: batch[name] for name in self._inputs if name in batch}

    def _gaps(self, users: Sequence[NewEvents]) -> Float32[np.ndarray, " n"]:
        """The gaps before the new events of all users, one user's after the other's."""
        times = np.concatenate([user.timestamps for user in users])
        gaps = time_gaps(times[None], np.array([len(times)]), self.convention)[0]
        # A user's first new event follows the last event of the state, not another user's event.
        # Where there is no state, it has no gap, as if it followed itself.
        counts = np.array([len(user.items) for user in users])
        firsts = np.cumsum(counts) - counts
        before = [user.timestamps[0] if user.since is None else user.since for user in users]
        pairs = np.stack([before, times[firsts]], axis=1)
        gaps[firsts] = time_gaps(pairs, np.full(len(users), 2), self.convention)[:, 1]
        return gaps

    def _unpack(self, states: Sequence[bytes | None], rows: int) -> Any:
        """The states of users as arrays, for `advance`; the initial state where there is none."""
        sizes = [
            leaf.size * stored.itemsize
            for leaf, stored in zip(self._initial, self._stored, strict=True)
        ]
        ends = list(itertools.accumulate(sizes))
        leaves = [np.zeros((rows, size), np.uint8) for size in sizes]
        for row, state in enumerate(states):
            packed = np.frombuffer(state or self.no_events, np.uint8)
            for leaf, end in zip(leaves, ends, strict=True):
                leaf[row] = packed[end - leaf.shape[1] : end]
        leaves = [
            leaf.view(stored).reshape(rows, *like.shape[1:]).astype(like.dtype, copy=False)
            for leaf, stored, like in zip(leaves, self._stored, self._initial, strict=True)
        ]
        return jax.tree.unflatten(self._carry, leaves)

    def _pack(self, carry: Any, rows: int) -> list[bytes]:
        """The first rows of all arrays of a state, one after the other.

        A state is tens of kilobytes, so a needless copy of a thousand states would be felt.
        """
        leaves = [
            np.ascontiguousarray(np.asarray(leaf).astype(stored, copy=False))
            for leaf, stored in zip(jax.tree.leaves(carry), self._stored, strict=True)
        ]
        leaves = [leaf.reshape(len(leaf), -1).view(np.uint8) for leaf in leaves]
        return [b"".join([leaf[row] for leaf in leaves]) for row in range(rows)]


class _Programs(NamedTuple):
    """Compiled programs; the first argument of each is the list of the model's parameters."""

    encode: Callable[..., Any]
    condition: Callable[..., Any]
    advance: Callable[..., Any]


@functools.lru_cache(maxsize=8)
def _programs(structure: Any) -> _Programs:
    """The programs of all models that have this structure, whatever their parameters."""

    def merge(params) -> Any:
        return nnx.merge(*jax.tree.unflatten(structure, params))

    def advance(params, carry, items, gaps, lengths):
        model = merge(params)

        def step(number, carry):
            advanced = model.step(carry[0], items[:, number], gaps[:, number])

            def keep(new, old):
                goes_on = (number < lengths).reshape(-1, *[1] * (new.ndim - 1))
                return jnp.where(goes_on, new, old)

            return jax.tree.map(keep, advanced, carry)

        return lax.fori_loop(0, lengths.max(), step, carry)

    return _Programs(
        encode=jax.jit(lambda params, batch: encode_batch(merge(params), batch)),
        condition=jax.jit(
            lambda params, hidden, batch: condition_on_time(merge(params), hidden, batch)
        ),
        advance=jax.jit(advance),
    )


def _time_to_next(events: Events, moments: Int64[np.ndarray, " B"]) -> Float32[np.ndarray, " B"]:
    """The seconds from the last event of each history to a moment, 0 for an empty history."""
    seconds = np.where(np.diff(events.offsets) == 0, 0, moments - events.last_times())
    if seconds.min() < 0:
        raise UserError("`at` is before the last event of a history")
    return seconds.astype(np.float32)


def _padded(values: Float32[np.ndarray, " B"], rows: int) -> Float32[np.ndarray, " R"]:
    return np.pad(values, (0, rows - len(values)))


def _fingerprint(config: Config, params: list[Any], item_ids: Sequence[str]) -> str:
    # The digest of the JSON text of all of it, which millions of ids never are at once.
    settings = json.dumps([config.model.to_dict(), config.data.convention], sort_keys=True)
    digest, between = hashlib.sha256(f"{settings[:-1]}, [".encode()), ""
    for first in range(0, len(item_ids), _IDS_AT_ONCE):
        ids = json.dumps(list(item_ids[first : first + _IDS_AT_ONCE]))
        digest.update(f"{between}{ids[1:-1]}".encode())
        between = ", "
    digest.update(b"]]")
    for leaf in params:
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
