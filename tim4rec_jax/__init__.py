"""TiM4Rec in JAX: a time-aware state-space-dual recommender (arXiv 2409.16182).

Importing this package imports no JAX: the data tools stay light. Start from

* `tim4rec_jax.ssd.ssd`: the structured state-space dual operation,
* `tim4rec_jax.layers`, `tim4rec_jax.models`: Flax NNX layers and models made of it,
* `tim4rec_jax.data`: prepared datasets, windows and batches,
* `train.py` and `eval.py` beside this package: the commands.

Dimension letters in every annotation: B batch, L length, D model width, H heads,
P head width, N state width, G groups, V items, K top-k.
"""

__version__ = "0.1.0"
