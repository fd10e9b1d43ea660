"""The state of a training, and the optimizer of all parameters but rows of items."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct

from tim4rec_jax import item_rows
from tim4rec_jax.runtime import put
from tim4rec_jax.training.row_optimizers import OPTIMIZERS, ByRow


@struct.dataclass
class TrainState:
    """Everything that changes while training; every step is given it and takes its memory.

    Attributes:
      step: number of updates made, int32.
      params: the model's parameters, an `nnx.State`. What it knows of the items' features is
        among them, and stays as it is.
      opt_state: the state of the optimizer.
      rng: the key from which the random numbers of every step are derived.
      loss_sum: sum over the running epoch of weight times loss, float32.
      weight_sum: sum over the running epoch of the weights, float32.
      bad_step: the first step whose loss or gradient was not finite, or -1, int32. Parameters and
        optimizer stay as they were before that step.
    """

    # `Any`, because `jax.eval_shape` puts shapes in the place of arrays.
    step: Any
    params: Any
    opt_state: Any
    rng: Any
    loss_sum: Any
    weight_sum: Any
    bad_step: Any


def init_state(
    params: nnx.State, tx: optax.GradientTransformation, seed: int, by_row: ByRow | None = None
) -> TrainState:
    """The state before the first step; arguments are those of `StepSettings`."""
    changed = trained(params)[0]
    opt_state = tx.init(changed)
    if by_row is not None and by_row.optimizer is not None:
        changed, tables = item_rows.split(changed, by_row.names)
        init = OPTIMIZERS[by_row.optimizer].init
        opt_state = {"dense": tx.init(changed), "tables": {n: init(x) for n, x in tables.items()}}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=opt_state,
        rng=jax.random.key(seed),
        loss_sum=jnp.zeros((), jnp.float32),
        weight_sum=jnp.zeros((), jnp.float32),
        bad_step=jnp.full((), -1, jnp.int32),
    )


def trained(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """The parameters that training changes, and the arrays that it does not."""
    changed, fixed = nnx.split_state(params, nnx.Param, ...)
    return changed, fixed


def start_epoch(state: TrainState) -> TrainState:
    """The same state, with the loss of an epoch that has not begun yet."""
    zeros = np.zeros((), np.float32), np.zeros((), np.float32)
    loss_sum, weight_sum = put(zeros, state.loss_sum.sharding)
    return dataclasses.replace(state, loss_sum=loss_sum, weight_sum=weight_sum)


@functools.cache  # compiled steps are found by the identity of the function
def make_schedule(
    learning_rate: float, cosine_steps: int | None = None, warmup_steps: int = 0
) -> optax.ScalarOrSchedule:
    """The learning rate of each step.

    Args:
      learning_rate: that of the first step.
      cosine_steps: number of steps in which the learning rate falls to 0 along a cosine. None: the
        learning rate is constant.
      warmup_steps: number of steps in which the learning rate rises linearly to what it is
        otherwise. 0: it does not.
    """
    rate: optax.ScalarOrSchedule = learning_rate
    if cosine_steps is not None:
        rate = optax.cosine_decay_schedule(learning_rate, cosine_steps)
    if warmup_steps:
        warm = rate if callable(rate) else optax.constant_schedule(rate)
        rate = lambda step: warm(step) * jnp.minimum((step + 1) / warmup_steps, 1.0)  # noqa: E731
    return rate


@functools.cache  # compiled steps are found by the identity of the optimizer
def make_optimizer(
    learning_rate: float,
    weight_decay: float,
    cosine_steps: int | None = None,
    warmup_steps: int = 0,
) -> optax.GradientTransformation:
    """Adam as the published code uses it: weight decay is added to the gradient.

    Args:
      learning_rate: as for `make_schedule`, and so are the others.
      weight_decay: factor of the parameters in what is added to their gradient.
      cosine_steps: number of steps until the learning rate is 0.
      warmup_steps: number of steps in which it rises.
    """
    rate = make_schedule(learning_rate, cosine_steps, warmup_steps)
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(rate))
