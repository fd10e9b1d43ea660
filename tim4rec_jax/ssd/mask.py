"""The structured masked matrix itself, which the fast forms of the op never write down."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def decay_mask(
    step: Float[Array, "B L H"], log_decay: Float[Array, "B L H"]
) -> Float[Array, "B H L L"]:
    """What event s counts for in event l before either's content: exp(decay from s to l) step[s].

    With it the op is y[l] = sum over s <= l of mask[l,s] (C[l] . B[s]) x[s] (Mamba-2, arXiv
    2405.21060, section 3; the time-aware mask of arXiv 2409.16182, section 3.3). Quadratic in L.

    Args:
      step: step sizes, after softplus.
      log_decay: log of each event's decay, <= 0.

    Returns:
      A lower triangle, the rest 0.
    """
    total = jnp.cumsum(log_decay, axis=1).swapaxes(1, 2)
    past = jnp.tril(jnp.ones((total.shape[-1],) * 2, bool))
    between = jnp.where(past, total[..., :, None] - total[..., None, :], -jnp.inf)
    return jnp.exp(between) * step.swapaxes(1, 2)[..., None, :]
