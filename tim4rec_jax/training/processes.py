"""Several processes that train together: how they find each other, and what they agree on.

Every process runs the same command. The first one writes the run directory and speaks; all of them
write their parts of checkpoints. What is decided by time or by a signal is decided together, or
one process would wait in a step that another one never takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tim4rec_jax.errors import UserError, first_line

# A process that is gone is noticed after so many seconds, where no message to it has failed before.
_HEARTBEAT = 30


def join() -> None:
    """Joins the other processes of a training, where the environment names them.

    On one's own machines `JAX_COORDINATOR_ADDRESS` (host:port of the first process),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (from 0) name them. With `JAX_DISTRIBUTED=auto`, JAX
    asks the cluster: TPU pods, Slurm, Open MPI, Kubernetes. Without these variables nothing
    happens.

    Raises:
      UserError: a variable is missing or wrong, or the others cannot be reached.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, number = (os.environ.get(name) for name in names)
    if address is None and os.environ.get("JAX_DISTRIBUTED") != "auto":
        return
    settings: dict = {}
    if address is not None:
        if count is None or number is None:
            raise UserError(f"{names[0]} is set, so {names[1]} and {names[2]} must be set too")
        if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            raise UserError(
                f"{names[1]} is {count!r} and {names[2]} is {number!r}; take numbers, from 0 below "
                "the number of processes"
            )
        settings = dict(
            coordinator_address=address, num_processes=int(count), process_id=int(number)
        )
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=_HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes do not find each other: {first_line(error)}") from error


def first() -> bool:
    """Whether this process writes and speaks."""
    return jax.process_index() == 0


def together() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def agreed(stop: bool, save: bool) -> tuple[bool, bool]:
    """What all processes do next.

    Args:
      stop: whether this process was asked to stop; one is enough.
      save: whether it is time for a checkpoint; the first process decides.
    """
    if not together():
        return stop, save
    wishes = multihost_utils.process_allgather(np.array([stop, save], np.int32))
    return bool(wishes[:, 0].any()), bool(wishes[0, 1])


class Stop:
    """Whether a signal asked the run to stop, and which one."""

    def __init__(self):
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Turns the first Ctrl-C or SIGTERM into a request. A second one acts at once.

    Python lets only the main thread do this. In another one, nothing is ever requested.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[Any, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number, frame):
        stop.signal = number
        restore()

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


def share(data: int) -> tuple[int, int]:
    """Which part of the rows of every batch this process makes.

    Args:
      data: number of devices, or groups of devices, that share the rows.

    Returns:
      The number of the part, and the number of parts. Processes whose devices are in one group
      make the same part.

    Raises:
      UserError: a group of devices would be torn apart unevenly.
    """
    count, index = jax.process_count(), jax.process_index()
    if data % count == 0:
        return index, count
    if count % data == 0:
        return index // (count // data), data
    raise UserError(
        f"config.mesh.data={data} cannot be shared by {count} processes; take a multiple or a "
        "divisor of their number"
    )


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Lets the first process speak alone, and ends all of them when one is gone.

    Raises:
      UserError: a message to another process failed.
    """
    if not together():
        yield
        return
    # JAX aborts the process when the first one is gone. It runs no code of Python before that (a
    # `missed_heartbeat_callback` fails on the type of its argument), so C is told what to call.
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
    try:
        with contextlib.ExitStack() as stack:
            if not first():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    except BaseException as raised:
        error: Any = raised
        if isinstance(error, jax.errors.JaxRuntimeError):
            _end(_GONE.format(first_line(error)))
        _end(str(error) or type(error).__name__, isinstance(error, KeyboardInterrupt))


_GONE = (
    "another process of this training is gone ({}); start all of them again to go on from the last "
    "checkpoint"
)


def _end(words: str, interrupted: bool = False) -> None:
    print(f"error: {words}", file=sys.stderr, flush=True)
    # At the normal end of a program, JAX would wait for processes that do not come.
    os._exit(130 if interrupted else 1)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    del number
    _end(_GONE.format("JAX says above what it noticed"))
