"""The masks of a model are those its layers mix with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small_models import jit, small_model
from tim4rec_jax import config as config_lib
from tim4rec_jax.layers import CausalSSD, TimeAwareSSD
from tim4rec_jax.ssd import ssd
from tim4rec_jax.ssd.reference import decay_mask

LENGTH, LENGTHS = 6, [6, 4]


def test_mask_is_the_op_written_out():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 4, 3)), jnp.float32)
    dt = jnp.asarray(rng.uniform(0.1, 1, (2, 7, 4)), jnp.float32)
    B, C = (jnp.asarray(rng.normal(size=(2, 7, 1, 5)), jnp.float32) for _ in range(2))
    A = -np.arange(1, 5, dtype=np.float32)

    @jax.jit
    def mask_and_outputs(x, dt, A, B, C):
        mask = decay_mask(dt, dt * A)
        content = jnp.einsum("blgn,bsgn->bls", C, B)[:, None]
        return mask, jnp.einsum("bhls,bshp->blhp", mask * content, x), ssd(x, dt, A, B, C)

    mask, y, expected = mask_and_outputs(x, dt, A, B, C)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert not np.triu(mask, 1).any()


@pytest.mark.parametrize(
    ("encoding", "is_time"), [("paper", True), ("causal", True), ("causal", False)]
)
def test_layers_mix_with_their_masks(encoding, is_time, monkeypatch):
    config = config_lib.default().model
    config.update(hidden_size=16, head_dim=8, d_state=4, num_layers=2)
    config.update(time_encoding=encoding, is_time=is_time)
    graph, params = small_model(config, spread=0.3, n_items=20, max_length=LENGTH)
    rng = np.random.default_rng(1)
    items = rng.integers(1, 21, (2, LENGTH), np.int32)
    gaps = rng.integers(0, 10**6, (2, LENGTH)).astype(np.float32)
    gaps[:, 0] = 0
    inputs = items, np.array(LENGTHS, np.int32), gaps

    calls = []
    layer = CausalSSD if encoding == "causal" else TimeAwareSSD
    forward = layer.__call__

    def recorded(self, *args):
        calls.append((self, args, forward(self, *args)))
        return calls[-1][2]

    @jit
    def masks_and_outputs(graph, params, *inputs):
        model = nnx.merge(graph, params)
        masks = model.masks(*inputs)
        calls.clear()  # `masks` calls the layers, too
        model(*inputs)
        return [
            (mask, mixed(ssd_layer, h, time, mask), output)
            for mask, (ssd_layer, (h, time, *_), output) in zip(masks, calls, strict=True)
        ]

    monkeypatch.setattr(layer, "__call__", recorded)
    found = masks_and_outputs(graph, params, *inputs)
    assert len(found) == 2
    for mask, by_mask, output in found:
        assert mask.shape == (2, 4, LENGTH, LENGTH)
        np.testing.assert_allclose(by_mask, output, atol=1e-5)


def mixed(layer, h, time, mask):
    """A layer's output by way of its mask."""
    if isinstance(layer, CausalSSD):
        h = h if time is None else h + time.inputs
        z, inner, _ = layer._split(layer.in_proj(h))
        x, B, C = layer.op_inputs(layer.conv(inner))
    else:
        z, inner = jnp.split(layer.in_proj(h), [layer.inner], axis=-1)
        x, B, C, _ = layer._inputs(inner, time)
    content = jnp.einsum("blgn,bsgn->bls", C, B)[:, None]
    y = jnp.einsum("bhls,bshp->blhp", mask * content, x) + layer.D[...][:, None] * x
    return layer.output(y, z)
