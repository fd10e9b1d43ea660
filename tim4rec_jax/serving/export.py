"""Exports a run as a folder that recommends without this package: StableHLO, weights, vocabulary.

`python -m tim4rec_jax.serving export --workdir RUN --out DIR` writes

- `recommend.stablehlo`: the program, which `jax.export.deserialize` reads. It runs on CPU, CUDA
  and TPU, for any number of rows.
- `weights.npz`: the first argument of the program, an array for each parameter.
- `items.parquet`: the items, with `index` (from 1), `item` (the original id), `count`, and `title`
  where there are titles.
- `metadata.json`: the other arguments in words, what the model was trained with, digests of the
  dataset (`content`), the SHA-256 of the other files (`files`) and its own (`digest`).

The weights are an argument of the program and not constants in it. So the program is small,
compiles fast, and sets no limit to the catalogue. `examples/run_export.py` shows how to call it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export

import tim4rec_jax
from tim4rec_jax.config import Config
from tim4rec_jax.data import format as fmt
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.ranking import top_k
from tim4rec_jax.files import atomic_directory, write_json
from tim4rec_jax.models import SequenceModel, condition_on_time, inputs
from tim4rec_jax.scoring import history_bias
from tim4rec_jax.serving.catalogue import Catalogue, load_run

FORMAT_VERSION = 1
PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, WEIGHTS, METADATA = "recommend.stablehlo", "weights.npz", "metadata.json"
# Arrays of a batch that only some models take: the name and the description in `metadata.json`.
_MOMENTS = {
    "time_to_next": (
        "wait",
        "float32 [rows]: seconds from the last event to the moment of prediction",
    ),
    "dates": ("date", "float32 [rows]: of the last event, days since 1970"),
}


def export(workdir: Path, out: Path, *, top: int = 100, dataset: Path | None = None) -> dict:
    """Writes the best model of a run as a folder, which is complete or not there at all.

    Args:
      workdir: the run directory.
      out: the folder to write. It must not exist, or be empty.
      top: how many items a call returns; fewer where the catalogue has fewer.
      dataset: the prepared dataset with the vocabulary; `None` takes that of the training.

    Returns:
      The content of `metadata.json`.

    Raises:
      UserError: the run or the dataset is missing or damaged, they do not belong together, `out`
        holds something, or `out` lies where the run keeps its checkpoints.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: choose another --out")
    if out.resolve().parent in [(workdir / name).resolve() for name in ("best", "checkpoints")]:
        raise UserError(f"{out} is where {workdir} keeps its checkpoints: choose another --out")
    config, model, catalogue = load_run(workdir, dataset)
    top = min(top, len(catalogue))
    recommend, weights = program(model, top)
    metadata = _metadata(config, model, catalogue, top)
    with atomic_directory(out) as folder:
        np.savez(folder / WEIGHTS, allow_pickle=False, **weights)
        (folder / PROGRAM).write_bytes(lower(recommend, weights, model).serialize())
        shutil.copyfile(catalogue.directory / fmt.ITEMS_FILE, folder / fmt.ITEMS_FILE)
        metadata["files"] = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in (PROGRAM, WEIGHTS, fmt.ITEMS_FILE)
        }
        rest = json.dumps(metadata, sort_keys=True).encode()
        metadata["digest"] = hashlib.sha256(rest).hexdigest()
        write_json(folder / METADATA, metadata)
    return metadata


def program(model: Any, top: int) -> tuple[Callable[..., Any], dict[str, np.ndarray]]:
    """Makes the function to export, and its weights.

    Args:
      model: the model.
      top: how many items the function returns, K.

    Returns:
      `recommend(weights, items [B,L], lengths [B], gaps [B,L], exclude [B,S]) -> (scores [B,K],
      items [B,K])`, and the weights by the path of the parameter (`"blocks.0.ssd.A_log"`). For a
      model that knows when the next event happens, the function takes `wait [B]` besides, the
      seconds until then. For a model with a date bias it takes `date [B]` last, the date of the
      last event in days since 1970.
    """
    graphdef, params = nnx.split(model)
    parameters = [
        (".".join(map(str, path)), path, leaf) for path, leaf in nnx.to_flat_state(params)
    ]

    def recommend(weights, items, lengths, gaps, exclude, *moments):
        state = nnx.from_flat_state(
            [(path, leaf.replace(weights[name])) for name, path, leaf in parameters]
        )
        model: Any = nnx.merge(graphdef, state)

        # The rows go through the model one by one under vmap, because the layers choose the sizes
        # of their blocks by the number of rows, which is unknown here.
        def encode(*row):
            return model.encode(*(value[None] for value in row))[0]

        hidden = jax.vmap(encode)(items, lengths, gaps)
        hidden = condition_on_time(model, hidden, dict(zip(_moments(model), moments, strict=True)))
        bias = history_bias(model)
        history = None if bias is None else bias.of(items)
        return top_k(hidden, model.item_table(), top, exclude=exclude, history=history)

    return recommend, {name: np.asarray(leaf[...]) for name, _, leaf in parameters}


def _moments(model: SequenceModel) -> list[str]:
    """The arrays of a batch, one value per row, that the program of this model takes last."""
    return [name for name in inputs(model) if name in _MOMENTS]


def lower(
    recommend: Callable[..., Any], weights: dict[str, np.ndarray], model: SequenceModel
) -> jax_export.Exported:
    """Lowers the function of `program` for all `PLATFORMS` and any number of rows."""
    rows, excluded = jax_export.symbolic_shape("rows, excluded")
    kinds = [
        ((rows, model.max_length), jnp.int32),
        ((rows,), jnp.int32),
        ((rows, model.max_length), jnp.float32),
        ((rows, excluded), jnp.int32),
    ]
    kinds += [((rows,), jnp.float32) for _ in _moments(model)]
    arguments = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    return jax_export.export(jax.jit(recommend), platforms=PLATFORMS)(weights, *arguments)


def _metadata(config: Config, model: SequenceModel, catalogue: Catalogue, top: int) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        "made_by": f"tim4rec-jax {tim4rec_jax.__version__}, jax {jax.__version__}",
        "dataset": catalogue.metadata["name"],
        "content": catalogue.metadata.get("content", {}),
        "items": len(catalogue),
        "max_length": model.max_length,
        "top_k": top,
        "gaps": config.data.convention,
        "platforms": PLATFORMS,
        "arguments": {
            "weights": f"the arrays of {WEIGHTS} by name",
            "items": "int32 [rows, max_length]: item indices of the last events, oldest first, "
            "right padded with 0",
            "lengths": "int32 [rows]: how many events, 1 or more",
            "gaps": "float32 [rows, max_length]: seconds since the event before, 0 for the first; "
            "exact: 0 at padding; recbole: differences of the times as float32, padded with 0 "
            "first, so the first padding position holds minus the last time",
            "exclude": "int32 [rows, any]: item indices not to recommend, 0 for none",
        }
        | dict(_MOMENTS[name] for name in _moments(model)),
        "returns": "scores float32 [rows, top_k] and item indices int32 [rows, top_k], best "
        "first; index 0 where no item was left",
    }
