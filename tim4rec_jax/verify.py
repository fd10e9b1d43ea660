"""Checks that a run is whole: settings, figures, checkpoints, items, and the dataset behind it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from tim4rec_jax.data import format as fmt
from tim4rec_jax.data import open_dataset
from tim4rec_jax.data.features import FEATURES_FILE
from tim4rec_jax.digests import check_digests, json_array, read_digests
from tim4rec_jax.errors import UserError, first_line
from tim4rec_jax.files import check_plain, read_json
from tim4rec_jax.run import (
    check_same_dataset,
    checkpoint_steps,
    load_model,
    read_settings,
    silence_echoes,
)

_RESTORE = "restore it from a copy, or train anew"


class Finding(NamedTuple):
    """What `verify` says about one part of a run.

    Attributes:
      part: the file or folder.
      problem: what is wrong with it, in a sentence; None if it is whole.
      note: what else there is to say about a part that is whole.
    """

    part: Path
    problem: str | None
    note: str = ""


def verify(workdir: str | Path, dataset: str | Path | None = None) -> list[Finding]:
    """Checks everything in a run that can be checked, the dataset of its training included.

    Settings and figures must be readable, each array of each checkpoint must have the digest that
    was recorded when it was saved, and the dataset must be the one that the run began with.

    Args:
      workdir: the run directory.
      dataset: the prepared dataset; `None` takes the one that the settings name.

    Returns:
      What was found, part by part.

    Raises:
      UserError: `workdir` is no run directory.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} is no run directory: it has no config.json")
    return list(_findings(workdir, dataset))


def _findings(workdir: Path, dataset: str | Path | None) -> Iterator[Finding]:
    settings = workdir / "config.json"
    yield _finding(settings, lambda: _nothing(read_settings(settings)))
    for name in (fmt.DATASET_FILE, "date_range.json", "metrics.json"):
        path = workdir / name
        if path.exists():
            yield _finding(path, lambda path=path: _nothing(read_json(path, Any, _RESTORE)))
    for folder in (workdir / "best", workdir / "checkpoints"):
        for step in checkpoint_steps(folder):
            path = folder / str(step)
            yield _finding(path, lambda path=path: _verify_arrays(path))
    if (workdir / "best").is_dir() or (workdir / "metrics.json").exists():
        yield _finding(workdir, lambda: _nothing(load_model(workdir)))
    if (workdir / fmt.ITEMS_FILE).exists():
        items = workdir / fmt.ITEMS_FILE
        yield _finding(items, lambda: _nothing(fmt.read_items(workdir, fmt.read_metadata(workdir))))
    if (workdir / FEATURES_FILE).exists():
        features = workdir / FEATURES_FILE
        yield _finding(
            features,
            lambda: _nothing(fmt.read_item_features(workdir, fmt.read_metadata(workdir))),
        )
    if (workdir / fmt.DATASET_FILE).exists():
        with contextlib.suppress(UserError):  # damaged settings were told above
            dataset = dataset or str(
                read_json(settings, dict[str, Any], _RESTORE).get("dataset", "")
            )
        if dataset is not None:
            named = Path(dataset)
            yield _finding(named, lambda: _verify_dataset(workdir, named))


def _finding(part: Path, check: Callable[[], str]) -> Finding:
    try:
        return Finding(part, None, check())
    except UserError as error:
        says = str(error)
        return Finding(part, says if str(part) in says else f"{part}: {says}; {_RESTORE}")
    except Exception as error:  # of a damaged checkpoint, Orbax can say anything
        silence_echoes()
        return Finding(part, f"{part} cannot be read ({first_line(error)}); {_RESTORE}")


def _nothing(_: Any) -> str:
    return ""


def _verify_arrays(checkpoint: Path) -> str:
    check_plain(checkpoint)
    recorded = read_digests(checkpoint)
    item = checkpoint / ("default" if (checkpoint / "default").exists() else "state")
    with ocp.PyTreeCheckpointer() as checkpointer:
        found: Any = checkpointer.metadata(item.absolute()).item_metadata
        if found is None:
            raise UserError(f"{item} is damaged: the list of its arrays cannot be read; {_RESTORE}")
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found.tree)
        arrays = checkpointer.restore(item.absolute(), restore_args=kinds)
    if recorded is None:
        return "of an earlier version, which kept no digests"
    if "progress" in recorded:  # `training.checkpoints` digests its JSON files too
        for name, file in (("data", "process_0-*.json"), ("progress", "metadata")):
            found = [read_json(path, Any, _RESTORE) for path in (checkpoint / name).glob(file)]
            arrays[name] = json_array(found[0] if found else None)
    try:
        check_digests(arrays, recorded)
    except UserError as error:
        raise UserError(f"{checkpoint} is damaged: {error}; {_RESTORE}") from error
    return f"{len(recorded)} arrays"


def _verify_dataset(workdir: Path, dataset: Path) -> str:
    opened, kept = open_dataset(dataset), workdir / fmt.DATASET_FILE
    check_same_dataset(dataset, opened.metadata, workdir, more_items=True)
    added = read_json(kept, dict[str, Any], _RESTORE).get("added_items", 0)
    return f"{opened.n_events:,} events" + f"; the run has {added:,} items more" * bool(added)
