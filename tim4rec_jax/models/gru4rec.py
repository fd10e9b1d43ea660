"""GRU4Rec: a gated recurrent network (arXiv 1511.06939), as RecBole has it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers.basic import Dense, dropout, take_position, uniform
from tim4rec_jax.layers.gru import GRU
from tim4rec_jax.models.base import DataSizes, ModelSettings, SequenceModel, count, rate
from tim4rec_jax.ssd import finite_inputs, segments


@dataclasses.dataclass(frozen=True)
class GRU4RecSettings(ModelSettings):
    """Names are RecBole's; defaults are those of TiM4Rec's comparison.

    Attributes:
      embedding_size: D, the width of the item vectors.
      hidden_size: H, the width of the states.
      num_layers: number of GRUs.
      dropout_prob: of the item vectors.
    """

    embedding_size: int = 64
    hidden_size: int = 128
    num_layers: int = count(2)
    dropout_prob: float = rate(0.4)


class GRU4Rec(SequenceModel):
    """Item embedding, dropout, stacked GRUs without biases, one dense layer.

    As in TiM4Rec's comparison, every prefix of a history is a sample of its own and the loss is the
    full softmax. The paper has sessions in parallel and ranking losses instead. There is no dropout
    between or after the GRUs.
    """

    Settings = GRU4RecSettings
    causal = supports_step = True

    def __init__(
        self,
        settings: GRU4RecSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Initialises the weights as RecBole does: Xavier for the table and the first GRU only.

        Arguments are those of `SequenceModel`. States are kept in the dtype of the parameters.
        """
        width, hidden = settings.embedding_size, settings.hidden_size
        table = nnx.initializers.normal((2 / (sizes.n_items + 1 + width)) ** 0.5)
        super().__init__(
            settings, sizes, width=width, rngs=rngs, param_dtype=param_dtype, embedding_init=table
        )
        self.dropout_rate, self.param_dtype = settings.dropout_prob, param_dtype
        kwargs: dict[str, Any] = dict(dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        torch_default = uniform(hidden**-0.5)  # of all layers but the first
        first = GRU(width, hidden, init=nnx.initializers.glorot_uniform(), **kwargs)
        others = range(settings.num_layers - 1)
        self.blocks = nnx.List(
            [first, *(GRU(hidden, hidden, init=torch_default, **kwargs) for _ in others)]
        )
        self.dense = Dense(
            hidden, width, kernel_init=torch_default, bias_init=torch_default, **kwargs
        )

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """See `SequenceModel`; time is not used."""
        del lengths, gaps
        return self.dense(self._states(items, segment_ids, dropout_seeds))

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See `SequenceModel`."""
        states = self._states(items, None, dropout_seeds)
        return self.dense(take_position(states, lengths - 1))

    def init_state(self, batch: int) -> list[jax.Array]:
        """See `SequenceModel`."""
        width = self.blocks[0].recurrent.shape[0]
        return [jnp.zeros((batch, width), self.param_dtype) for _ in self.blocks]

    def step(
        self, state: list[jax.Array], items: Int32[Array, " B"], gaps: Float[Array, " B"]
    ) -> tuple[list[jax.Array], Float[Array, "B D"]]:
        """See `SequenceModel`."""
        del gaps
        h, following = self.item_embedding(items), []
        for block, before in zip(self.blocks, state, strict=True):
            h = block.step(before, h)
            following.append(h)
        return following, self.dense(h)

    def _states(self, items, segment_ids, seeds) -> Float[Array, "B L H"]:
        h = dropout(self.item_embedding(items), self.dropout_rate, seeds).swapaxes(0, 1)
        starts = None
        if segment_ids is not None:
            starts = segments.starts(segment_ids).T
        with finite_inputs():
            for block in self.blocks:
                h = block(h, starts)
        return h.swapaxes(0, 1)
