"""Caser: convolutions over the history as an image (WSDM 2018), as RecBole has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers.basic import Dense, correlate, dropout, uniform
from tim4rec_jax.models.base import SequenceModel

_CHANNELS = 64  # of one convolution over windows of several heights


class Windows(nnx.Module):
    """The kernels of one height over all features, one position after another."""

    def __init__(self, kernel: Float[Array, "W D H"], bias: Float[Array, " H"]):
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw_windows(key, length: int, width: int, kernels: int, dtype):
    """Kernel and bias of every height, uniform as torch has it; drawn at once, compiled once."""
    sizes = [(height * width + 1) * kernels for height in range(1, length + 1)]
    parts = jnp.split(jax.random.uniform(key, (sum(sizes),), dtype, -1, 1), np.cumsum(sizes)[:-1])
    drawn = []
    for height, part in enumerate(parts, start=1):
        kernel, bias = jnp.split(part * (height * width) ** -0.5, [height * width * kernels])
        drawn.append((kernel.reshape(height, width, kernels), bias))
    return drawn


class Caser(SequenceModel):
    """Vertical and horizontal convolutions, two dense layers, a vector of the user.

    As published there is no mask: a history shorter than `max_length` is an image whose lower
    part repeats the vector of padding, and that vector is not zero, for the initialisation
    overwrites it and no lookup trains it. What a history is taken for thus depends on how long
    the rows are. States are not negative, and one a history, not one a position.
    """

    by_user = True

    def __init__(
        self,
        config,
        *,
        n_items: int,
        n_users: int,
        max_length: int,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
    ):
        """Initialises the weights as RecBole does.

        Args:
          config: embedding_size, nv and nh (vertical kernels, and horizontal ones a height),
            dropout_prob, reg_weight; dtype of the activations.
          n_items: number of items, without padding.
          n_users: number of users, without the unknown one.
          max_length: height of the image; the weights are tied to it.
          rngs: stream `params`.
          param_dtype: of parameters: float32, or float64 for parity.
        """
        width, length = config["embedding_size"], max_length
        self.dropout_rate, self.reg_weight = config["dropout_prob"], config["reg_weight"]
        table = nnx.initializers.normal(1 / width)
        kwargs = self.begin(config, width, n_items, max_length, rngs, param_dtype, table)
        self.user_embedding = nnx.Embed(n_users + 1, width, embedding_init=table, **kwargs)
        vertical = uniform(length**-0.5)
        self.vertical = Dense(
            length, config["nv"], kernel_init=vertical, bias_init=vertical, **kwargs
        )
        drawn = _draw_windows(rngs.params(), length, width, config["nh"], param_dtype)
        self.windows = nnx.List([Windows(kernel, bias) for kernel, bias in drawn])
        features, xavier = config["nv"] * width + config["nh"] * length, _xavier_normal
        self.fc1 = Dense(features, width, kernel_init=xavier, **kwargs)
        self.fc2 = Dense(2 * width, width, kernel_init=xavier, **kwargs)

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Caser has no such states.

        Raises:
          ValueError: always.
        """
        raise ValueError("Caser has one state a history, none for every position: use encode")

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        users: Int32[Array, "B"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See `SequenceModel`; `users` are rows of their table, 0 (all, if None) unknown ones."""
        del lengths, gaps
        if users is None:
            users = jnp.zeros(len(items), jnp.int32)
        items = jnp.pad(items, ((0, 0), (0, self.max_length - items.shape[1])))
        image = _looked_up(self.item_embedding, items)
        vertical = self.vertical(image.swapaxes(1, 2)).swapaxes(1, 2)  # [B,nv,D]
        seen = jnp.concatenate([vertical.reshape(len(items), -1), self._horizontal(image)], axis=1)
        h = jax.nn.relu(self.fc1(dropout(seen, self.dropout_rate, dropout_seeds)))
        user = _looked_up(self.user_embedding, users)
        return jax.nn.relu(self.fc2(jnp.concatenate([h, user], axis=1)))

    def penalty(self) -> Float[Array, ""]:
        """The norms, not squared, of all tables and kernels, times `reg_weight`."""
        tables = [self.user_embedding.embedding, self.item_embedding.embedding]
        layers = [self.vertical, self.fc1, self.fc2, *self.windows]
        weights = [*tables, *(layer.kernel for layer in layers)]
        norms = [jnp.sqrt(jnp.sum(jnp.square(weight[...]))) for weight in weights]
        return self.reg_weight * jnp.stack(norms).sum()

    def _horizontal(self, image: Float[Array, "B L D"]) -> Float[Array, "B F"]:
        """The largest response to every kernel of every height, by height.

        Several neighbouring heights at a time, their kernels completed with zeros at the end:
        one convolution with many channels instead of many with few.
        """
        length, kernels = self.max_length, self.windows[0].bias.shape[0]
        group = max(1, _CHANNELS // kernels)
        seen = []
        for first in range(0, length, group):
            windows = self.windows[first : first + group]
            lowest, highest = first + 1, first + len(windows)
            kernel = [
                jnp.pad(w.kernel[...], ((0, highest - w.kernel.shape[0]), (0, 0), (0, 0)))
                for w in windows
            ]
            kernel = jnp.concatenate(kernel, axis=2).astype(self.dtype)
            longer = jnp.pad(image, ((0, 0), (0, highest - lowest), (0, 0)))
            response = correlate(longer, kernel)
            heights = jnp.repeat(jnp.arange(lowest, highest + 1), kernels)
            fits = jnp.arange(response.shape[1])[:, None] + heights <= length
            largest = jnp.where(fits, response, -jnp.inf).max(axis=1)
            bias = jnp.concatenate([w.bias[...] for w in windows])
            seen.append(jax.nn.relu(largest + bias.astype(self.dtype)))
        return jnp.concatenate(seen, axis=1)


def _xavier_normal(key, shape, dtype=None, out_sharding=None):
    """Not truncated, as `nnx.initializers.glorot_normal` is."""
    return nnx.initializers.normal((2 / sum(shape)) ** 0.5)(key, shape, dtype)


def _looked_up(table: nnx.Embed, rows: Int32[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """Rows of a table, of which row 0 learns nothing from being looked up."""
    found = table(rows)
    return jnp.where((rows == 0)[..., None], jax.lax.stop_gradient(found), found)
