"""Flax NNX layers made of the SSD op."""

from tim4rec_jax.layers.block import Block, FeedForward
from tim4rec_jax.layers.causal import CausalBlock, CausalSSD, GapModulator, gap_features
from tim4rec_jax.layers.convolution import CausalConv
from tim4rec_jax.layers.dropout import dropout, row_seeds
from tim4rec_jax.layers.time_aware_ssd import TimeAwareSSD
from tim4rec_jax.layers.time_stream import TimeEncoder, TimeMixer

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
