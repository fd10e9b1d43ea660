"""Flax NNX layers made of the SSD op."""

from tim4rec_jax.layers.basic import CausalConv, dropout, row_seeds
from tim4rec_jax.layers.block import Block, CausalBlock, FeedForward
from tim4rec_jax.layers.ssd import CausalSSD, TimeAwareSSD
from tim4rec_jax.layers.time import GapModulator, TimeEncoder, TimeMixer, gap_features

__all__ = [
    "Block",
    "CausalBlock",
    "CausalConv",
    "CausalSSD",
    "FeedForward",
    "GapModulator",
    "TimeAwareSSD",
    "TimeEncoder",
    "TimeMixer",
    "dropout",
    "gap_features",
    "row_seeds",
]
