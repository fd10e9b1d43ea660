"""Digests of arrays do not depend on where the arrays are, nor on the pieces they are read in."""

import hashlib

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tim4rec_jax import digests
from tim4rec_jax.runtime import AXES, make_mesh


def test_a_large_array_is_read_in_pieces_on_any_number_of_devices(monkeypatch):
    monkeypatch.setattr(digests, "_LARGE", 64)  # three rows
    values = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    counted = values[:21].tobytes()
    expected = hashlib.sha256(b"float32(21, 5)" + counted).hexdigest()
    by_row = NamedSharding(make_mesh(1, 2, jax.devices()[:2]), PartitionSpec(AXES))
    for array in (values, jax.numpy.asarray(values), jax.device_put(values, by_row)):
        assert digests.digests({"table": array}, {"table": 21}) == {"table": expected}
