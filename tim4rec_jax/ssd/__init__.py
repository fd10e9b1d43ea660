"""The state-space dual (SSD) operator: one function, several implementations."""

from tim4rec_jax.ssd.api import IMPLEMENTATIONS, ssd, ssd_step
from tim4rec_jax.ssd.dispatch import compile_for

__all__ = ["IMPLEMENTATIONS", "compile_for", "ssd", "ssd_step"]
