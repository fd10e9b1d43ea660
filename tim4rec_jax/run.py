"""A run directory: its settings, its dataset, its best model.

    config.json       settings
    dataset.json      metadata of the dataset that the model was trained on
    items.parquet     the items of that dataset: ids, numbers of events, titles
    item_features.arrow   their features, if there are any
    date_range.json   times of the training events, for models with a date bias
    best/             parameters with the best validation figures

Training adds `checkpoints/`, `log.jsonl`, `tensorboard/` and `metrics.json`.
"""

import fcntl
import hashlib
import inspect
import json
import logging as python_logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pyarrow.parquet as pq
from absl import logging
from annotated_types import Len
from flax import nnx
from typing_extensions import TypedDict

from tim4rec_jax import config as config_lib
from tim4rec_jax.data import Dataset
from tim4rec_jax.data.features import FEATURES_FILE
from tim4rec_jax.data.format import DATASET_FILE, ITEMS_FILE
from tim4rec_jax.digests import by_place, check_digests, read_digests
from tim4rec_jax.errors import UserError, first_line
from tim4rec_jax.files import atomic_write, check_plain, check_schema, read_json, write_json
from tim4rec_jax.models import FeatureArrays, SequenceModel, build, model_class, model_settings

_RESTORE = "restore it from a copy, or train anew"

# Orbax warns of optional files that are missing. What fails raises an error as well.
logging.set_verbosity(logging.FATAL)


def silence_echoes() -> None:
    """What fails in the background of Orbax is told once, by the exception it raises.

    A write that fails has every other one of the same checkpoint complain to asyncio and to a
    loop that is gone, a traceback each, or warn at exit that it was never begun.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    show = sys.unraisablehook

    def hook(failure) -> None:
        of_a_read = inspect.iscoroutine(failure.object)
        if not of_a_read and str(failure.exc_value) != "Event loop is closed":
            show(failure)

    sys.unraisablehook = hook


_EPOCHS = "train.epochs"

# Settings that change no result, so that a run may go on with others: where the data lies, which is
# compared itself, and how to get it, where the settings came from, who is told, how often a
# checkpoint is written, where batches are gathered and on which devices a run goes on, how many
# users are evaluated at once.
CHANGE_NOTHING = (
    "dataset",
    "prepare",
    "preset",
    "data.placement",
    "train.checkpoint_minutes",
    "train.loggers",
    "mesh.data",
    "mesh.catalogue",
    "eval.batch_size",
)
# Settings that can be edited in `config.json`, as its digest leaves them out: where the data lies,
# where figures go, on which devices a run goes on, and how it is evaluated.
_FREE = (
    "dataset",
    "prepare",
    "preset",
    "train.loggers",
    "mesh.data",
    "mesh.catalogue",
    "eval.batch_size",
    "eval.ks",
    "eval.ties",
)


def write_settings(config: config_lib.Config, path: Path) -> None:
    """Writes the settings as JSON, complete or not at all, with a digest under `sha256`."""
    values = config.to_dict()
    write_json(path, values | {"sha256": _digest(values)})


def _digest(values: dict[str, Any]) -> str:
    kept = {name: v for name, v in config_lib.flatten(values).items() if name not in _FREE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _check_digest(values: dict[str, Any], path: Path) -> None:
    """Takes the digest out of the content of a file, and compares it where there is one."""
    recorded = values.pop("sha256", None)
    if recorded is not None and recorded != _digest(values):
        raise UserError(f"{path} does not hold the values that were written to it; {_RESTORE}")


def read_settings(path: Path) -> config_lib.Config:
    """Reads settings that `write_settings` wrote, of this version or an older one.

    Raises:
      UserError: the file is missing or damaged, or names a model that cannot be found.
    """
    values: config_lib.Config = config_lib.ConfigDict(_read_settings(path))
    config_lib.rename_settings(values)
    config = config_lib.default()
    name = values.model.get("name", config.model.name)
    if not isinstance(name, str):
        raise UserError(f"{path} is damaged (`model.name` should be a text); {_RESTORE}")
    try:
        config_lib.use_model(config, name)
    except ValueError as error:
        raise UserError(f"{path}: model.{error}") from error
    with config.unlocked(), config.ignore_type():
        config.update(values)
    try:
        config_lib.check_values(config)
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); {_RESTORE}") from error
    return config


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path.parent} is no run directory: it has no {path.name}")
    values = read_json(path, dict[str, Any], _RESTORE)
    for group in ("data", "model", "train", "mesh", "eval"):
        if not isinstance(values.get(group, {}), dict):
            raise UserError(f"{path} is damaged (`{group}` holds no settings); {_RESTORE}")
    _check_digest(values, path)
    return values


def check_unchanged(config: config_lib.Config, path: Path, *, more_epochs: bool = False) -> None:
    """Makes sure that a run goes on with the settings that it began with.

    Args:
      config: the settings of now, resolved.
      path: the file with the settings that the run began with. If it is not there, no run has
        begun.
      more_epochs: whether the number of epochs may be larger, where the epochs so far would have
        been the same.

    Raises:
      UserError: they differ; the message names the settings that do.
    """
    if not path.exists():
        return
    ours, theirs, changed = _changes(config, path)
    if not _was_begun(path.parent):  # a kill before its first step has left the settings alone
        return
    if more_epochs and changed == [_EPOCHS] and ours[_EPOCHS] > theirs[_EPOCHS]:
        epochs = f"{_EPOCHS} ({theirs[_EPOCHS]} -> {ours[_EPOCHS]})"
        if ours["train.schedule"] != "constant":
            raise UserError(
                f"{path.parent} cannot go on for more epochs, {epochs}: with config.train.schedule="
                f"{ours['train.schedule']} its learning rate has followed the old number; train "
                "anew with another --workdir, or begin a new run there with "
                f"--init-from={path.parent}, whose learning rate starts again"
            )
        if _ended_between_validations(path.parent, ours):
            raise UserError(
                f"{path.parent} cannot go on for more epochs, {epochs}: at its end it validated "
                "where a longer run does not, by config.eval.valid_epochs or valid_steps; train "
                f"anew with another --workdir, or begin there with --init-from={path.parent}"
            )
        finished = (path.parent / "metrics.json").exists()
        if finished and not checkpoint_steps(path.parent / "checkpoints"):
            raise UserError(
                f"{path.parent} cannot go on for more epochs, {epochs}: its checkpoints are gone; "
                f"train anew with another --workdir, or begin there with --init-from={path.parent}"
            )
        return
    if changed:
        listed = ", ".join(f"{name} ({theirs.get(name)} -> {ours[name]})" for name in changed)
        raise UserError(
            f"{path.parent} holds a run with other settings: {listed}; "
            "choose another --workdir, or delete that one to start anew"
        )


def _ended_between_validations(workdir: Path, settings: dict[str, Any]) -> bool:
    """Whether the last validation of a run was one that comes only at the end of a training."""
    done = read_validations(workdir)
    if not done:
        return False
    if (every := settings["eval.valid_steps"]) is not None:
        return done[-1].get("step", 0) % every != 0
    return done[-1]["epoch"] % settings["eval.valid_epochs"] != 0


def _changes(
    config: config_lib.Config, path: Path
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The settings of now and those of a run by their full names, and the names that differ."""
    # Through JSON, which makes lists of tuples.
    ours, theirs = (
        json.loads(json.dumps(config_lib.flatten(each))) for each in (config, read_settings(path))
    )
    nothing = {*CHANGE_NOTHING, *idle_settings(config)}
    changed = [n for n in ours if ours[n] != theirs.get(n) and n not in nothing]
    return ours, theirs, changed


def idle_settings(config: config_lib.Config) -> list[str]:
    """The settings of the model that have no effect beside its others, by their full names."""
    return [f"model.{name}" for name in model_settings(config.model).idle]


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, rising; nothing if it is missing."""
    return sorted(ocp.utils.checkpoint_steps(folder.absolute())) if folder.is_dir() else []


@contextmanager
def claim(
    workdir: Path,
    config: config_lib.Config,
    dataset: Dataset,
    date_range: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Makes a run directory, or takes one that is there, for this process alone.

    A run that goes on for more epochs has them in its settings from then on, and is no longer
    finished. If the block raises before a new run has taken a step, what was written is removed, so
    that corrected settings are not refused.

    Args:
      workdir: the run directory.
      config: the settings of the run, resolved.
      dataset: what it is trained on.
      date_range: see `read_date_range`.

    Raises:
      UserError: another process is training there, it holds another run or one on another dataset,
        or it is the folder of the dataset.
    """
    settings_file, there = workdir / "config.json", workdir.exists()
    if there and workdir.samefile(dataset.directory):
        raise UserError(f"{workdir} is the folder of the dataset; choose another --workdir")
    check_same_dataset(dataset.directory, dataset.metadata, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with only_process(workdir):
        # Another process may have trained here since the settings were compared.
        check_unchanged(config, settings_file, more_epochs=True)
        new = not _was_begun(workdir)
        if not (new or settings_file.exists()):
            raise UserError(
                f"{settings_file} is missing, and {workdir} holds a run; restore it from a copy, "
                "or choose another --workdir"
            )
        kept = ("config.json", DATASET_FILE, ITEMS_FILE, FEATURES_FILE, "date_range.json")
        missing = [name for name in kept if not (workdir / name).exists()]
        try:
            if not new and _changes(config, settings_file)[2]:
                # First, or a kill between the two would leave a run that looks finished.
                (workdir / "metrics.json").unlink(missing_ok=True)
                write_settings(config, settings_file)
            # Where the data lies now is for those who evaluate the run.
            elif new or read_settings(settings_file).dataset != config.dataset:
                write_settings(config, settings_file)
            if not (workdir / DATASET_FILE).exists():
                write_json(workdir / DATASET_FILE, dataset.metadata)
            for name in (ITEMS_FILE, *(FEATURES_FILE,) * (dataset.features is not None)):
                if not (workdir / name).exists():
                    with atomic_write(workdir / name) as file:
                        file.write((dataset.directory / name).read_bytes())
            if date_range is not None:
                write_date_range(workdir, date_range)
            yield
        except BaseException:
            if new and not (workdir / "log.jsonl").exists():
                for name in missing:
                    (workdir / name).unlink(missing_ok=True)
                if not there:
                    (workdir / ".lock").unlink()
                    with suppress(OSError):  # it holds something of somebody else
                        workdir.rmdir()
            raise


def _was_begun(workdir: Path) -> bool:
    """Whether a run directory holds what only a training writes."""
    saved = (checkpoint_steps(workdir / name) for name in ("checkpoints", "best"))
    return any((workdir / name).exists() for name in ("log.jsonl", "metrics.json")) or any(saved)


@contextmanager
def only_process(workdir: Path) -> Iterator[None]:
    """Keeps other processes from training in `workdir`.

    The system releases the lock when the process ends, however it ends.

    Raises:
      UserError: another process is training there.
    """
    # For reading too, so that nobody waits if it is a pipe.
    with (workdir / ".lock").open("a+b", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is training in {workdir}; wait for it") from error
        yield


def check_same_dataset(
    directory: Path,
    ours: dict,
    workdir: Path,
    *,
    more_items: bool = False,
    remedy: str = "restore it, or choose another --workdir",
) -> None:
    """Makes sure that a dataset is the one that a run began with, if the run says which that was.

    Args:
      directory: the folder of the dataset.
      ours: the metadata of that dataset.
      workdir: the run directory.
      more_items: whether the run may know further items (`tim4rec add-items`).
      remedy: what the message says to do.

    Raises:
      UserError: it is another dataset; the message says what tells them apart.
    """
    theirs = _kept_metadata(workdir, ours)
    if more_items and "added_items" in theirs:
        theirs = theirs | {"content": theirs.get("trained_content")}
    elif "added_items" in theirs and "added_items" not in ours:
        raise _knows_more(workdir, directory, theirs["added_items"])
    if changed := _differences(ours, theirs):
        raise UserError(
            f"{directory} is not the dataset that the run in {workdir} began with "
            f"(other {', '.join(changed)}); {remedy}"
        )


def _kept_metadata(workdir: Path, otherwise: dict) -> dict[str, Any]:
    """The metadata of the dataset that a run began with, or others if it keeps none."""
    path = workdir / DATASET_FILE
    return read_json(path, dict[str, Any], _RESTORE) if path.exists() else otherwise


def _knows_more(workdir: Path, directory: Path, added: int) -> UserError:
    return UserError(
        f"{workdir} knows {added:,} item{'s' * (added > 1)} more than {directory}, by `tim4rec "
        "add-items`, and no event tests them; name the run that they were added to"
    )


def _differences(ours: dict, theirs: dict) -> list[str]:
    """What tells the metadata of two datasets apart; nothing if the two hold the same events."""
    contents = [each.get("content") for each in (ours, theirs)]
    ours_content, theirs_content = (each if isinstance(each, dict) else {} for each in contents)
    # Titles are for people.
    both = ours_content.keys() & theirs_content.keys() - {"titles"}
    changed = sorted(name for name in both if ours_content[name] != theirs_content[name])
    if "sequences" in both:
        return changed
    # One of the two is of an earlier version, which kept no digests.
    keys = (ours | theirs).keys() - {"content"}
    return changed + sorted(key for key in keys if ours.get(key) != theirs.get(key))


class _Figures(TypedDict):
    test: dict[str, float]
    test_standard_errors: dict[str, float]
    users: int
    best_epoch: int
    epochs: int


def read_figures(workdir: Path) -> dict[str, Any]:
    """What `metrics.json` of a finished run holds.

    Raises:
      UserError: the file is missing or damaged.
    """
    path = workdir / "metrics.json"
    remedy = f"delete it and go on with the training of {workdir}, which writes it again"
    values = read_json(path, dict[str, Any], remedy)
    check_schema(values, _Figures, path, remedy)
    if values["test"].keys() != values["test_standard_errors"].keys():
        raise UserError(f"{path} is damaged (`test` has other figures than its errors); {remedy}")
    return values


def read_validations(workdir: Path) -> list[dict[str, Any]]:
    """What `log.jsonl` of a run says of its validations, in order; a torn line is left out.

    Each is a dictionary with `step`, `epoch`, and metrics such as `ndcg@10`.
    """
    log, found = workdir / "log.jsonl", []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        with suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            if record["kind"] == "valid" and "epoch" in record:
                found.append(record)
    return found


class _DateRange(TypedDict):
    first: int
    last: int
    sha256: str


def write_date_range(workdir: Path, date_range: tuple[int, int]) -> None:
    """Writes what `read_date_range` reads; the arguments are described there."""
    values: dict[str, Any] = dict(zip(("first", "last"), date_range, strict=True))
    write_json(workdir / "date_range.json", values | {"sha256": _digest(values)})


def read_date_range(workdir: Path) -> tuple[int, int] | None:
    """The times that a model with a date bias was trained on.

    Args:
      workdir: the run directory.

    Returns:
      The times of the first and the last training event, in seconds since 1970. None: the model
      has no date bias.
    """
    path = workdir / "date_range.json"
    if path.exists():
        # An earlier version wrote a list.
        values = read_json(path, _DateRange | Annotated[list[int], Len(2, 2)], _RESTORE)
        if isinstance(values, dict):
            _check_digest(values, path)
            values = [values["first"], values["last"]]
        first, last = values
        return first, last
    return config_lib.old_date_range(_read_settings(workdir / "config.json"))


def load_model(
    workdir: str | Path, *, fold: bool = True
) -> tuple[config_lib.Config, SequenceModel]:
    """The settings of a run, and its model with the parameters that were best on validation.

    Args:
      workdir: the run directory.
      fold: whether what the features of items add to their vectors is computed now, once, and
        written into the item table. The model then looks like one without features.

    Raises:
      UserError: the run directory or its best checkpoint is missing or damaged.
    """
    workdir = Path(workdir)
    config = read_settings(workdir / "config.json")
    best = workdir / "best"
    steps = checkpoint_steps(best)
    if not steps:
        raise UserError(f"{workdir} has no best checkpoint yet: let train.py finish an epoch there")
    checkpoint = best / str(max(steps))
    date_range = read_date_range(workdir)
    if config.model.date_bias_knots and date_range is None:
        raise UserError(f"{workdir / 'date_range.json'} is missing; {_RESTORE}")
    try:
        check_plain(checkpoint)
        recorded = read_digests(checkpoint)
        with ocp.StandardCheckpointer() as checkpointer:
            path = checkpoint.absolute() / "default"
            found: Any = checkpointer.metadata(path).item_metadata
            if found is None:
                raise UserError("the list of its arrays is damaged")
            sizes: Any = _sizes(config, found, workdir)
            # Shapes alone: nothing is drawn only to be replaced.
            model = nnx.eval_shape(
                lambda: build(
                    config.model, max_length=config.data.max_length, date_range=date_range, **sizes
                )
            )
            graphdef, params = nnx.split(model)
            wanted = jax.tree.map(_on_first_device, nnx.to_pure_dict(params))
            # Tables that were spread over devices have rows of zeros behind them.
            rows = _check_shapes(found, wanted, model.item_rows)
            stored = checkpointer.restore(path, wanted, strict=not rows)
        if recorded is not None:
            check_digests(stored, recorded)
    except Exception as error:  # of a damaged checkpoint, Orbax can say anything
        silence_echoes()
        raise UserError(
            f"the best checkpoint {checkpoint} cannot be read ({first_line(error)}); {_RESTORE}"
        ) from error
    if recorded is None:
        print(
            f"note: {checkpoint} is of an earlier version, which kept no digests of the weights: "
            "damage would not be noticed",
            file=sys.stderr,
        )
    nnx.replace_by_pure_dict(params, stored)
    best_model: Any = nnx.merge(graphdef, params)
    if fold and best_model.feature_maps is not None:
        best_model.item_embedding.fold()
    return config, best_model


def _check_shapes(found: Any, wanted: Any, tables: tuple[str, ...]) -> bool:
    """Makes sure that a checkpoint holds the arrays of a model, before any memory is taken.

    Returns:
      Whether tables have more rows there.
    """
    more = False
    shapes = [
        {name: (leaf.shape, leaf.dtype) for name, leaf in by_place(tree).items()}
        for tree in (found.tree if hasattr(found, "tree") else found, wanted)
    ]
    for name in sorted(shapes[0] | shapes[1]):
        held, expected = (each.get(name) for each in shapes)
        if held and expected and held != expected and name in tables:
            (shape, kind), (rows, same) = held, expected
            if kind == same and shape[1:] == rows[1:] and shape[0] > rows[0]:
                more = True
                continue
        if held != expected:
            raise UserError(
                f"it holds {_array(held)} for {name}, and the settings ask for {_array(expected)}"
            )
    return more


def _array(kind: tuple[tuple[int, ...], Any] | None) -> str:
    return "nothing" if kind is None else f"{kind[1]}{list(kind[0])}"


def _on_first_device(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return shape.update(sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))


def _sizes(config: config_lib.Config, stored: Any, workdir: Path) -> dict[str, Any]:
    """Numbers of items and users that the stored tables are for, and shapes of the features."""
    table = stored["item_embedding"]
    n_items = table["embedding"].shape[0] - model_class(config.model).special_rows
    items = workdir / ITEMS_FILE
    if items.exists():
        if not items.is_file():  # reading a pipe would wait for somebody who writes to it
            raise UserError(f"{items} is no file")
        # A table that was spread over devices has rows of zeros behind those of the items.
        n_items = min(n_items, pq.read_metadata(items).num_rows)
    sizes: dict[str, Any] = {"n_items": n_items}
    if "maps" in table:
        maps = table["maps"]
        rows = maps["excluded"].shape[0]
        codes, dense = (
            maps[name].shape if name in maps else (rows, 0) for name in ("codes", "dense")
        )
        sizes["item_features"] = FeatureArrays(
            np.zeros(codes, np.int32),
            np.zeros(codes, np.float32),
            np.zeros(dense, np.float32),
            np.zeros(rows, np.int64),
            maps["values"].shape[0] if "values" in maps else 1,
        )
    if "user_embedding" in stored:
        sizes["n_users"] = stored["user_embedding"]["embedding"].shape[0] - 1
    return sizes


def check_model(model: Any, n_items: int, dataset: Path, workdir: Path) -> None:
    """Makes sure that a run's model can score the items of a dataset.

    Raises:
        UserError: the weights are not finite, or belong to another number of items.
    """
    # By numpy: JAX would compile a program for every shape.
    params = jax.device_get(nnx.state(model, nnx.Param))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise UserError(f"{workdir}: the weights are not finite, the training has diverged")
    if model.n_items != n_items:
        added = _kept_metadata(workdir, {}).get("added_items", 0)
        if added and model.n_items - added == n_items:
            raise _knows_more(workdir, dataset, added)
        raise UserError(
            f"{workdir} was trained on {model.n_items} items and {dataset} has {n_items}; name "
            "the dataset of the training with --dataset, or train anew"
        )
