"""The size of the data, the size and cost of the model, as a run states them at its start."""

import jax
import jax.numpy as jnp
from flax import nnx

from tim4rec_jax.data import PackedBatches, TrainBatches


def describe_data(batches: TrainBatches | PackedBatches) -> str:
    """One line: users, items, samples and how they are batched."""
    dataset = batches.dataset
    return (
        f"{dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, "
        f"{batches.n_samples:,} training samples in {batches.batches_per_epoch:,} batches, "
        f"{batches.layout}; {dataset.split_in_words}"
    )


def flops_per_sample(graphdef: nnx.GraphDef, params: nnx.State, max_length: int) -> float:
    """Floating-point operations to score all items after one history of `max_length` events.

    Counted by XLA on the program before optimisation.
    """

    def scores(params, items, lengths, gaps):
        model = nnx.merge(graphdef, params)
        return model.encode(items, lengths, gaps) @ model.item_table().T

    history = jnp.zeros((1, max_length), jnp.int32)
    lengths = jnp.full((1,), max_length, jnp.int32)
    lowered = jax.jit(scores).lower(params, history, lengths, history.astype(jnp.float32))
    analysis = lowered.cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


def describe_model(graphdef: nnx.GraphDef, params: nnx.State, max_length: int) -> str:
    """One line: parameters and operations per sample."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    flops = flops_per_sample(graphdef, params, max_length)
    return f"model: {count:,} parameters, {flops / 1e6:,.1f} MFLOP per sample (forward)"
