"""Caser: convolutions over the history as an image (WSDM 2018), as RecBole has it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers.basic import Dense, dropout, uniform
from tim4rec_jax.layers.lookup import Embedding, without_padding
from tim4rec_jax.models.base import DataSizes, ModelSettings, SequenceModel, not_negative, rate

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


@dataclasses.dataclass(frozen=True)
class CaserSettings(ModelSettings):
    """Names are RecBole's; defaults are those of TiM4Rec's comparison.

    Attributes:
      embedding_size: D, the width of the vectors of items and users.
      nv: number of vertical kernels.
      nh: number of horizontal kernels of each height.
      dropout_prob: of the responses of all kernels.
      reg_weight: of the norms that `penalty` adds up.
    """

    embedding_size: int = 64
    nv: int = 4
    nh: int = 8
    dropout_prob: float = rate(0.2)
    reg_weight: float = not_negative(1e-4)


class Caser(SequenceModel):
    """Vertical and horizontal convolutions, two dense layers, a vector of the user.

    As published there is no mask. A history shorter than `max_length` is an image whose lower part
    repeats the vector of padding. That vector is not zero, because the initialisation overwrites it
    and no lookup trains it. The state of a history therefore depends on `max_length`. States are
    not negative, and there is one for a history, not one for each position.
    """

    Settings = CaserSettings
    needs_users = True
    item_rows = ()  # `penalty` needs the whole table

    def __init__(
        self,
        settings: CaserSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Initialises the weights as RecBole does; arguments as `SequenceModel`.

        The weights depend on `sizes.max_length`, the height of the image.
        """
        width, length = settings.embedding_size, sizes.max_length
        if length > 1000:  # a convolution for each height of a window, up to the whole history
            raise ValueError(f"caser takes histories of up to 1000 events, not {length}")
        table = nnx.initializers.normal(1 / width)
        super().__init__(
            settings, sizes, width=width, rngs=rngs, param_dtype=param_dtype, embedding_init=table
        )
        self.dropout_rate, self.reg_weight = settings.dropout_prob, settings.reg_weight
        kwargs: dict[str, Any] = dict(dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        self.user_embedding = Embedding(sizes.n_users + 1, width, embedding_init=table, **kwargs)
        vertical = uniform(length**-0.5)
        self.vertical = Dense(
            length, settings.nv, kernel_init=vertical, bias_init=vertical, **kwargs
        )
        drawn = _draw_windows(rngs.params(), length, width, settings.nh, param_dtype)
        self.windows = nnx.List([Windows(kernel, bias) for kernel, bias in drawn])
        features, xavier = settings.nv * width + settings.nh * length, _xavier_normal
        self.fc1 = Dense(features, width, kernel_init=xavier, **kwargs)
        self.fc2 = Dense(2 * width, width, kernel_init=xavier, **kwargs)

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Caser has no such states.

        Raises:
          ValueError: always.
        """
        raise ValueError("Caser has one state a history, none for every position: use encode")

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        users: Int32[Array, " B"] | None = None,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See `SequenceModel`; `users` are rows of their table, 0 (all, if None) unknown ones."""
        del lengths, gaps
        if users is None:
            users = jnp.zeros(len(items), jnp.int32)
        items = jnp.pad(items, ((0, 0), (0, self.max_length - items.shape[1])))
        image = without_padding(self.item_embedding(items), items)
        vertical = self.vertical(image.swapaxes(1, 2)).swapaxes(1, 2)  # [B,nv,D]
        seen = jnp.concatenate([vertical.reshape(len(items), -1), self._horizontal(image)], axis=1)
        h = jax.nn.relu(self.fc1(dropout(seen, self.dropout_rate, dropout_seeds)))
        user = without_padding(self.user_embedding(users), users)
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


def _plain_correlate(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )


@jax.custom_vjp
def correlate(x: Float[Array, "B L D"], kernel: Float[Array, "W D C"]) -> Float[Array, "B P C"]:
    """y[b, p] = sum_w x[b, p + w] kernel[w], for the P = L - W + 1 positions that fit.

    Both gradients are written as convolutions in the same layout. XLA:CPU has a fast convolution
    for it, and takes five times as long for the gradients that it derives by itself.
    """
    return _plain_correlate(x, kernel)


def _correlate_forward(x, kernel):
    return _plain_correlate(x, kernel), (x, kernel)


def _correlate_backward(residuals, d_y):
    x, kernel = residuals
    # The rows, over which the gradient is summed, take the place of the features.
    d_kernel = _plain_correlate(x.transpose(2, 1, 0), d_y.swapaxes(0, 1)).swapaxes(0, 1)
    width, positions = kernel.shape[0], d_y.shape[1]
    # A full convolution. The shorter of the two is its kernel, so that the padding is short.
    if width <= positions:
        d_x = _plain_correlate(_padded(d_y, width), kernel[::-1].swapaxes(1, 2))
    else:
        signal, taps = kernel.transpose(1, 0, 2), d_y[:, ::-1].transpose(1, 2, 0)
        d_x = _plain_correlate(_padded(signal, positions), taps).transpose(2, 1, 0)
    return d_x, d_kernel


def _padded(x, width: int):
    return jnp.pad(x, ((0, 0), (width - 1, width - 1), (0, 0)))


correlate.defvjp(_correlate_forward, _correlate_backward)
