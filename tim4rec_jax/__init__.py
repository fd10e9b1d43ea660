"""TiM4Rec in JAX: a time-aware state-space-dual recommender (arXiv 2409.16182).

Importing this package imports no JAX: the data tools stay light. Start from

* `tim4rec_jax.ssd.ssd`: the structured state-space dual operation,
* `tim4rec_jax.layers`, `tim4rec_jax.models`: Flax NNX layers and models made of it,
* `tim4rec_jax.data`: prepared datasets, windows and batches,
* `train.py` and `eval.py` beside this package: the commands,
* `prepare`, `fit` and `load` of this module: all of it in one call each, see `tim4rec_jax.api`.

Dimension letters in every annotation: B batch, L length, D model width, H heads,
P head width, N state width, G groups, V items, K top-k.
"""

__version__ = "0.1.0"

_CALLS = ("prepare", "fit", "load", "Data", "Model")


def __getattr__(name: str):
    """Imports the calls when they are asked for."""
    if name not in _CALLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("tim4rec_jax.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *_CALLS]
