"""GRU4Rec: a gated recurrent network (arXiv 1511.06939), as RecBole has it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers.basic import Dense, dropout, take_position, uniform
from tim4rec_jax.layers.gru import GRU
from tim4rec_jax.models.base import SequenceModel


class GRU4Rec(SequenceModel):
    """Item embedding, dropout, stacked GRUs without biases, one dense layer.

    As published for this comparison it takes every prefix of a history for a sample of its own
    and trains with the full softmax: neither the sessions in parallel nor the ranking losses of
    the paper. There is no dropout between or after the GRUs.
    """

    causal = supports_step = True

    def __init__(
        self, config, *, n_items: int, max_length: int, rngs: nnx.Rngs, param_dtype=jnp.float32
    ):
        """Initialises the weights as RecBole does: Xavier for the table and the first GRU only.

        Args:
          config: embedding_size, hidden_size (of the GRUs), num_layers, dropout_prob; dtype of
            the activations, the states staying in float32.
          n_items: number of items, without padding.
          max_length: longest history; no weight depends on it.
          rngs: stream `params`.
          param_dtype: of parameters: float32, or float64 for parity.
        """
        width, hidden = config["embedding_size"], config["hidden_size"]
        self.dropout_rate, self.param_dtype = config["dropout_prob"], param_dtype
        table = nnx.initializers.normal((2 / (n_items + 1 + width)) ** 0.5)
        kwargs = self.begin(config, width, n_items, max_length, rngs, param_dtype, table)
        default = uniform(hidden**-0.5)  # torch's own, of all but the first layer
        inits = [nnx.initializers.glorot_uniform(), *[default] * (config["num_layers"] - 1)]
        self.blocks = nnx.List(
            [
                GRU(hidden if i else width, hidden, init=init, **kwargs)
                for i, init in enumerate(inits)
            ]
        )
        self.dense = Dense(hidden, width, kernel_init=default, bias_init=default, **kwargs)

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """See `SequenceModel`; time is not used."""
        del lengths, gaps
        return self.dense(self._states(items, segment_ids, dropout_seeds))

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See `SequenceModel`."""
        states = self._states(items, None, dropout_seeds)
        return self.dense(take_position(states, lengths - 1))

    def init_state(self, batch: int) -> list[jax.Array]:
        """See `SequenceModel`."""
        width = self.blocks[0].recurrent.shape[0]
        return [jnp.zeros((batch, width), self.param_dtype) for _ in self.blocks]

    def step(
        self, state: list[jax.Array], items: Int32[Array, "B"], gaps: Float[Array, "B"]
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
            starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]).T != 0
        for block in self.blocks:
            h = block(h, starts)
        return h.swapaxes(0, 1)
