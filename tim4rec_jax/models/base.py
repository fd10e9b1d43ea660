"""What all models have in common: how they are asked for hidden states and scores."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers.basic import dropout, fold, layer_norm, take_position
from tim4rec_jax.layers.time import Drift

# ---- models.sequence_model
# What all models have in common: how they are asked for hidden states and scores.

NORMAL = nnx.initializers.normal(0.02)
# A weight that Adam moves by its learning rate a step has to get from 0 to where exp() of it
# vanishes within an epoch or two.
_OFFSET_UNIT = 30.0


class SequenceModel(nnx.Module):
    """Histories -> hidden states, whose dot products with the rows of a table score the items.

    Attributes:
      item_embedding: `nnx.Embed`; row 0 is padding, then one row for each item, then the other
        `special_rows`.
      n_items: number of items, without padding.
      max_length: longest history.
    """

    # What a model can do; subclasses say so.
    causal = False  # a position's hidden state depends on what came before only
    supports_step = False  # `init_state` and `step`: constant cost for each further event
    knows_next_time = False  # `at`: conditions on the moment of prediction
    by_user = False  # `encode` takes `users`
    special_rows = 1  # rows of `item_embedding` that are no items

    item_embedding: nnx.Embed
    n_items: int
    max_length: int
    offset: nnx.Param | None = None
    drift: Drift | None = None

    def begin(
        self,
        config,
        width: int,
        n_items: int,
        max_length: int,
        rngs: nnx.Rngs,
        param_dtype,
        embedding_init=NORMAL,
    ) -> dict[str, Any]:
        """Sets what all models have; the first thing a constructor calls.

        Args:
          config: the model's settings, with the dtype of the activations.
          width: of `item_embedding`.
          n_items: number of items, without padding.
          max_length: longest history.
          rngs: stream `params`.
          param_dtype: of parameters; if not float32, of activations as well.
          embedding_init: of all rows of the table, that of padding included.

        Returns:
          Dtypes and rngs, keyword arguments of the model's layers.
        """
        self.n_items, self.max_length = n_items, max_length
        dtype = jnp.dtype(config["dtype"]) if param_dtype == jnp.float32 else param_dtype
        self.dtype = dtype
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        rows = n_items + self.special_rows
        self.item_embedding = nnx.Embed(rows, width, embedding_init=embedding_init, **kwargs)
        if config.get("repeat_bias"):  # a setting that older runs do not have
            self.offset = nnx.Param(jnp.zeros((), param_dtype))
        if knots := config.get("date_bias_knots"):
            self.drift = Drift(knots, config["date_bias_dates"], width, param_dtype=param_dtype)
        return kwargs

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Hidden states at every position; only those before `lengths` mean anything.

        Args:
          items: item indices, right padded with 0.
          lengths: number of events of each row, >= 1.
          gaps: seconds since the event before (`tim4rec_jax.data.time_gaps`), 0 at the first.
          segment_ids: which history a position belongs to, for rows of several; None: one a
            row. Causal models only.
          dropout_seeds: one seed per row (`tim4rec_jax.layers.row_seeds`) to train; None to
            evaluate.
        """
        raise NotImplementedError

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1`, what the next item is predicted from."""
        return take_position(self(items, lengths, gaps, dropout_seeds=dropout_seeds), lengths - 1)

    def item_table(self) -> Float[Array, "V D"]:
        """The vector of each item: its score is the dot product with a hidden state."""
        return self.item_embedding.embedding[...]

    def repeat_bias(self) -> Float[Array, ""] | None:
        """What is added to the score of each item that the history holds; None: nothing."""
        return None if self.offset is None else _OFFSET_UNIT * self.offset[...]

    def penalty(self) -> Float[Array, ""] | float:
        """What the training loss of a batch has on top of the mean loss of its samples."""
        return 0.0

    def masks(
        self, items: Int32[Array, "B L"], lengths: Int[Array, "B"], gaps: Float[Array, "B T"]
    ) -> list[Float[Array, "B H L L"]]:
        """What each event counts for in each later one before its content, by layer and head.

        The time-aware masks of TiM4Rec (`tim4rec_jax.ssd.reference`); models without have no layers.
        """
        return []

    def at(self, hidden: Float[Array, "*batch D"], wait: Float[Array, "*batch"]) -> jax.Array:
        """Hidden states for a prediction `wait` seconds after the last event.

        Raises:
          ValueError: the model was not trained so.
        """
        raise ValueError("this model does not know when the next event happens")

    def init_state(self, batch: int) -> Any:
        """The state of `batch` users without events.

        Raises:
          ValueError: the model has no state of constant size.
        """
        raise self._does_not_stream()

    def step(
        self, state: Any, items: Int32[Array, "B"], gaps: Float[Array, "B"]
    ) -> tuple[Any, Float[Array, "B D"]]:
        """One event of each user: constant cost, whatever came before.

        Args:
          state: from `init_state` or the last `step`.
          items: item indices.
          gaps: exact seconds since the user's event before, 0 for the first.

        Returns:
          The next state, and the hidden state that `__call__` has at this position.

        Raises:
          ValueError: the model has no state of constant size.
        """
        raise self._does_not_stream()

    def _does_not_stream(self) -> ValueError:
        return ValueError(
            f"{type(self).__name__} cannot go on event by event; take a model that streams, "
            "TiM4Rec with time_encoding='causal' for example"
        )


def encode_batch(
    model: SequenceModel, batch: dict, dropout_seeds: UInt32[Array, "B"] | None = None
) -> Float[Array, "B D"]:
    """What scores are computed from, for a batch of `tim4rec_jax.data`: `model.encode` and more."""
    users: dict = {"users": batch["users"] + 1} if model.by_user else {}
    hidden = model.encode(
        batch["items"], batch["lengths"], batch["gaps"], dropout_seeds=dropout_seeds, **users
    )
    return condition_on_time(model, hidden, batch)


def condition_on_time(model: SequenceModel, hidden: jax.Array, batch: dict) -> jax.Array:
    """What follows on `encode`, or `__call__`, before items are scored.

    The date that counts is that of the last event, or of the next one where it is known.
    """
    if model.knows_next_time:
        hidden = model.at(hidden, batch["time_to_next"])
    if model.drift is None:
        return hidden
    dates = batch["dates"]
    if model.knows_next_time:
        dates = dates + batch["time_to_next"] / 86_400
    return model.drift(hidden, dates)


def inputs(model: SequenceModel) -> tuple[str, ...]:
    """The arrays of a batch that a model makes use of; the others need not leave the host."""
    needed = ("items", "lengths", "gaps", "segment_ids")
    needed += ("users",) * model.by_user + ("time_to_next",) * model.knows_next_time
    needed += ("dates",) * (model.drift is not None)
    return needed


# ---- models.causal_blocks
# What models have in common that are a stack of causal layers with a state of fixed size.


class CausalBlocks(SequenceModel):
    """Item embedding, dropout, norm, then layers with the methods of `CausalBlock`.

    Every position predicts the event after it; no weight depends on `max_length`.
    """

    causal = supports_step = True

    def __init__(
        self,
        config,
        *,
        width: int,
        layers: int,
        eps: float,
        n_items: int,
        max_length: int,
        rngs: nnx.Rngs,
        param_dtype,
    ):
        kwargs = self.begin(config, width, n_items, max_length, rngs, param_dtype)
        self.dropout_rate = config["dropout_prob"]
        self.norm = layer_norm(width, eps, self.dtype, param_dtype, rngs)
        self.blocks = nnx.List([self.make_block(config, kwargs) for _ in range(layers)])

    def make_block(self, config, kwargs: dict) -> Any:
        """A layer; `kwargs` are its dtypes and rngs."""
        raise NotImplementedError

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """See `SequenceModel`; of `gaps` columns after L are not used."""
        del lengths  # what follows a position changes nothing there
        h = self._embed(items, fold(dropout_seeds, 0))
        features = self._features(gaps[:, : items.shape[1]])
        for i, block in enumerate(self.blocks):
            h = block(h, features, segment_ids, fold(dropout_seeds, i + 1))
        return h

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See `SequenceModel`; the last layer computes nothing else than that position."""
        h = self._embed(items, fold(dropout_seeds, 0))
        features = self._features(gaps[:, : items.shape[1]])
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks[:last]):
            h = block(h, features, None, fold(dropout_seeds, i + 1))
        return self.blocks[last].last(h, features, lengths, fold(dropout_seeds, last + 1))

    def init_state(self, batch: int) -> list:
        """See `SequenceModel`."""
        return [block.init_state(batch) for block in self.blocks]

    def step(
        self, state: list, items: Int32[Array, "B"], gaps: Float[Array, "B"]
    ) -> tuple[list, Float[Array, "B D"]]:
        """See `SequenceModel`."""
        h, features, following = self._embed(items, None), self._features(gaps), []
        for block, layer in zip(self.blocks, state, strict=True):
            layer, h = block.step(layer, h, features)
            following.append(layer)
        return following, h

    def _features(self, gaps: Float[Array, "*batch"]) -> Float[Array, "*batch K"] | None:
        """What the layers are told of the gaps; nothing, unless a subclass does."""
        del gaps
        return None

    def _embed(self, items, seeds):
        return self.norm(dropout(self.item_embedding(items), self.dropout_rate, seeds))
