"""The jitted training step: gradients over micro-batches, one optimizer update."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from tim4rec_jax.layers import row_seeds
from tim4rec_jax.ssd.dispatch import target
from tim4rec_jax.training.cloze import mask_batch
from tim4rec_jax.training.cross_entropy import full_cross_entropy
from tim4rec_jax.training.losses import Loss, SummedLoss
from tim4rec_jax.training.objective import OBJECTIVES

Batch = dict[str, jax.Array]
CROSS_ENTROPY = Loss()


@struct.dataclass
class TrainState:
    """Everything that changes while training; one pytree, donated to every step.

    Attributes:
      step: updates made so far, int32.
      params: the model's parameters (`nnx.State`).
      opt_state: optax state.
      rng: key the dropout seeds of every step are folded from.
      loss_sum, weight_sum: of the running epoch, float32; their ratio is its mean loss.
      bad_step: the first step whose loss or gradient was not finite, or -1. The
        parameters stay as they were before that step, and so does everything after it.
    """

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    rng: jax.Array
    loss_sum: jax.Array
    weight_sum: jax.Array
    bad_step: jax.Array


def init_state(params: nnx.State, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        rng=jax.random.key(seed),
        loss_sum=jnp.zeros((), jnp.float32),
        weight_sum=jnp.zeros((), jnp.float32),
        bad_step=jnp.full((), -1, jnp.int32),
    )


@functools.cache  # the same one again lets another run in this process keep compiled code
def make_optimizer(
    learning_rate: float, weight_decay: float, cosine_steps: int | None = None
) -> optax.GradientTransformation:
    """Adam as the reference uses it: weight decay, if any, is added to the gradient.

    Args:
      learning_rate: of the first step.
      weight_decay: weight of the squared norm of all parameters, halved.
      cosine_steps: the learning rate falls along a cosine to 0 in so many steps; None: never.
    """
    rate: optax.ScalarOrSchedule = learning_rate
    if cosine_steps is not None:
        rate = optax.cosine_decay_schedule(learning_rate, cosine_steps)
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(rate))


def micro_count(rows: int, length: int, devices: int) -> int:
    """How many micro-batches to cut a batch of `rows` histories of `length` into.

    On CPU as many as bring one down to 3,072 events and 128 rows of scores, which is where
    its temporaries fit a cache (see `loss_and_gradients`); one on other devices. Each
    keeps at least 8 rows per device.
    """
    if target().platform != "cpu":
        return 1
    largest = min(3072 // length, 128)
    count = 1
    while (
        rows // count > largest
        and rows % (2 * count * devices) == 0
        and rows // (2 * count) >= 8 * devices
    ):
        count *= 2
    return count


def micro_batches(rows: Any, count: int) -> Any:
    """Splits every array [B, ...] of a tree into [count, B / count, ...].

    Row i goes to micro-batch i % count: with the rows of a batch laid out over devices in
    contiguous blocks, every micro-batch then has its share of rows on every device.
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), rows
    )


def loss_and_gradients(
    graphdef,
    params,
    batch: Batch,
    seeds: jax.Array,
    micro: int,
    objective: str = "prefix",
    loss: SummedLoss = full_cross_entropy,
):
    """Mean loss of a batch and its gradient, `micro` micro-batches one after the other.

    On CPU a step's temporaries are fresh pages every time, and touching them costs more
    than computing with them: small micro-batches keep them in cache. Values do not depend
    on `micro` but for the order of summation.
    """
    total = jnp.maximum(batch["weights"].sum(), 1.0)

    def loss_fn(params, rows, seeds):
        return OBJECTIVES[objective](nnx.merge(graphdef, params), rows, seeds, loss) / total

    if micro == 1:
        return jax.value_and_grad(loss_fn)(params, batch, seeds)

    def accumulate(carry, rows):
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss_fn)(params, *rows)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(accumulate, zero, micro_batches((batch, seeds), micro))[0]


def update(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    micro: int,
    objective: str = "prefix",
    loss: Loss = CROSS_ENTROPY,
    up_to: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Args:
      state: before; donated by `train_step`, which is this, compiled.
      batch: what the objective takes.
      graphdef: the model's structure.
      tx: the optimizer.
      micro: number of micro-batches; divides B.
      objective: a name in `tim4rec_jax.training.objective.OBJECTIVES`.
      loss: how states are held against targets.
      up_to: see `tim4rec_jax.training.losses.Loss.prepare`.

    Returns:
      The next state, and for the log the mean `loss` of the epoch so far and `bad_step`, in
      arrays of their own that outlive the state.
    """
    key = jax.random.fold_in(state.rng, state.step)
    seeds = row_seeds(key, batch["targets"].shape[0])
    model: Any = nnx.merge(graphdef, state.params)
    summed = loss.prepare(jax.random.fold_in(key, 1), model.n_items, up_to)
    if objective == "cloze":  # before the batch is cut: its targets are counted as a whole
        batch = mask_batch(model, batch, jax.random.fold_in(key, 2))
    value, grads = loss_and_gradients(
        graphdef, state.params, batch, seeds, micro, objective, summed
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads))]).all()
    good = finite & (state.bad_step < 0)
    new = (params, opt_state)
    old = (state.params, state.opt_state)
    params, opt_state = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    weight = batch["weights"].sum()
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        loss_sum=state.loss_sum + value * weight,
        weight_sum=state.weight_sum + weight,
        bad_step=jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step),
    )
    loss_so_far = state.loss_sum / jnp.maximum(state.weight_sum, 1.0)
    metrics = {"loss": loss_so_far, "bad_step": state.bad_step}
    return state, jax.tree.map(lambda x: x + 0, metrics)


train_step = jax.jit(
    update, static_argnames=("graphdef", "tx", "micro", "objective", "loss"), donate_argnums=0
)
