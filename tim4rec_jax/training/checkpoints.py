"""What a run directory keeps: the latest state to resume from, the best parameters."""

import dataclasses
import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from grain.checkpoint import CheckpointSave
from orbax.checkpoint import future

from tim4rec_jax import item_rows
from tim4rec_jax.digests import DIGESTS, check_digests, digests, json_array, read_digests
from tim4rec_jax.errors import UserError, first_line
from tim4rec_jax.files import check_plain
from tim4rec_jax.run import checkpoint_steps
from tim4rec_jax.training import processes
from tim4rec_jax.training.state import TrainState

# Orbax reports every file it touches and warns of optional ones; what fails, raises as well.
logging.set_verbosity(logging.FATAL)


def _manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def _as_tree(state: TrainState) -> dict:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return fields | {"params": nnx.to_pure_dict(state.params)}


def _storable(state: TrainState) -> dict:
    """The state as a tree of plain arrays (a key is stored as the words it is made of)."""
    return _as_tree(state) | {"rng": jax.random.key_data(state.rng)}


# Bytes of an array that Orbax packs at once, and of a file. It holds both, packed, in memory.
_PART = 1 << 26


def _in_parts(arrays: Any) -> ocp.args.PyTreeSave:
    """Has Orbax write large arrays in parts, or it would hold another copy of all of them."""
    args = jax.tree.map(_parts, arrays)
    sizes = [part.chunk_byte_size or 0 for part in jax.tree.leaves(args)]
    # Orbax cuts whatever is larger than a file, if need be into single rows.
    return ocp.args.PyTreeSave(
        arrays, save_args=args, ocdbt_target_data_file_size=max(_PART, *sizes)
    )


def _parts(array: Any) -> ocp.SaveArgs:
    """How an array is cut: into parts of equal numbers of rows, or else into its columns."""
    copies, shape = 1, array.shape
    if isinstance(array, jax.Array):
        shape = array.sharding.shard_shape(shape)
        copies = len(array.sharding.device_set) * math.prod(shape) // max(array.size, 1)
    size = math.prod(shape) * array.dtype.itemsize
    if size <= _PART:
        return ocp.SaveArgs()
    if copies > 1:  # each device may write a part of its own
        return ocp.SaveArgs(chunk_byte_size=size)
    least = -(-size // _PART)
    parts = next((n for n in range(least, 64 * least) if shape[0] % n == 0), 1)
    if parts > 1 or array.ndim == 1:
        return ocp.SaveArgs(chunk_byte_size=size // parts)
    return ocp.SaveArgs(chunk_byte_size=size // shape[-1], shard_axes=(array.ndim - 1,))


# Names of what is saved as JSON, among the digests of arrays.
_AS_ARRAYS = ("data", "progress")


def _as_arrays(iterator, progress: Mapping) -> dict[str, np.ndarray]:
    """The place in the data and the progress, which are saved as JSON, in a form to digest."""
    return {"data": json_array(iterator.get_state()), "progress": json_array(dict(progress))}


class _DigestsHandler(ocp.AsyncCheckpointHandler):
    """Writes the digests of arrays, which it computes in the background while they are saved."""

    async def async_save(self, directory, args) -> list[Any]:
        if processes.together():  # the digests of tables are computed together
            found = digests(args.arrays, args.rows)

            async def write():
                if processes.first():
                    (directory / DIGESTS).write_text(json.dumps(found))

        else:
            # The values of now; the next step of the training may overwrite the arrays on the
            # device.
            copy = _SaveDigests(jax.tree.map(np.asarray, args.arrays), args.rows)

            async def write():
                self.save(directory, copy)

        return [future.CommitFutureAwaitingContractedSignals(write(), name="digests")]

    def save(self, directory, args):
        (directory / DIGESTS).write_text(json.dumps(digests(args.arrays, args.rows)))

    def restore(self, directory, args=None):
        return read_digests(Path(directory).parent)


@ocp.args.register_with_handler(_DigestsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SaveDigests(ocp.args.CheckpointArgs):
    """The arrays whose digests are saved, and the numbers of rows that count, by place."""

    arrays: Any
    rows: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run.

    `checkpoints/` holds the last two states of training (parameters, optimizer, random key,
    iterator over the data, progress), `best/` the parameters that were best on validation.
    Orbax writes in the background, to a temporary name that it renames when complete. Beside the
    arrays lie their digests (`tim4rec_jax.digests`), which are compared when they are read.
    """

    def __init__(
        self, workdir: Path, shapes: TrainState | None = None, tables: tuple[str, ...] = ()
    ):
        """Opens the checkpoints of a run directory, or begins them.

        Args:
          workdir: the run directory.
          shapes: those of a state whose tables have as many rows as the model has.
          tables: the places of parameters that are spread over devices. These may have more rows
            in the states that are saved, and other numbers of them in those that are restored.

        Raises:
          UserError: among them is something that is neither a file nor a folder, or a description
            of a checkpoint that is damaged.
        """
        self.workdir, self._rows, self._rows_of_best = workdir, {}, {}
        if shapes is not None:
            storable = jax.eval_shape(_storable, shapes)
            self._rows = item_rows.numbers_of_rows(storable, tables)
            self._rows_of_best = item_rows.numbers_of_rows(storable["params"], tables)
        managers = []
        for name, keep in (("checkpoints", 2), ("best", 1)):
            folder = workdir / name
            try:
                check_plain(folder)  # Orbax reads a file of every checkpoint at once
                managers.append(_manager(folder, keep))
            except OSError:
                raise
            except Exception as error:  # of a damaged checkpoint, Orbax can say anything
                raise UserError(
                    f"{folder} holds a damaged checkpoint ({first_line(error)}): remove it, or "
                    "delete the run directory to start anew"
                ) from error
        self.latest, self.best = managers

    def save(self, state: TrainState, iterator, progress: Mapping) -> None:
        """Saves everything needed to go on from here; a step saved already is left as it is."""
        step = int(state.step)
        if step in self.latest.all_steps():
            return
        arrays = _storable(state)
        with self._naming_what_fails():
            self.latest.save(
                step,
                args=ocp.args.Composite(
                    state=_in_parts(arrays),
                    digests=_SaveDigests(arrays | _as_arrays(iterator, progress), self._rows),
                    data=CheckpointSave(iterator),
                    progress=ocp.args.JsonSave(dict(progress)),
                ),
            )

    def save_best(self, step: int, params: nnx.State) -> None:
        """Saves the parameters of the best validation so far."""
        if step not in self.best.all_steps():
            arrays = nnx.to_pure_dict(params)
            with self._naming_what_fails():
                self.best.save(
                    step,
                    args=ocp.args.Composite(
                        default=_in_parts(arrays),
                        digests=_SaveDigests(arrays, self._rows_of_best),
                    ),
                )

    def restore(self, state: TrainState, iterator) -> tuple[TrainState, dict] | None:
        """The latest state that can be read, or None where there is none yet.

        Args:
          state: a state of the right structure and placement, of arrays or shapes.
          iterator: over the training batches; is moved to where the run was.

        Raises:
          UserError: there are checkpoints and none can be read, or the system refuses to read one.
        """
        steps = sorted(self.latest.all_steps(), reverse=True)
        wanted = jax.tree.map(
            lambda shape, leaf: shape.update(sharding=leaf.sharding),
            jax.eval_shape(_storable, state),
            _as_tree(state),
        )
        for step in steps:
            try:
                folder = Path(self.latest.directory) / str(step)
                check_plain(folder)
                recorded = read_digests(folder)
                arrays = _read(folder / "state", wanted, strict=recorded is None)
                told = ocp.args.Composite(progress=ocp.args.JsonRestore())
                progress = self.latest.restore(step, args=told)["progress"]
                _restore_iterator(iterator, folder / "data")
                if recorded is not None:
                    found = dict(arrays)
                    # Earlier versions recorded the arrays only.
                    if "progress" in recorded:
                        found |= _as_arrays(iterator, progress)
                    check_digests(found, recorded, self._rows)
            # Damage shows as whatever the layer that meets it raises.
            except Exception as error:
                where = self.latest.directory / str(step)
                if reason := _refusal(error):
                    raise UserError(
                        f"checkpoint {where} cannot be read ({reason}), and nothing was deleted: "
                        "put that right and run the same command again, or move the checkpoint "
                        "away to go on from the one before"
                    ) from error
                print(f"checkpoint {where} is damaged, passing over it: {first_line(error)}")
                continue
            # The damaged ones would stand in the way of those that will be saved again.
            for damaged in [later for later in steps if later > step]:
                self.latest.delete(damaged)
            return _from_storable(state, arrays), progress
        if steps:
            raise UserError(
                f"no checkpoint in {self.latest.directory} can be read; "
                "delete the run directory to start anew"
            )
        return None

    def restore_best(self, params: nnx.State) -> nnx.State:
        """The best parameters.

        Args:
          params: their shapes, and where they belong.

        Raises:
          UserError: they are damaged, or the system refuses to read them.
        """
        step = max(self.best.all_steps())
        folder = Path(self.best.directory) / str(step)
        try:
            recorded = read_digests(folder)
            wanted = nnx.to_pure_dict(params)
            stored = _read(folder / "default", wanted, strict=recorded is None)
            if recorded is not None:
                check_digests(stored, recorded, self._rows_of_best)
        # Damage shows as whatever the layer that meets it raises.
        except Exception as error:
            reason, remedy = first_line(error), "train anew"
            if refused := _refusal(error):
                reason, remedy = refused, "put that right and run the same command again"
            raise UserError(
                f"the best checkpoint {folder} cannot be read ({reason}); {remedy}"
            ) from error
        best = jax.tree.map(lambda x: x, params)
        nnx.replace_by_pure_dict(best, stored)
        return best

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        with self._naming_what_fails():
            self.latest.wait_until_finished()
            self.best.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written and ends the background threads."""
        with self._naming_what_fails():
            self.latest.close()
            self.best.close()

    @contextmanager
    def _naming_what_fails(self) -> Iterator[None]:
        """Turns what the operating system refuses, a full disk say, into a `UserError`."""
        try:
            yield
        except (OSError, ValueError) as error:
            # Tensorstore, below Orbax, raises ValueErrors that quote the system's.
            if isinstance(error, ValueError) and "[os_error_code" not in str(error):
                raise
            reason = str(error).rpartition(": ")[2].partition(" [os_error")[0]
            raise UserError(
                f"a checkpoint cannot be written to {self.workdir} ({reason}); the one before "
                "it is kept: put that right and run the same command again"
            ) from error


def _read(folder: Path, wanted: Any, strict: bool) -> Any:
    """Reads arrays.

    Tables may have other numbers of rows behind those of the model, unless it is strict. What has a
    digest can have lost none without being noticed.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), wanted, strict=strict)


# What the system says where a file is missing, or something else has its place.
_OF_DAMAGE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENXIO,
    errno.EINVAL,
    errno.EFBIG,
}


def _refusal(error: BaseException | None) -> str | None:
    """Why a checkpoint could not be read that may be whole; None if the error is one of damage.

    The memory did not suffice, or the operating system refused to read it.
    """
    while error is not None:
        of_device = isinstance(error, jax.errors.JaxRuntimeError)
        if isinstance(error, MemoryError) or (of_device and "RESOURCE_EXHAUSTED" in str(error)):
            return "the memory does not suffice"
        number = error.errno if isinstance(error, OSError) else None
        # Tensorstore, below Orbax, raises ValueErrors that quote the system's.
        if quoted := re.search(r"\[os_error_code='(\d+)'", str(error)):
            number = int(quoted[1])
        if number is not None and number not in _OF_DAMAGE:
            return os.strerror(number)
        error = error.__cause__
    return None


def _restore_iterator(iterator, folder: Path) -> None:
    """Moves an iterator to where the run was.

    Each process has saved the same place. There may have been other numbers of processes.
    """
    files = sorted(folder.glob("process_*-of-*.json"))
    if not files:
        raise ValueError(f"{folder} does not say where in the data the run was")
    iterator.set_state(json.loads(files[0].read_text()))
    iterator.start_prefetch()


def read_state(
    workdir: Path, shapes: TrainState, tables: tuple[str, ...] = ()
) -> TrainState | None:
    """The state of a run that another one begins with. Nothing in the run is changed.

    Args:
      workdir: the run directory.
      shapes: a state of the right structure, with shapes for arrays.
      tables: the places of parameters that may have been spread over devices, see `Checkpoints`.

    Returns:
      The state that was saved with the run's best parameters, or else the latest one that can be
      read. None: there is none.

    Raises:
      UserError: the system refuses to read one.
    """
    steps, best = (checkpoint_steps(workdir / name) for name in ("checkpoints", "best"))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    storable = jax.eval_shape(_storable, shapes)
    rows = item_rows.numbers_of_rows(storable, tables)
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), storable
    )
    for step in sorted(steps, key=lambda step: (step in best, step), reverse=True):
        checkpoint = workdir / "checkpoints" / str(step)
        try:
            check_plain(checkpoint)
            recorded = read_digests(checkpoint)
            stored = _read(checkpoint / "state", wanted, strict=recorded is None)
            if recorded is not None:
                of_arrays = {n: recorded[n] for n in recorded if n not in _AS_ARRAYS}
                check_digests(stored, of_arrays, rows)
        # Damage shows as whatever the layer that meets it raises.
        except Exception as error:
            if reason := _refusal(error):
                raise UserError(
                    f"checkpoint {checkpoint} cannot be read ({reason}); put that right and run "
                    "the same command again"
                ) from error
            print(f"checkpoint {checkpoint} is damaged, passing over it: {first_line(error)}")
            continue
        return _from_storable(shapes, stored)
    return None


def _from_storable(state: TrainState, stored: dict) -> TrainState:
    params = jax.tree.map(lambda x: x, state.params)
    nnx.replace_by_pure_dict(params, stored["params"])
    rest = {name: stored[name] for name in ("step", "opt_state", "bad_step")}
    return dataclasses.replace(
        state,
        **rest,
        params=params,
        rng=jax.random.wrap_key_data(stored["rng"]),
        loss_sum=stored["loss_sum"],
        weight_sum=stored["weight_sum"],
    )
