"""What all models have in common: settings, construction, and the questions they answer.

A model turns the history of a user into a hidden state. The score of an item is the dot product of
that state with the item's vector. `docs/add-a-model.md` builds a model step by step.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax import checks
from tim4rec_jax.layers.basic import dropout, fold, layer_norm, take_position
from tim4rec_jax.layers.items import FeatureArrays, FeatureMaps, ItemEmbedding
from tim4rec_jax.layers.neighbours import Neighbours
from tim4rec_jax.layers.time import DateBias

NORMAL = nnx.initializers.normal(0.02)
# Adam moves a weight by about the learning rate in a step. In this unit the bias can go from 0 to
# a value whose exp() vanishes within an epoch or two.
_REPEAT_BIAS_UNIT = 30.0
_LAST_BIAS_UNIT = 60.0  # because fewer steps have a gradient for the number of one item


def rate(default: float) -> Any:
    """A setting that is a probability in [0, 1)."""
    return _field(default, checks.RATE)


def share(default: float) -> Any:
    """A setting that is a part of a whole, in [0, 1]."""
    return _field(default, checks.SHARE)


def not_negative(default: int | float) -> Any:
    """A setting that is 0 or more. Numbers declared without a mark must be positive."""
    return _field(default, checks.NOT_NEGATIVE)


def count(default: int) -> Any:
    """A setting that is a number of layers or the like, from 1 to 1000."""
    return _field(default, checks.COUNT)


def one_of(default: str, *others: str) -> Any:
    """A setting that is one of some words."""
    return _field(default, checks.one_of(default, *others))


def _field(default: Any, check: checks.Check) -> Any:
    return dataclasses.field(default=default, metadata={"check": check})


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The settings that every model has; each model adds its own in a subclass.

    Attributes:
      dtype: of the activations, "float32" or "bfloat16". The second halves their memory.
      repeat_bias: whether the model learns a number that is added to the scores of items that the
        history holds. Without it, a model whose inputs and scores share one table recommends what
        the user just had. No model of TiM4Rec's comparison has one.
      repeat_last: whether each item has a learned number of its own, too. It is added to the item's
        score where it is the last item of the history, and the one before is another. It pays where
        some items come twice in a row and most never do. Needs `repeat_bias`.
      date_bias_knots: number of dates between which the model interpolates learned changes of the
        scores. The dates are spread evenly over the time of the training events. 0: no changes.
      item_features: whether the features of items add to their vectors, if the dataset has any.
      id_dropout: share of the items whose own rows a training step leaves out, so that their
        features learn to stand alone. Used with item features only.
      neighbours: how many neighbours of each item add to the scores of a ranking, see
        `tim4rec_jax.data.item_neighbours`. 0: none. The loss does not know of them.
      neighbours_follow: whether only items that users have after an item are its neighbours. It
        pays where the order of the events means much.
      neighbour_weight: what the logarithm of a sum of their similarities is multiplied by.

    Raises:
      ValueError: a setting is out of its range; the message begins with the setting's name.
    """

    dtype: str = one_of("float32", "bfloat16")
    repeat_bias: bool = False
    repeat_last: bool = False
    date_bias_knots: int = not_negative(0)
    item_features: bool = True
    id_dropout: float = rate(0.3)
    neighbours: int = not_negative(0)
    neighbours_follow: bool = False
    neighbour_weight: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kind = type(field.default)
            check = field.metadata.get("check", checks.POSITIVE if kind in (int, float) else None)
            try:
                checks.checked(getattr(self, field.name), kind, check)
            except ValueError as error:
                raise ValueError(f"{field.name} {error}") from None
        if self.date_bias_knots == 1:
            raise ValueError("date_bias_knots is 1; it must be 2 or more, or 0 for no date bias")
        if self.repeat_last and not self.repeat_bias:
            raise ValueError("repeat_last is True, which needs repeat_bias=True")

    @property
    def convention(self) -> str:
        """How the published model computes gaps, "recbole" or "exact" (see `data.convention`)."""
        return "exact"

    @property
    def idle(self) -> tuple[str, ...]:
        """The settings that have no effect beside the others, so that runs may differ in them."""
        return ()


@dataclasses.dataclass(frozen=True)
class DataSizes:
    """What a model must know of the data when it is built.

    Attributes:
      n_items: number of items, without padding.
      max_length: length of the longest history, in events.
      n_users: number of users, without the unknown user. Only for models that `need_users`.
      item_counts: int [n_items], training events of each item. Only for models that
        `need_item_counts`; None: the counts are loaded later, with the other weights.
      item_features: what is known of the items besides; None: nothing.
      neighbours: the neighbours of each item and their similarities, see
        `tim4rec_jax.data.item_neighbours`. None: they are loaded later, with the other weights.
    """

    n_items: int
    max_length: int
    n_users: int = 0
    item_counts: np.ndarray | None = None
    item_features: FeatureArrays | None = None
    neighbours: tuple[np.ndarray, np.ndarray] | None = None


class SequenceModel(nnx.Module):
    """A model that turns histories into hidden states.

    Attributes:
      item_embedding: gives the vectors of items. Row 0 is padding, rows 1 to `n_items` are the
        items, and the other `special_rows` follow.
      n_items: number of items, without padding.
      max_length: length of the longest history, in events.
      dtype: of the activations.
      offset: the parameter behind `repeat_bias`, or None.
      last_offset: the parameters behind `repeat_last`, one for each row of items, or None.
      drift: the date bias, or None.
      neighbours: of the items, or None.
    """

    # What the rest of the program asks a model's class. Subclasses state where they differ.
    Settings: ClassVar[type[ModelSettings]] = ModelSettings
    causal = False  # whether a hidden state depends on the events up to its position only
    supports_step = False  # whether `init_state` and `step` work
    knows_next_time = False  # whether `at` works: predictions depend on the time of the next event
    needs_users = False  # whether `encode` takes `users`
    needs_item_counts = False  # whether the constructor reads `DataSizes.item_counts`
    special_rows = 1  # number of rows of `item_embedding` that are no items
    # Parameters with a row for each item, which devices can have parts of. A model with other ones
    # than the item table names them; one that computes with whole tables names none.
    item_rows: ClassVar[tuple[str, ...]] = ("item_embedding/embedding",)
    # Defaults of training, which a configuration can change.
    default_objective = "prefix"  # a model with "cloze" is trained with this objective only
    default_patience = 10  # epochs without improvement before training stops
    default_epochs: int | None = None  # None: as the configuration says
    default_loss: str | None = None  # None: as the configuration says
    default_negatives: int | None = None  # None: as the configuration says

    item_embedding: Any  # an `ItemEmbedding`, or an `nnx.Embed` of a model that takes no features
    n_items: int
    max_length: int
    offset: nnx.Param | None = None
    last_offset: nnx.Param | None = None
    drift: DateBias | None = None
    neighbours: Neighbours | None = None

    @classmethod
    def variant(cls, settings: Any) -> "type[SequenceModel]":
        """The class that is built for these settings; `cls` unless a model has several."""
        del settings
        return cls

    def __init__(
        self,
        settings: ModelSettings,
        sizes: DataSizes,
        *,
        width: int,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        embedding_init: nnx.Initializer = NORMAL,
    ):
        """Makes the item table and the biases. A subclass calls this first.

        Args:
          settings: those of the model.
          sizes: of the data.
          width: of the item vectors.
          rngs: a stream `params`.
          param_dtype: dtype of the parameters. If it is not float32, it is that of the activations
            too, instead of `settings.dtype`; float64 serves tests of parity.
          embedding_init: initialiser of all rows of the item table.
        """
        self.n_items, self.max_length = sizes.n_items, sizes.max_length
        self.dtype = jnp.dtype(settings.dtype) if param_dtype == jnp.float32 else param_dtype
        self.item_embedding = ItemEmbedding(
            sizes.n_items + self.special_rows,
            width,
            features=sizes.item_features if settings.item_features else None,
            dropout_rate=settings.id_dropout,
            embedding_init=embedding_init,
            dtype=self.dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        if settings.repeat_bias:
            self.offset = nnx.Param(jnp.zeros((), param_dtype))
        if settings.repeat_last:
            self.last_offset = nnx.Param(jnp.zeros((sizes.n_items + 1,), param_dtype))
        if settings.date_bias_knots:
            self.drift = DateBias(settings.date_bias_knots, width, param_dtype=param_dtype)
        if settings.neighbours:
            shape = sizes.n_items + 1, settings.neighbours
            found = sizes.neighbours or (np.zeros(shape, np.int32), np.zeros(shape, np.float32))
            self.neighbours = Neighbours(*found, settings.neighbour_weight)

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Hidden states at every position. Those from `lengths` on have no meaning.

        Args:
          items: item indices, padded with 0 on the right.
          lengths: number of events of each row, at least 1.
          gaps: seconds since the event before (`tim4rec_jax.data.time_gaps`), 0 at the first
            event. T is L or `max_length`.
          segment_ids: the number of the history that each position belongs to, for rows that hold
            several histories. None: each row is one history. Only causal models take it.
          dropout_seeds: one seed for each row (`tim4rec_jax.layers.row_seeds`). None switches
            dropout off.
        """
        raise NotImplementedError

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """Hidden states at the last event of each row, from which the next item is predicted.

        Equals `__call__` at position `lengths - 1`. A model overrides it where it can be cheaper.
        """
        return take_position(self(items, lengths, gaps, dropout_seeds=dropout_seeds), lengths - 1)

    def item_table(self) -> Float[Array, "V D"]:
        """What the score of each item is computed with, row 0 for padding, V >= `n_items` + 1."""
        return self.item_vectors()

    def item_vectors(self) -> Float[Array, "V D"]:
        """The vector of each row of `item_embedding`, with what the features add to it."""
        table = self.item_embedding
        return table.vectors() if isinstance(table, ItemEmbedding) else table.embedding[...]

    @property
    def feature_maps(self) -> FeatureMaps | None:
        """The maps of the items' features; None: the model has none."""
        return getattr(self.item_embedding, "maps", None)

    def repeat_bias(self) -> Float[Array, ""] | None:
        """What is added to the score of each item that the history holds. None: nothing."""
        return None if self.offset is None else _REPEAT_BIAS_UNIT * self.offset[...]

    def last_bias(self) -> Float[Array, " V"] | None:
        """What is added besides to the score of each item where it comes last. None: nothing."""
        return None if self.last_offset is None else _LAST_BIAS_UNIT * self.last_offset[...]

    def penalty(self) -> Float[Array, ""] | float:
        """What training adds to the mean loss of a batch."""
        return 0.0

    def masks(
        self, items: Int32[Array, "B L"], lengths: Int[Array, " B"], gaps: Float[Array, "B T"]
    ) -> list[Float[Array, "B H L L"]]:
        """The time-aware mask of each layer: the weight of each event in each later event.

        The weights are those of `tim4rec_jax.ssd.reference`, before the content of the events
        counts. A model without such layers returns an empty list.
        """
        return []

    def at(self, hidden: Float[Array, "*batch D"], wait: Float[Array, "*batch"]) -> jax.Array:
        """Hidden states for a prediction `wait` seconds after the last event.

        Raises:
          ValueError: the model was not trained with the time of the next event.
        """
        raise ValueError("this model does not know when the next event happens")

    def init_state(self, batch: int) -> Any:
        """The state of `batch` users without events.

        Raises:
          ValueError: the model has no state of fixed size.
        """
        raise self._cannot_step()

    def step(
        self, state: Any, items: Int32[Array, " B"], gaps: Float[Array, " B"]
    ) -> tuple[Any, Float[Array, "B D"]]:
        """Takes one event of each user, at a cost that does not depend on the history's length.

        Args:
          state: what `init_state` or the last `step` returned.
          items: item indices.
          gaps: exact seconds since the user's event before, 0 for the first event.

        Returns:
          The next state, and the hidden state that `__call__` computes at this position.

        Raises:
          ValueError: the model has no state of fixed size.
        """
        raise self._cannot_step()

    def _cannot_step(self) -> ValueError:
        return ValueError(
            f"{type(self).__name__} cannot go on event by event; take a model that can, "
            "TiM4Rec with time_encoding='causal' for example"
        )


def encode_batch(
    model: SequenceModel, batch: dict, dropout_seeds: UInt32[Array, " B"] | None = None
) -> Float[Array, "B D"]:
    """The hidden states that score items, for a batch of `tim4rec_jax.data`.

    Args:
      model: any model.
      batch: the arrays that `inputs` names.
      dropout_seeds: one seed for each row; None switches dropout off.
    """
    users: dict = {"users": batch["users"] + 1} if model.needs_users else {}
    hidden = model.encode(
        batch["items"], batch["lengths"], batch["gaps"], dropout_seeds=dropout_seeds, **users
    )
    return condition_on_time(model, hidden, batch)


def condition_on_time(model: SequenceModel, hidden: jax.Array, batch: dict) -> jax.Array:
    """Adds to hidden states of `encode` or `__call__` what depends on the time of prediction.

    The date bias takes the date of the last event, or that of the next event if the model knows
    it.
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
    """Names of the arrays of a batch that a model uses. The others need not leave the host."""
    names = ("items", "lengths", "gaps", "segment_ids")
    names += ("users",) * model.needs_users + ("time_to_next",) * model.knows_next_time
    return names + ("dates",) * (model.drift is not None)


class CausalBlocks(SequenceModel):
    """Item embedding, dropout, norm, then a stack of causal layers with a state of fixed size.

    A layer has the methods of `tim4rec_jax.layers.CausalBlock`. Every position predicts the event
    after it, and no weight depends on `max_length`.

    Attributes:
      dropout_rate: of the item vectors.
      norm: follows the dropout.
      blocks: the layers. A subclass makes them after it has called `__init__`.
    """

    causal = supports_step = True
    blocks: nnx.List

    def __init__(
        self,
        settings: ModelSettings,
        sizes: DataSizes,
        *,
        width: int,
        dropout_rate: float,
        eps: float,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Makes what comes before the layers; `eps` is that of the norm."""
        super().__init__(settings, sizes, width=width, rngs=rngs, param_dtype=param_dtype)
        self.dropout_rate = dropout_rate
        self.norm = layer_norm(width, eps, self.dtype, param_dtype, rngs)

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """See `SequenceModel`. Columns of `gaps` after L are not used."""
        del lengths  # what follows a position changes nothing there
        h = self._embed(items, fold(dropout_seeds, 0))
        features = self._features(gaps[:, : items.shape[1]])
        for i, block in enumerate(self.blocks):
            h = block(h, features, segment_ids, fold(dropout_seeds, i + 1))
        return h

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See `SequenceModel`. The last layer computes only the last event of each row."""
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
        self, state: list, items: Int32[Array, " B"], gaps: Float[Array, " B"]
    ) -> tuple[list, Float[Array, "B D"]]:
        """See `SequenceModel`."""
        h, features, following = self._embed(items, None), self._features(gaps), []
        for block, layer in zip(self.blocks, state, strict=True):
            layer, h = block.step(layer, h, features)
            following.append(layer)
        return following, h

    def _features(self, gaps: Float[Array, "*batch"]) -> Float[Array, "*batch K"] | None:
        """What the layers learn about the gaps: nothing, unless a subclass says otherwise."""
        del gaps
        return None

    def _embed(self, items, seeds):
        return self.norm(dropout(self.item_embedding(items), self.dropout_rate, seeds))
