"""Where programs run: devices, the cache of compiled programs, the platform compiled for."""

import contextlib
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tim4rec_jax.errors import UserError

# The axes of a mesh of devices: the rows of a batch are split along the first one. Tables of items
# are split over both, where they are split.
AXES = ("data", "items")


class Placement(NamedTuple):
    """How arrays lie on devices.

    Attributes:
      devices: how many devices the rows of a batch are split over.
      by_row: the sharding of an array with a row for each sample: the rows are split evenly.
      replicated: the sharding of parameters: each device holds all of them.
      by_item: the sharding of tables with a row for each item. None: they are replicated too.
    """

    devices: int
    by_row: NamedSharding
    replicated: NamedSharding
    by_item: NamedSharding | None = None

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.replicated.mesh  # type: ignore[return-value]  # no abstract mesh


def data_sharding(rows: int) -> Placement:
    """Spreads batches over the local devices.

    Args:
      rows: number of rows in a batch. Each device gets the same number of rows, so the largest
        number of devices is used that divides `rows`.
    """
    devices = jax.local_devices()
    return _placement(make_mesh(math.gcd(len(devices), rows), 1, devices))


def item_sharding(rows: int, data: int | None, items: int) -> Placement:
    """Spreads batches and tables of items over the devices of all processes.

    Args:
      rows: number of rows in a batch.
      data: number of devices, or groups of devices, that share the rows. None: the largest one that
        divides both their number and the rows.
      items: number of devices in a group. They compute scores of the same rows, of other items.

    Raises:
      UserError: there are fewer devices, they cannot share the rows, or a process has none of them.
    """
    devices, asked = jax.devices(), data
    every = len(devices)
    data = math.gcd(max(every // items, 1), rows) if asked is None else asked
    if data * items > every:
        raise UserError(
            f"config.mesh asks for {data} x {items} devices, and there are {every}; lower "
            "config.mesh.data or config.mesh.catalogue (JAX_NUM_CPU_DEVICES=8 simulates eight)"
        )
    if rows % data:
        raise UserError(
            f"{rows} rows cannot be shared by config.mesh.data={data}; take a multiple of it for "
            "config.train.batch_size"
        )
    chosen, all_processes = (
        {device.process_index for device in some} for some in (devices[: data * items], devices)
    )
    if chosen < all_processes:
        remedy = f"let config.mesh.data x config.mesh.catalogue be {every}"
        if asked is None and data < every // items:
            remedy = f"take a multiple of {every // items} for it"
        raise UserError(
            f"{data} x {items} of {every} devices share config.train.batch_size={rows}, which "
            f"leaves processes without a device; {remedy}"
        )
    placement = _placement(make_mesh(data, items, devices))
    return placement._replace(by_item=NamedSharding(placement.mesh, PartitionSpec(AXES)))


def make_mesh(data: int, items: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of the first `data * items` devices."""
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh((data, items), AXES, kinds, devices=devices[: data * items])


def _placement(mesh: Mesh) -> Placement:
    return Placement(
        devices=mesh.shape["data"],
        by_row=NamedSharding(mesh, PartitionSpec("data")),
        replicated=NamedSharding(mesh, PartitionSpec()),
    )


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Puts arrays of the host on the devices of all processes, each of which has all of them."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


def put_rows(tree: Any, sharding: NamedSharding) -> Any:
    """Puts rows of a batch on the devices, of which each process has its own."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next run starts at once.

    They are kept in `$XDG_CACHE_HOME/tim4rec-jax/xla`, by default `~/.cache/tim4rec-jax/xla`. The
    environment variable JAX_COMPILATION_CACHE_DIR names another folder. The folder can be deleted
    at any time.
    """
    # JAX warns where a kill or a full disk has damaged an entry, and compiles that program again.
    damaged = "Error (reading|writing) persistent compilation cache entry"
    warnings.filterwarnings("ignore", damaged, UserWarning)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "tim4rec-jax" / "xla"))
    # JAX keeps only programs that compile slowly. The initial weights of a model are drawn by some
    # fifty quick ones, which take seconds together.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def keep_bits() -> None:
    """Has XLA leave the same bits in every run on a GPU, too.

    By default, threads of a GPU add numbers in the order in which they come by, and XLA times
    several programs for a matrix product and takes the fastest, which may be another one tomorrow.
    A flag in the environment variable XLA_FLAGS rules out both. JAX reads the variable when it
    compiles for the first time; a call that comes later changes nothing. What the user has set
    there stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def host_memory() -> int | None:
    """Bytes that the host has left for this process. None: unknown."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # Linux
        for line in meminfo.read_text().splitlines():
            if line.startswith(("MemAvailable:", "SwapFree:")):
                found.append(1024 * int(line.split()[1]))
        found = [sum(found)]
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        found.append(int(text))
    return min(found, default=None)


def check_memory(what: str, needed: int, remedy: str) -> None:
    """Makes sure that the host has memory for something, before it is taken.

    Without the check, a process that asks for too much ends without a word.

    Args:
      what: what the memory is for.
      needed: bytes.
      remedy: what to do about it.

    Raises:
      UserError: less is free.
    """
    free = host_memory()
    if free is not None and needed > free:
        raise UserError(
            f"{what} take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; {remedy}"
        )


class Target(NamedTuple):
    """What programs are compiled for.

    Attributes:
      platform: "cpu", "gpu" or "tpu", as `jax.default_backend` names it.
      compute_capability: that of the NVIDIA GPU compiled for, 90 for an H100. None: that of the
        GPU in this machine.
    """

    platform: str
    compute_capability: int | None = None


_context = jax.make_user_context()


def compile_for(
    platform: str, compute_capability: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """Traces programs as if they ran on another platform.

    Within this context, the package chooses and refuses implementations as it would on that
    platform. Programs can thus be lowered, or compiled ahead of time, on a machine without the
    device. Arrays stay on the platform of this machine, and calls still run there.

    Args:
      platform: "cpu", "gpu" or "tpu".
      compute_capability: that of an NVIDIA GPU, 90 for an H100.

    Returns:
      A context manager.
    """
    return _context(Target(platform, compute_capability))


def target() -> Target:
    """The target of the innermost `compile_for`, or the default backend outside of one."""
    return _context.value or Target(jax.default_backend())
