r"""Counts the instructions of the TPU kernels in what the compiler has dumped; no TPU needed.

    LIBTPU_INIT_ARGS="--xla_jf_dump_to=/tmp/llo --xla_jf_dump_llo_text=true" \
        python -m benchmarks.tpu_compile --topologies v5e:2x2 --programs op block \
        --implementations tpu
    python -m benchmarks.tpu_bundles /tmp/llo

A TPU starts one bundle of instructions in each cycle, or waits. A line for each kernel: its bundles
outside of loops, in a step of the grid, and in a turn of the loop over the rows of a program
(`tim4rec_jax.ssd.tpu.common.Blocks.for_rows`). Then the share of the slots that are filled, of the
matrix unit (MXU), of the vector units and of memory, over all bundles.
"""

import re
import sys
from collections import Counter
from pathlib import Path

_BUNDLE = re.compile(r"\s*0(?:x[0-9a-f]+)?\s+(?:\w\w)?\s*:\s*((?:> ?)*)\{")


def bundles(path: Path) -> Counter[int]:
    """Returns how many bundles are in loops of each depth, of a file `*-final_bundles.txt`."""
    found = map(_BUNDLE.match, path.read_text().splitlines())
    return Counter(one[1].count(">") for one in found if one)


def filled(path: Path) -> dict[str, float]:
    """Returns the share of filled slots by unit, of a file `*per-bundle-utilization.txt`."""
    lines = path.read_text().splitlines()
    names, capacity = lines[1].split(", "), list(map(int, lines[2].split()))
    rows = [list(map(int, line.split())) for line in lines[4:] if line.strip()]
    sums = map(sum, zip(*rows, strict=True))
    return {n: s / len(rows) / c for n, s, c in zip(names, sums, capacity, strict=True)}


def main() -> None:
    """Runs the command line."""
    folder = Path(sys.argv[1])
    # A kernel is named after the transformations that its call went through.
    for path in sorted(folder.glob("*jvp__*-final_bundles.txt")):
        if "schedule-analysis" in path.name:
            continue
        name = path.name.split("-")[1]
        depths = bundles(path)
        number = path.name.split("-")[0]
        (used,) = folder.glob(f"{number}-{name}-*-final_hlo-static-per-bundle-utilization.txt")
        shares = {unit: f"{share:.0%}" for unit, share in filled(used).items()}
        print(name, [depths[depth] for depth in sorted(depths)], shares)


if __name__ == "__main__":
    main()
