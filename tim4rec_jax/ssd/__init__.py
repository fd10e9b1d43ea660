"""The state-space dual (SSD) operator: one function, several implementations."""

from tim4rec_jax.runtime import compile_for
from tim4rec_jax.ssd.api import IMPLEMENTATIONS, ssd, ssd_step
from tim4rec_jax.ssd.finite import finite_inputs
from tim4rec_jax.ssd.fused_block import BLOCK_IMPLEMENTATIONS, time_aware_ssd_block

__all__ = [
    "BLOCK_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "compile_for",
    "finite_inputs",
    "ssd",
    "ssd_step",
    "time_aware_ssd_block",
]
