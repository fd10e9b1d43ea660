"""The golden files of whole models: what the published code computed, and our model of it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tim4rec_jax.data import time_gaps
from tim4rec_jax.interop import from_torch
from tim4rec_jax.models import TiM4Rec

# The repository holds the small files; TIM4REC_GOLDEN names the folder that has them all.
FULL = "TIM4REC_GOLDEN" in os.environ
FOLDER = Path(os.environ.get("TIM4REC_GOLDEN", Path(__file__).parents[1] / "golden"))
NAMES = sorted(p.stem.removeprefix("model_") for p in FOLDER.glob("model_*.npz"))


@dataclass
class GoldenModel:
    config: dict
    state_dict: dict[str, np.ndarray]
    items: np.ndarray
    lengths: np.ndarray
    gaps: np.ndarray
    targets: np.ndarray
    arrays: dict[str, np.ndarray]  # out/*, hidden/*, time_diff/*, grad/*, ...

    def model(self, dtype: str = "float32") -> TiM4Rec:
        weights = {name: value.astype(dtype) for name, value in self.state_dict.items()}
        return from_torch(weights, self.config)


def read_golden(name: str) -> GoldenModel:
    arrays = dict(np.load(FOLDER / f"model_{name}.npz"))
    return GoldenModel(
        config=json.loads(str(arrays["config_json"])),
        state_dict={
            key.removeprefix("param/"): value
            for key, value in arrays.items()
            if key.startswith("param/")
        },
        items=arrays["in/item_seq"],
        lengths=arrays["in/item_seq_len"],
        gaps=time_gaps(arrays["in/timestamp_raw"], arrays["in/item_seq_len"], "recbole"),
        targets=arrays["in/target"],
        arrays=arrays,
    )
