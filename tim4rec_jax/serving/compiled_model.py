"""The model behind functions of few shapes: compiled once each, safe to call from many threads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Int32, Int64

from tim4rec_jax.config import Config
from tim4rec_jax.data import collate, days, event_log, time_gaps
from tim4rec_jax.data.dataset import windows
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.ranking import top_k
from tim4rec_jax.scoring import HistoryItems
from tim4rec_jax.serving.history import Events

MAX_ROWS = 1024  # histories computed at once
_MAX_STEPS = 512  # events of one user that one compiled loop takes
_MIN_WIDTH = 8


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is `size` or more, and at least `least`."""
    return max(least, 1 << max(size - 1, 0).bit_length())


class CompiledModel:
    """Hidden states of histories, states of users, and the best items for them.

    Rows and lengths are padded to powers of two, so that few programs are compiled.

    Attributes:
        model: itself.
        table: item embeddings, [V+1, D]; row 0 is padding.
        offset: what the model adds to the scores of items that the history holds, or None.
        supports_step: whether users have a state of fixed size, see `advance`.
        knows_next_time: whether the moment of the prediction can be given.
        drifts: whether scores depend on the date.
        fingerprint: of everything that a user's state depends on.
        one_width: compute every history at full length: one program per number of rows, for
            services that cannot wait for a compilation.
    """

    def __init__(self, config: Config, model, item_ids: Sequence[str]):
        """Takes a model as `tim4rec_jax.run.load_model` returns it."""
        self.model = model
        graphdef, self._params = nnx.split(model)
        self.max_length: int = config.data.max_length
        self.one_width = False
        self.convention = config.data.convention
        self.supports_step, self.knows_next_time = model.supports_step, model.knows_next_time
        self.drifts = model.drift is not None
        self.table: Array = model.item_table()
        self.offset: Array | None = model.repeat_bias()
        self.fingerprint = _fingerprint(config, self._params, item_ids)

        def encode(params, items, lengths, gaps):
            return nnx.merge(graphdef, params).encode(items, lengths, gaps)

        def advance(params, state, hidden, items, gaps, lengths):
            model = nnx.merge(graphdef, params)

            def step(carry, event):
                number, items, gaps = event
                advanced = model.step(carry[0], items, gaps)

                def keep(new, old):
                    going_on = number < lengths
                    return jnp.where(going_on.reshape(-1, *[1] * (new.ndim - 1)), new, old)

                return jax.tree.map(keep, advanced, carry), None

            numbers = jnp.arange(items.shape[1])
            return lax.scan(step, (state, hidden), (numbers, items.T, gaps.T))[0]

        self._encode, self._advance = jax.jit(encode), jax.jit(advance)
        self._at = jax.jit(lambda params, *args: nnx.merge(graphdef, params).at(*args))
        self._drifted = jax.jit(lambda params, *args: nnx.merge(graphdef, params).drift(*args))
        if self.supports_step:
            one = jnp.zeros(1, jnp.int32), jnp.zeros(1)
            _, hidden = jax.eval_shape(lambda: model.step(model.init_state(1), *one))
            hidden = np.zeros(hidden.shape, hidden.dtype)
            self._initial = jax.tree.map(np.asarray, (model.init_state(1), hidden))

    def encode(self, events: Events) -> Float[Array, "R D"]:
        """Hidden states after each history's last `max_length` events.

        Rows beyond those of `events`, up to a power of two, and of empty histories mean nothing.
        """
        lengths = np.minimum(np.diff(events.offsets), self.max_length)
        starts = events.offsets[1:] - lengths
        missing = (0, power_of_two(len(lengths)) - len(lengths))
        lengths, starts = np.pad(lengths, missing), np.pad(starts, missing)
        width = min(power_of_two(int(lengths.max()), _MIN_WIDTH), self.max_length)
        if self.one_width:
            width = self.max_length
        # No event follows the last history: one is made up, which no history holds.
        log = event_log(np.pad(events.items, (0, 1)), np.pad(events.timestamps, (0, 1)))
        batch = collate(
            log,
            starts,
            lengths,
            width=width,
            max_length=self.max_length,
            convention=self.convention,
        )
        lengths = np.maximum(batch["lengths"], 1)
        return self._encode(self._params, batch["items"], lengths, batch["gaps"])

    def condition_on_time(
        self,
        hidden: Float[Array, "R D"],
        events: Events,
        moments: Int64[np.ndarray, " B"] | None,
    ) -> Array:
        """Hidden states to score with, from those after the histories.

        `moments` are those of the predictions, seconds since 1970, where the model knows them.

        Raises:
            UserError: a moment is before the last event of its history.
        """
        times, missing = events.last_times(), (0, len(hidden) - len(events.offsets) + 1)
        if moments is not None:
            wait = np.where(np.diff(events.offsets) == 0, 0, moments - times)
            if wait.min() < 0:
                raise UserError("`at` is before the last event of a history")
            hidden = self._at(self._params, hidden, np.pad(wait.astype(np.float32), missing))
            times = moments
        if not self.drifts:
            return hidden
        return self._drifted(self._params, hidden, np.pad(days(times), missing))

    def best(
        self,
        hidden: Float[Array, "R D"],
        table: Float[Array, "C D"],
        k: int,
        had: Int32[np.ndarray, "B S"] | None,
        exclude: bool,
    ) -> tuple[Float[np.ndarray, "R k"], Int[np.ndarray, "R k"]]:
        """Scores and rows of `table` of the `k` best, as `tim4rec_jax.evaluation.top_k`.

        `had` are rows of the table that the histories hold, 0 for nothing: left out if `exclude`,
        else offset as the model has learnt.
        """
        options = {}
        if had is not None:
            width = power_of_two(had.shape[1], 16)
            missing = ((0, len(hidden) - len(had)), (0, width - had.shape[1]))
            had = np.pad(had, missing)
            if exclude:
                options["exclude"] = had
            elif self.offset is not None:
                options["history"] = HistoryItems(jnp.asarray(had), self.offset)
        scores, rows = top_k(hidden, table, power_of_two(k, 16), **options)
        return np.asarray(scores)[:, :k], np.asarray(rows)[:, :k]

    def advance(
        self, states: Sequence[bytes | None], new: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> list[bytes]:
        """States of users after further events, of models that stream.

        Args:
            states: before; None for a user without events.
            new: items and times of each user's events to come. Where there is a state, the first
                one is the event before, which only tells the time since when.

        Returns:
            A state per user: the model's own and the last hidden state, as bytes.
        """
        skipped = np.array([state is not None for state in states], int)
        items, times = (np.concatenate(column) for column in zip(*new, strict=True))
        items = items.astype(np.int32)
        counts = np.array([len(events) for events, _ in new])
        starts, lengths = np.cumsum(counts) - counts, counts - skipped
        gaps = time_gaps(times[None], np.array([len(times)]), self.convention)[0]
        gaps[starts] = 0  # a history's first event has none
        rows = power_of_two(len(states))
        missing = (0, rows - len(states))
        starts, lengths = np.pad(starts + skipped, missing), np.pad(lengths, missing)
        state, hidden = self._unpack(states, rows)
        for first in range(0, int(lengths.max()), _MAX_STEPS):
            left = np.clip(lengths - first, 0, _MAX_STEPS).astype(np.int32)
            width = power_of_two(int(left.max()))
            inputs = [windows(column, starts + first, left, width) for column in (items, gaps)]
            state, hidden = self._advance(self._params, state, hidden, *inputs, left)
        return self._pack((state, hidden), len(states))

    def hidden(self, state: bytes) -> Float[Array, "1 D"]:
        """The hidden state that a user's state ends with."""
        return jnp.asarray(self._unpack([state], 1)[1])

    # A state is tens of kilobytes: every needless copy of a thousand of them is felt.

    def _pack(self, tree, rows: int) -> list[bytes]:
        leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(tree)]
        leaves = [leaf.reshape(len(leaf), -1).view(np.uint8) for leaf in leaves]
        return [b"".join([leaf[row] for leaf in leaves]) for row in range(rows)]

    def _unpack(self, states: Sequence[bytes | None], rows: int):
        initial, structure = jax.tree.flatten(self._initial)
        [nothing] = self._pack(self._initial, 1)
        ends = np.cumsum([leaf.nbytes for leaf in initial]).tolist()
        leaves = [np.zeros((rows, leaf.nbytes), np.uint8) for leaf in initial]
        for row, state in enumerate(states):
            packed = np.frombuffer(state or nothing, np.uint8)
            for leaf, end in zip(leaves, ends, strict=True):
                leaf[row] = packed[end - leaf.shape[1] : end]
        leaves = [
            leaf.view(like.dtype).reshape(rows, *like.shape[1:])
            for leaf, like in zip(leaves, initial, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)


def _fingerprint(config: Config, params: nnx.State, item_ids: Sequence[str]) -> str:
    settings = [config.model.to_dict(), config.data.convention, list(item_ids)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
