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


def test_the_digest_of_rows_that_processes_share(monkeypatch):
    """It is the same whoever has which rows; other values, or rows in other places, are noticed."""
    values = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
    monkeypatch.setattr(digests, "_is_shared", lambda array: True)

    def found(values, *parts):
        told = []
        monkeypatch.setattr(
            digests.multihost_utils,
            "process_allgather",
            lambda own: told.append(own) or np.stack(told),
        )
        for part in parts:  # the last process hears of all others
            monkeypatch.setattr(
                digests, "_pieces", lambda array, part=part: iter([(part.start, array[part])])
            )
            digest = digests.digests({"table": values}, {"table": 21})
        return digest["table"]

    alone = found(values, slice(0, 24))
    assert found(values, slice(0, 10), slice(10, 24)) == alone
    assert found(values, slice(16, 24), slice(8, 16), slice(0, 8)) == alone
    changed, moved, beyond = values.copy(), values[[1, 0, *range(2, 24)]], values.copy()
    changed[20, 4] += 1e-6
    beyond[21:] = 0  # rows that complete the table
    assert found(changed, slice(0, 24)) != alone != found(moved, slice(0, 24))
    assert found(beyond, slice(0, 24)) == alone
