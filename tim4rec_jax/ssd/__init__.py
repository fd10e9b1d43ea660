"""The state-space dual (SSD) operator: one function, several implementations."""

from tim4rec_jax.ssd.api import IMPLEMENTATIONS, ssd, ssd_step

__all__ = ["IMPLEMENTATIONS", "ssd", "ssd_step"]
