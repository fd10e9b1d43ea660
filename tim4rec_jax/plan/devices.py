"""Figures of devices, as their vendors publish them."""

from __future__ import annotations

import re
from typing import NamedTuple

from tim4rec_jax.errors import UserError


class Device(NamedTuple):
    """A kind of device.

    Attributes:
      memory: bytes.
      bfloat16: floating-point operations a second in matrix products of bfloat16.
      float32: the same for float32 at JAX's default precision, which is one bfloat16 product on a
        TPU and TensorFloat-32 on a GPU.
      bandwidth: bytes a second between the device and its memory.
      link: bytes a second that a device sends to its neighbours, in one direction.
      group: how many devices such links join.
      outside: bytes a second that a device sends out of its group.
      source: where the figures stand.
    """

    memory: int | float
    bfloat16: int | float
    float32: int | float
    bandwidth: int | float
    link: int | float
    group: int
    outside: int | float
    source: str


_TPU = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
# A GPU of these has a network card of 400 Gbit/s of its own in the vendor's machines (DGX H100,
# H200), and of 200 Gbit/s in DGX A100. Links of the vendors' tables count both directions. A host
# with 8 chips of TPU has 200 Gbit/s (v5e), which is what one slice sends to another.
DEVICES = {
    "v5e": Device(16e9, 197e12, 197e12, 819e9, 200e9, 256, 3e9, _TPU + "v5e"),
    "v5p": Device(95e9, 459e12, 459e12, 2765e9, 600e9, 8960, 6e9, _TPU + "v5p"),
    "v6e": Device(32e9, 918e12, 918e12, 1638e9, 400e9, 256, 6e9, _TPU + "v6e"),
    "a100": Device(80e9, 312e12, 156e12, 2039e9, 300e9, 8, 25e9, _NVIDIA + "a100/"),
    "h100": Device(80e9, 989e12, 494e12, 3350e9, 450e9, 8, 50e9, _NVIDIA + "h100/"),
    "h200": Device(141e9, 989e12, 494e12, 4800e9, 450e9, 8, 50e9, _NVIDIA + "h200/"),
    # Two cores of an AMD EPYC, measured (benchmarks/RESULTS.md): a large matrix product, and the
    # most that a training step moved in a second. Other machines differ by their number of cores.
    "cpu": Device(16e9, 1.6e11, 1.6e11, 1.85e10, 1e9, 1, 1e9, "measured on 2 cores"),
}


def parse(text: str) -> tuple[int, str]:
    """Reads `16xv5e` or `h100` as a number of devices and the name of their kind.

    Raises:
      UserError: it is neither.
    """
    match = re.fullmatch(r"(?:([0-9]{1,6})x)?([a-z0-9]+)", text.lower())
    count, name = (int(match[1] or 1), match[2]) if match else (0, "")
    if name not in DEVICES or count < 1:
        raise UserError(
            f"--devices {text!r} is not known; write a number and a kind, such as 16xv5e; kinds "
            f"are {', '.join(DEVICES)}"
        )
    return count, name
