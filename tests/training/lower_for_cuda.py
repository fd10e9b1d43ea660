"""Prints the names of the kernels in a training step that is lowered for an NVIDIA GPU.

A process of its own: the plugin that lowering needs prints to every program that finds it, and
Triton's interpreter must be off. Triton is made to look like version 3.6, which lacks a name that
jax-triton 0.4 asks for.
"""

import json
import re
import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from triton.backends.nvidia import driver

from tests.training.tiny_run import MAX_LENGTH, tiny_config
from tim4rec_jax.models import build
from tim4rec_jax.ssd import compile_for
from tim4rec_jax.training.step import StepSettings, init_state, make_optimizer, train_step

ROWS = 16


def main():
    """Lowers the step of a model whose sizes the kernels support."""
    vars(driver).pop("TMA_TF32", None)
    config = tiny_config("none").model
    config.update(hidden_size=32, head_dim=16, d_state=16, num_layers=2)
    graphdef, params = nnx.split(build(config, n_items=30, max_length=MAX_LENGTH))
    tx = make_optimizer(1e-3, 0.0)
    batch = {
        "items": jax.ShapeDtypeStruct((ROWS, MAX_LENGTH), jnp.int32),
        "lengths": jax.ShapeDtypeStruct((ROWS,), jnp.int32),
        "gaps": jax.ShapeDtypeStruct((ROWS, MAX_LENGTH), jnp.float32),
        "targets": jax.ShapeDtypeStruct((ROWS,), jnp.int32),
        "weights": jax.ShapeDtypeStruct((ROWS,), jnp.float32),
    }
    with compile_for("gpu", 90):
        traced = train_step.trace(init_state(params, tx, 0), batch, StepSettings(graphdef, tx))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    names = []
    # jax-triton 0.4 calls it `triton_kernel_call_ffi`, and what it holds `opaque`.
    call = r'@triton_kernel_call\w*\(.*?(?:backend_config|opaque) = "((?:\\.|[^"\\])+)"'
    for packed in re.findall(call, text):
        raw = re.sub(
            rb"\\([0-9A-Fa-f]{2}|.)",
            lambda m: bytes.fromhex(m[1].decode()) if len(m[1]) == 2 else m[1],
            packed.encode(),
        )
        names += re.findall(rb"ssd_\w+", zlib.decompress(raw))[:1]
    print(json.dumps([name.decode() for name in names]))


if __name__ == "__main__":
    main()
