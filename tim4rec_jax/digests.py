"""Digests of arrays, by which a damaged checkpoint is told from a whole one.

The digests of a checkpoint are the JSON file `digests/arrays.json` in its folder. Beside it lie the
folders in which Orbax keeps the arrays. Checkpoints of earlier versions have no digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tim4rec_jax.errors import UserError
from tim4rec_jax.files import read_json

DIGESTS = "arrays.json"
_LARGE = 1 << 26  # bytes; larger arrays are copied to the host piece by piece


def by_place(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their places in it, see `place`."""
    return {place(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def place(path: Any) -> str:
    """The place of a leaf whose path JAX names, such as `blocks/0/norm/scale`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def digests(tree: Any, rows: Mapping[str, int] | None = None) -> dict[str, str]:
    """The digest of each array of a tree.

    Args:
      tree: arrays in containers that JAX knows. Arrays on a device are copied to the host, large
        ones in pieces.
      rows: the number of rows that count, of arrays that may have more, by their places.

    Returns:
      The SHA-256 of dtype, shape and values of each array in hexadecimal digits, by the place of
      the array in the tree (`blocks/0/norm/scale`). Of an array whose rows several processes have,
      it is a sum over its rows, see `_digest_of_rows`.
    """
    found = {}
    for name, leaf in by_place(tree).items():
        count = (rows or {}).get(name)
        found[name] = _digest_of_rows(leaf, count) if _is_shared(leaf) else _digest(leaf, count)
    return found


def _is_shared(array: Any) -> bool:
    """Whether other processes have rows of an array that this one has not."""
    return isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    )


def json_array(value: Any) -> np.ndarray:
    """A value that is saved as JSON, in a form to digest: uint8, the bytes of its text."""
    return np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)


def _digest(array: Any, count: int | None) -> str:
    shape = (count, *array.shape[1:]) if count else array.shape
    digest = hashlib.sha256(f"{array.dtype.name}{shape}".encode())
    for start, values in _pieces(array):
        counted = values[: max(count - start, 0)] if count else values
        digest.update(np.ascontiguousarray(counted).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _pieces(array: Any) -> Iterator[tuple[int, np.ndarray]]:
    """The values that this process has of an array, and the place of the first of these rows.

    JAX may copy an array for the host, and then it keeps the copy as long as the array. So a large
    array is copied some rows at a time.
    """
    if isinstance(array, np.ndarray):
        yield 0, array
        return
    held = [(0, array.addressable_shards[0].data)]
    if not array.is_fully_replicated:
        shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
        held = sorted((shard.index[0].start or 0, shard.data) for shard in shards)
    for first, data in held:
        if data.nbytes <= _LARGE:
            yield first, np.asarray(data)
            continue
        rows = max(_LARGE // (data.nbytes // len(data)), 1)
        for start in range(0, len(data), rows):
            # The last piece begins earlier, so that one program makes all of them.
            begin = min(start, len(data) - rows)
            piece = jax.lax.dynamic_slice_in_dim(data, begin, rows)
            yield first + start, np.asarray(piece)[start - begin :]


_OF_ROWS = "rows-"


def _digest_of_rows(array: Any, count: int | None) -> str:
    """A digest to which each process adds what it knows of its own rows.

    It is the sum modulo 2^64 of a number for each row, which depends on all bits of the row and on
    its place. So it does not depend on who has which rows.
    """
    rows_in_all: int = count or array.shape[0]
    total = np.zeros(1, np.uint64)
    for start, values in _pieces(array):
        rows = values[: max(rows_in_all - start, 0)]
        if len(rows):
            places = np.arange(start, start + len(rows), dtype=np.uint64)
            total += _mixed(_numbers(rows) + _mixed(places)).sum(dtype=np.uint64)
    if _is_shared(array):
        halves = np.array([total[0] >> 32, total[0] & 0xFFFFFFFF], np.uint32)
        every = multihost_utils.process_allgather(halves).astype(np.uint64)
        total = (every[:, 0] << np.uint64(32)).sum(keepdims=True) + every[:, 1].sum()
    kind = f"{array.dtype.name}{(rows_in_all, *array.shape[1:])}"
    return f"{_OF_ROWS}{kind} {int(total[0]):016x}"


def _numbers(rows: np.ndarray) -> np.ndarray:
    """A number for each row: its words with odd factors, so that every bit counts."""
    words = np.ascontiguousarray(rows).reshape(len(rows), -1)
    words = words.view(f"uint{8 * words.dtype.itemsize}").astype(np.uint64)
    factors = _mixed(np.arange(words.shape[1], dtype=np.uint64)) | np.uint64(1)
    total = np.zeros(len(rows), np.uint64)
    for column, factor in zip(words.T, factors, strict=True):
        total += _mixed(column + factor)
    return total


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a permutation of 64-bit numbers that spreads every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def check_digests(
    tree: Any, recorded: dict[str, str], rows: Mapping[str, int] | None = None
) -> None:
    """Makes sure that arrays are those whose digests were recorded.

    Args:
      tree: the arrays.
      recorded: their digests.
      rows: see `digests`.

    Raises:
      UserError: they are not; the message names an array that is not.
    """
    found = digests(tree, rows)
    leaves = by_place(tree)
    for name in found.keys() & recorded.keys():
        ours, theirs = (x.startswith(_OF_ROWS) for x in (found[name], recorded[name]))
        if theirs and not ours:
            found[name] = _digest_of_rows(leaves[name], (rows or {}).get(name))
        elif ours and not theirs:  # one process cannot hash the rows of another
            found[name] = recorded[name]
    changed = sorted(name for name in found | recorded if found.get(name) != recorded.get(name))
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(f"the values of {changed[0]}{more} are not those that were saved")


def read_digests(checkpoint: Path) -> dict[str, str] | None:
    """The digests in the folder of a checkpoint, `None` if it is of an earlier version.

    Raises:
      UserError: the file is damaged.
    """
    path = checkpoint / "digests" / DIGESTS
    if not path.parent.exists():
        return None
    return read_json(path, dict[str, str], "take another checkpoint")
