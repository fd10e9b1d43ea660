"""What the compiler makes of the Triton kernels, for GPUs that need not be in this machine.

    python -m benchmarks.triton_compile [--capabilities 80 90] [--shapes 0 1] [--json]

A row for every kernel, shape and GPU: registers of a thread, bytes of spills, shared memory of a
program, programs that fit a multiprocessor at once, instructions that the warps of a program issue,
by kind, seconds to compile. "blocks" is positions of a chunk / heads of a program / warps / stages.
The kernels are those that `tim4rec_jax.ssd` would launch, forward and backward, as in training (D,
bias, softplus).

Two bounds say what the time of a kernel cannot be below. "issue" is the time in which the
multiprocessors can issue the instructions, one of every scheduler in every cycle. "memory" is the
time in which the memory can move each input and output once. Latencies and the rates of single
units (tensor cores, shared memory) are not in them.
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

from benchmarks import sass
from tim4rec_jax.ssd import compile_for, ssd, time_aware_ssd_block
from tim4rec_jax.ssd.shapes import BEAUTY, Shape
from tim4rec_jax.ssd.triton import launch as triton_launch
from tim4rec_jax.ssd.triton.launch import TileSizes

KINDS = ("FFMA", "HMMA", "HGMMA", "LDS", "LDSM", "STS", "LDG", "STG", "SHFL", "BAR", "MUFU")


class Gpu(NamedTuple):
    """What bounds are computed from: figures of the vendor's data sheets.

    Attributes:
        name: of the product.
        capability: its compute capability, 90 for 9.0.
        multiprocessors: how many it has.
        hertz: clock under load, at most what the data sheet calls boost.
        bandwidth: of its memory, bytes a second.
        shared: bytes of shared memory of a multiprocessor.
    """

    name: str
    capability: int
    multiprocessors: int
    hertz: float
    bandwidth: float
    shared: int


GPUS = [
    Gpu("A100", 80, 108, 1.41e9, 2.04e12, 164 * 1024),
    Gpu("H100", 90, 132, 1.755e9, 3.35e12, 228 * 1024),
    Gpu("H200", 90, 132, 1.755e9, 4.8e12, 228 * 1024),
]
# Of a multiprocessor.
SCHEDULERS, REGISTERS, MOST_WARPS, MOST_PROGRAMS = 4, 65536, 64, 32


class Program(NamedTuple):
    """The op, or the block, at a shape and precision."""

    shape: Shape
    precision: str = "tf32x3"
    block: bool = False
    causal: bool = False  # the block of the causal layer, else of the paper's

    def abstract(self) -> tuple[Callable, dict]:
        """Returns the function, and the shapes of its inputs."""
        if self.block:
            settings = {"activation": "hardswish", "state": self.shape.state}
            inputs = self.shape.block_inputs(self.causal)
            return functools.partial(time_aware_ssd_block, **settings), inputs
        settings = {"dt_softplus": True, "precision": self.precision}
        return functools.partial(ssd, **settings), self.shape.op_inputs()

    def bytes_moved(self, backward: bool) -> int:
        """Returns the bytes that a kernel must move."""
        moved: Callable[[bool], int] = self.shape.op_bytes
        if self.block:
            moved = functools.partial(self.shape.block_bytes, causal=self.causal)
        return moved(True) - moved(False) if backward else moved(False)


def programs() -> list[Program]:
    """Returns the op and the block at the released sizes and at wider ones."""

    def both(**sizes):
        return [BEAUTY._replace(length=length, **sizes) for length in (50, 200)]

    half = {"dtype": "bfloat16"}
    wide = [{"width": 128, "state": 64}, {"heads": 8, "width": 64, "state": 64}]
    wide += [{"width": 128, "state": 128}]
    found = [Program(s, p) for p in ("tf32x3", "ieee", "tf32") for s in both()]
    found += [Program(s) for s in both(**half)]
    found += [Program(s) for sizes in wide for s in (*both(**sizes), *both(**sizes, **half))]
    for sizes in ({}, half, {"width": 64, "state": 64}, {"width": 64, "state": 64, **half}):
        found += [Program(s, block=True) for s in both(**sizes)]
    return found + [Program(s, block=True, causal=True) for s in both()]


class Launch(NamedTuple):
    """What `tim4rec_jax.ssd.triton.launch.launch` was asked for."""

    kernel: Any
    signature: dict[str, str]
    specialisation: Any
    tiles: TileSizes
    programs: int

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return self.kernel.fn.__name__

    def turns(self, length: int) -> list[int]:
        """Returns how often each loop of the kernel turns when it is entered, outer ones first.

        Loops of one turn are left out, as the compiler leaves them out.
        """
        S = self.specialisation
        chunks = -(-length // S.Q)
        if self.name == "forward":
            found = [chunks]
        elif self.name == "backward":
            first = [S.HEADS, chunks - 1] if S.SEVERAL_CHUNKS else []
            found = [*first, chunks, S.HEADS]
        elif self.name == "block_forward":
            tiles = [S.M // min(64, S.M & -S.M)] if S.SEVERAL_CHUNKS else []
            found = [chunks, *tiles, S.G, S.H // S.G]
        else:
            heads, tile = [S.G, S.H // S.G], min(32, S.M & -S.M)
            first = []
            if S.SEVERAL_CHUNKS:
                activated = S.M - S.G * S.N
                first = [chunks - 1, activated // min(64, activated & -activated), S.H]
            stages = [S.M // min(64, S.M & -S.M), *heads, *heads, *heads, S.M // tile]
            found = [*first, chunks, *stages]
        return [turns for turns in found if turns != 1]


def launches(program: Program, capability: int) -> list[Launch]:
    """Returns what the gradient of the op or the block launches, forward and backward."""
    found = {}

    def record(kernel, inputs, outputs, *, programs, specialisation, tiles):
        types = [*map(_type, (*inputs, *outputs)), "constexpr"]
        signature = dict(zip(kernel.arg_names, types, strict=True))
        found[kernel.fn.__name__] = Launch(kernel, signature, specialisation, tiles, programs)
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
    # That the warps of a program issue. None: the loops of the code are not those described.
    instructions: dict[str, int] | None
    seconds: float

    def resident(self, launch: Launch, gpu: Gpu) -> int:
        """Returns the programs that a multiprocessor holds at once."""
        warps = launch.tiles.warps
        registers = -(-self.registers // 8) * 8 * 32 * warps
        fits = (REGISTERS // registers, gpu.shared // (self.shared + 1024), MOST_WARPS // warps)
        return min(*fits, MOST_PROGRAMS)

    def issue_bound(self, launch: Launch, gpu: Gpu) -> float | None:
        """Returns the seconds in which the GPU can issue the instructions of all programs."""
        if self.instructions is None:
            return None
        slots = gpu.multiprocessors * SCHEDULERS * gpu.hertz
        return self.instructions["all"] * launch.programs / slots


def compile_kernel(launch: Launch, capability: int, length: int) -> Report:
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
    try:
        counts = sass.issued(sass.parse(code), launch.turns(length))
    except ValueError:
        instructions = None
    else:
        issued = {kind: round(n * launch.tiles.warps) for kind, n in counts.items()}
        instructions = {kind: issued[kind] for kind in KINDS if kind in issued}
        instructions["all"] = sum(issued.values())
    spilled = sum(map(int, spills))
    return Report(int(registers), spilled, compiled.metadata.shared, instructions, seconds)


def rows(chosen: list[Program], capabilities: list[int]) -> Iterator[dict]:
    """Compiles the kernels of all programs for all GPUs."""
    for capability in capabilities:
        gpus = [gpu for gpu in GPUS if gpu.capability == capability]
        for program in chosen:
            sizes = program.shape._asdict()
            del sizes["name"], sizes["batch"]
            for launch in launches(program, capability):
                report = compile_kernel(launch, capability, program.shape.length)
                moved = program.bytes_moved(launch.name.endswith("backward"))
                bounds: dict[str, float | None] = {"programs": report.resident(launch, gpus[0])}
                issue = report.issue_bound(launch, gpus[0])
                bounds["issue us"] = None if issue is None else round(issue * 1e6, 1)
                for gpu in gpus:
                    bounds[f"memory us {gpu.name}"] = round(moved / gpu.bandwidth * 1e6, 1)
                yield {
                    "kernel": launch.name + (", causal" if program.causal else ""),
                    "sm": capability,
                    **sizes,
                    "precision": launch.specialisation.PRECISION,
                    "blocks": "/".join(map(str, launch.tiles)),
                    **bounds,
                    **report._asdict(),
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
        if row["instructions"] is not None:
            row["instructions"] = " ".join(f"{k} {v}" for k, v in row["instructions"].items())
        if i == 0:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)


if __name__ == "__main__":
    main()
