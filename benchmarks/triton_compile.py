"""What the compiler makes of the Triton kernels, for GPUs that need not be in this machine.

    python -m benchmarks.triton_compile [--capabilities 80 90] [--shapes 0 1] [--json]

A row for every kernel, shape and GPU: registers of a thread, bytes of spills, shared memory of a
program, kinds of instructions in the machine code, seconds to compile. "blocks" is positions of
a chunk / heads of a program / warps / stages. The kernels are those that `tim4rec_jax.ssd` would
launch, forward and backward, as in training (D, bias, softplus).
"""

import argparse
import functools
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia

from tim4rec_jax.ssd import compile_for, ssd, time_aware_ssd_block
from tim4rec_jax.ssd.shapes import BEAUTY, Shape
from tim4rec_jax.ssd.triton import launch as triton_launch
from tim4rec_jax.ssd.triton.launch import TileSizes


class Program(NamedTuple):
    """The op, or the block, at a shape and precision."""

    shape: Shape
    precision: str = "ieee"
    block: bool = False

    def abstract(self) -> tuple[Callable, dict]:
        """Returns the function, and the shapes of its inputs."""
        if self.block:
            settings = {"activation": "hardswish", "state": self.shape.state}
            return functools.partial(time_aware_ssd_block, **settings), self.shape.block_inputs()
        settings = {"dt_softplus": True, "precision": self.precision}
        return functools.partial(ssd, **settings), self.shape.op_inputs()


def programs() -> list[Program]:
    """Returns the op and the block at the released sizes and at wider ones."""

    def both(**sizes):
        return [BEAUTY._replace(batch=2, length=length, **sizes) for length in (50, 200)]

    half = {"dtype": "bfloat16"}
    wide = [{"width": 128, "state": 64}, {"heads": 8, "width": 64, "state": 64}]
    wide += [{"width": 128, "state": 128}]
    found = [Program(s) for s in both()] + [Program(s, "tf32") for s in both()]
    found += [Program(s) for s in both(**half)]
    found += [Program(s) for sizes in wide for s in (*both(**sizes), *both(**sizes, **half))]
    for sizes in ({}, half, {"width": 64, "state": 64}, {"width": 64, "state": 64, **half}):
        found += [Program(s, block=True) for s in both(**sizes)]
    return found


class Launch(NamedTuple):
    """What `tim4rec_jax.ssd.triton.launch.launch` was asked for."""

    kernel: Any
    signature: dict[str, str]
    specialisation: Any
    tiles: TileSizes


def launches(program: Program, capability: int) -> list[Launch]:
    """Returns what the gradient of the op or the block launches, forward and backward."""
    found = {}

    def record(kernel, inputs, outputs, *, programs, specialisation, tiles):
        types = [*map(_type, (*inputs, *outputs)), "constexpr"]
        signature = dict(zip(kernel.arg_names, types, strict=True))
        found[kernel.fn.__name__] = Launch(kernel, signature, specialisation, tiles)
        return [jnp.zeros(v.shape, v.dtype) for v in outputs]

    function, inputs = program.abstract()

    def total(inputs):
        return jnp.sum(function(**inputs, implementation="triton").astype(jnp.float32))

    with compile_for("gpu", capability), mock.patch.object(triton_launch, "launch", record):
        jax.eval_shape(jax.grad(total), inputs)
    return list(found.values())


def _type(value) -> str:
    names = {"float32": "fp32", "bfloat16": "bf16", "int32": "i32"}
    return "i32" if isinstance(value, int) else f"*{names[str(value.dtype)]}"


class Report(NamedTuple):
    """What a compiled kernel needs."""

    registers: int
    spills: int  # bytes of stores and loads
    shared: int  # bytes
    instructions: dict[str, int]
    seconds: float


def compile_kernel(launch: Launch, capability: int) -> Report:
    """Compiles to machine code and reads what the assembler says of it."""
    # As jax-triton does: all arrays begin at a multiple of 16 bytes.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(launch.signature.values())
        if kind.startswith("*")
    }
    source = triton.compiler.ASTSource(
        launch.kernel,
        signature=launch.signature,
        constexprs={"S": triton_launch.as_constants(launch.specialisation)},
        attrs=aligned,
    )
    start = time.perf_counter()
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": launch.tiles.warps,
            "num_stages": launch.tiles.stages,
            "enable_fp_fusion": True,
        },
    )
    seconds = time.perf_counter() - start
    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        (gpu,) = re.findall(r"^\.target (\w+)", compiled.asm["ptx"], re.M)
        said = subprocess.run(
            [tools / "ptxas", "-v", f"--gpu-name={gpu}", ptx, "-o", cubin],
            check=True,
            capture_output=True,
            text=True,
        ).stderr
        code = subprocess.run(
            [tools / "cuobjdump", "--dump-sass", cubin], check=True, capture_output=True, text=True
        ).stdout
    (registers,) = re.findall(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    operations = re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?(\w+)", code, re.M)
    kinds = ("FFMA", "HMMA", "HGMMA", "LDS", "STS", "LDG", "STG", "BAR", "MUFU")
    counts = {kind: sum(o == kind for o in operations) for kind in kinds}
    return Report(
        int(registers),
        sum(map(int, spills)),
        compiled.metadata.shared,
        {kind: count for kind, count in counts.items() if count} | {"all": len(operations)},
        seconds,
    )


def rows(chosen: list[Program], capabilities: list[int]) -> Iterator[dict]:
    """Compiles the kernels of all programs for all GPUs."""
    for capability in capabilities:
        for program in chosen:
            sizes = program.shape._asdict()
            del sizes["name"], sizes["batch"]
            for launch in launches(program, capability):
                yield {
                    "kernel": launch.kernel.fn.__name__,
                    "sm": capability,
                    **sizes,
                    "precision": launch.specialisation.PRECISION,
                    "blocks": "/".join(map(str, launch.tiles)),
                    **compile_kernel(launch, capability)._asdict(),
                }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_compile")
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--shapes", type=int, nargs="+", help="numbers in the list of programs")
    parser.add_argument("--json", action="store_true", help="print one line of JSON per kernel")
    flags = parser.parse_args()
    chosen = programs() if flags.shapes is None else [programs()[i] for i in flags.shapes]
    found = rows(chosen, flags.capabilities)
    if flags.json:
        for row in found:
            print(json.dumps(row), flush=True)
        return
    print(f"triton {triton.__version__}, jax {jax.__version__}\n")
    for i, row in enumerate(found):
        row["seconds"] = round(row["seconds"], 1)
        row["instructions"] = " ".join(f"{k} {v}" for k, v in row["instructions"].items())
        if i == 0:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)


if __name__ == "__main__":
    main()
