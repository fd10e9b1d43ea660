"""The state-space dual (SSD) operator: one function, several implementations."""

from tim4rec_jax.ssd.api import IMPLEMENTATIONS, ssd, ssd_step
from tim4rec_jax.ssd.block import BLOCK_IMPLEMENTATIONS, time_aware_ssd_block
from tim4rec_jax.ssd.dispatch import compile_for

__all__ = [
    "BLOCK_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "compile_for",
    "ssd",
    "ssd_step",
    "time_aware_ssd_block",
]
