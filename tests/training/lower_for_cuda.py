"""Prints what is in a training step that is lowered for an NVIDIA GPU, as JSON.

`kernels` are the names of the Triton kernels, and `unsafe` tells what would keep the step out of a
CUDA graph, make the device wait for the host, or leave other bits in every run.

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
from tim4rec_jax.training.state import init_state, make_optimizer
from tim4rec_jax.training.step import StepSettings, train_step

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
    kernels, unsafe = [], []
    # jax-triton 0.4 calls it `triton_kernel_call_ffi`, and what it holds `opaque`.
    call = r'@triton_kernel_call\w*\(.*?(?:backend_config|opaque) = "((?:\\.|[^"\\])+)"'
    for packed in re.findall(call, text):
        raw = re.sub(
            rb"\\([0-9A-Fa-f]{2}|.)",
            lambda m: bytes.fromhex(m[1].decode()) if len(m[1]) == 2 else m[1],
            packed.encode(),
        )
        raw = zlib.decompress(raw)
        kernels += [name.decode() for name in re.findall(rb"ssd_\w+", raw)[:1]]
        # The message begins with the field of a plain kernel. One that is tuned at its first call
        # begins with another: it is timed with events, which no graph can record.
        if raw[0] != 0x0A:
            unsafe.append(f"a kernel call that begins with {raw[0]}")
    # Calls of the host, choices that the host decides about, sums in the order of threads.
    calls = set(re.findall(r"custom_call @(\w+)", text))
    unsafe += sorted(c for c in calls if "callback" in c)
    unsafe += ["stablehlo.case"] * text.count("stablehlo.case")
    scatters = re.findall(r'"stablehlo.scatter".*?<\{(.*?)\}>', text)
    unsafe += ["a scatter to equal places"] * sum(
        "unique_indices = true" not in s for s in scatters
    )
    print(json.dumps({"kernels": kernels, "unsafe": unsafe, "scatters": len(scatters)}))


if __name__ == "__main__":
    main()
