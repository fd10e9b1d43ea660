"""Digests of arrays, by which a damaged checkpoint is told from a whole one.

The digests of a checkpoint are the JSON file `digests/arrays.json` in its folder. Beside it lie the
folders in which Orbax keeps the arrays. Checkpoints of earlier versions have no digests.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tim4rec_jax.errors import UserError
from tim4rec_jax.files import read_json

DIGESTS = "arrays.json"


def digests(tree: Any) -> dict[str, str]:
    """The digest of each array of a tree.

    Args:
      tree: arrays in containers that JAX knows. Arrays on a device are copied to the host.

    Returns:
      The SHA-256 of dtype, shape and values of each array in hexadecimal digits, by the place of
      the array in the tree (`blocks/0/norm/scale`).
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _digest(np.asarray(leaf))
        for path, leaf in leaves
    }


def json_array(value: Any) -> np.ndarray:
    """A value that is saved as JSON, in a form to digest: uint8, the bytes of its text."""
    return np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.name}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_digests(tree: Any, recorded: dict[str, str]) -> None:
    """Makes sure that arrays are those whose digests were recorded.

    Raises:
      UserError: they are not; the message names an array that is not.
    """
    found = digests(tree)
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
