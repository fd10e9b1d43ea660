"""SSD4Rec*: TiM4Rec without time, as its authors re-implemented SSD4Rec to compare with."""

import jax.numpy as jnp
from flax import nnx

from tim4rec_jax.models.causal_tim4rec import CausalTiM4Rec


class SSD4Rec(CausalTiM4Rec):
    """Item embedding, dropout, norm; SSD blocks with feed-forward networks.

    Not the model of the SSD4Rec paper (arXiv 2409.01192), whose blocks read in both directions
    over rows of several histories: what TiM4Rec's comparison ran under that name.
    """

    def __init__(
        self, config, *, n_items: int, max_length: int, rngs: nnx.Rngs, param_dtype=jnp.float32
    ):
        """Initialises the weights; arguments as for `TiM4Rec`, less all that time needs."""
        super().__init__(
            {**config, "is_time": False, "knows_next_time": False},
            n_items=n_items,
            max_length=max_length,
            rngs=rngs,
            param_dtype=param_dtype,
        )
