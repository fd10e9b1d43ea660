"""The golden files of the comparison models: what their published code computed."""

import functools
import json
from dataclasses import dataclass

import numpy as np

from tests.interop.golden_models import FOLDER as GOLDEN
from tim4rec_jax.data import time_gaps
from tim4rec_jax.interop import from_torch

FOLDER = GOLDEN / "baselines"
NAMES = sorted(p.stem for p in FOLDER.glob("*.npz") if not p.stem.startswith("op_"))


@dataclass
class GoldenBaseline:
    config: dict
    state_dict: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]  # in/*, out/*, hidden/*, grad/*, ...

    @property
    def batch(self) -> dict[str, np.ndarray]:
        """As `tim4rec_jax.data` makes them."""
        items, lengths = self.arrays["in/item_seq"], self.arrays["in/item_seq_len"]
        times = self.arrays.get("in/timestamp_raw", np.zeros(items.shape, np.int64))
        users = self.arrays.get("in/user_id", np.ones(len(items), np.int32))
        return {
            "items": items,
            "lengths": lengths,
            "gaps": time_gaps(times, lengths, "recbole"),
            "users": users - 1,
            "targets": self.arrays["in/target"],
            "weights": np.ones(len(items), np.float32),
            "masked": self.arrays.get("in/masked_item_seq", items),  # BERT4Rec's
        }

    def masked(self, prefix: str) -> dict[str, np.ndarray]:
        """A batch masked for BERT4Rec: `in/`, or `in/ft_` where only the last items are."""
        positions = self.arrays[f"{prefix}masked_index"]
        return {
            "items": self.arrays[f"{prefix}masked_item_seq"],
            "positions": positions,
            "targets": self.arrays[f"{prefix}pos_items"],
            "weights": (positions > 0).astype(np.float32),
        }

    def model(self, dtype: str):
        weights = {
            name: value.astype(np.result_type(dtype, value) if value.dtype.kind == "c" else dtype)
            for name, value in self.state_dict.items()
        }
        return from_torch(weights, self.config)


def from_the_left(arrays):
    """Hidden states of rows padded on the left, up to a power of two, as rows like all others."""
    lengths, width = arrays["in/item_seq_len"], arrays["in/item_seq"].shape[1]
    return {
        key.replace("_padded", ""): np.stack(
            [
                np.roll(row, length, axis=0)[:width]
                for row, length in zip(rows, lengths, strict=False)
            ]
        )
        for key, rows in arrays.items()
        if key.startswith("hidden")
    }


@functools.cache
def read_baseline(name: str) -> GoldenBaseline:
    arrays = dict(np.load(FOLDER / f"{name}.npz"))
    config = json.loads(str(arrays["config_json"]))
    if config["model"] == "LRURec":
        arrays |= from_the_left(arrays)
    return GoldenBaseline(
        config=config,
        state_dict={
            key.removeprefix("param/"): value
            for key, value in arrays.items()
            if key.startswith("param/")
        },
        arrays=arrays,
    )
