"""Whether a training fits the memory, found out before anything large is allocated."""

import jax

from tim4rec_jax import item_rows
from tim4rec_jax.config import Config
from tim4rec_jax.data.pipeline import PREFETCH
from tim4rec_jax.errors import UserError
from tim4rec_jax.runtime import host_memory

_BYTES = 4  # of a float32 or an int32


def check_memory(
    config: Config, parameters: dict, tables: tuple[str, ...] = (), devices: int = 1
) -> None:
    """Makes sure that a training can fit the memory.

    What is added up is the least that the training needs. It can still be too large, but nothing
    is refused that could work.

    Args:
      config: the settings of the run, resolved.
      parameters: the shapes of the model's parameters, as `nnx.to_pure_dict` returns them.
      tables: the places of parameters that are spread over the devices by rows.
      devices: number of those devices. Simulated ones share one memory.

    Raises:
      UserError: it does not fit; the message names the settings to lower.
    """
    events, rows, validated = (
        config.data.max_length,
        config.train.batch_size,
        config.eval.batch_size,
    )
    width = parameters["item_embedding"]["embedding"].shape[-1]
    parameters, rows_of = item_rows.split(parameters, tables)
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    spread = sum(leaf.size for leaf in rows_of.values())
    # Parameters, their gradient, and the two means that Adam keeps; or what the optimizer of rows
    # keeps instead, and no gradient but of the batch.
    copies = {"adam": 4, "lazy_adam": 3, "adagrad": 1}[config.train.item_optimizer]
    numbers = 4 * count + copies * spread // (1 if jax.default_backend() == "cpu" else devices)
    waiting = PREFETCH if jax.default_backend() == "cpu" else 1
    # Items and gaps of a row, its weight and its dropout seed.
    row = (2 * events + 2) * _BYTES
    needs = {
        # The batches that wait on the host. A CPU has the hidden states of some rows only.
        waiting * rows * row + 2 * min(rows, 8) * events * width * _BYTES: (
            f"batches of {rows:,} rows of {events:,} events",
            "config.train.batch_size or config.data.max_length",
        ),
        validated * (row + events * width * _BYTES): (
            f"validation of {validated:,} users at once with {events:,} events each",
            "config.eval.batch_size or config.data.max_length",
        ),
        numbers * _BYTES: (
            f"the model's {count + spread:,} parameters with gradient and optimiser",
            "the sizes in config.model or config.data.max_length",
        ),
    }
    if config.train.loss in ("sampled_softmax", "gbce", "bpr"):
        needs[2 * min(rows, 8) * config.train.negatives * _BYTES] = (
            f"the scores of {config.train.negatives:,} negatives",
            "config.train.negatives",
        )
    need, free = max(needs), available_memory()
    if free is not None and need > free:
        what, remedy = needs[need]
        raise UserError(
            f"{what} need at least {need / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are "
            f"there; lower {remedy}"
        )


def available_memory() -> int | None:
    """Bytes that a training can have: of the device, or what the host has left. None: unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return host_memory()
