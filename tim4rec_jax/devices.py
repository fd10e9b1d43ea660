"""How a batch lies on this process's devices: rows spread, everything else on each."""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Placement(NamedTuple):
    """Shardings over the first `devices` local devices."""

    devices: int
    by_row: NamedSharding
    replicated: NamedSharding


def place(rows: int) -> Placement:
    """Spreads batches of `rows` over as many local devices as divide them evenly."""
    devices = jax.local_devices()
    devices = devices[: math.gcd(len(devices), rows)]
    mesh = Mesh(np.asarray(devices), ("batch",))
    return Placement(
        len(devices),
        NamedSharding(mesh, PartitionSpec("batch")),
        NamedSharding(mesh, PartitionSpec()),
    )
