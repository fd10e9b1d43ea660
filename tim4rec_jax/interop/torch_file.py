"""Reads files of `torch.save` without torch, and without running anything from them.

Such a file is a zip archive. `NAME/data.pkl` is a pickle whose tensors point at raw little-endian
storages `NAME/data/0`, `NAME/data/1` and so on. The unpickler knows four names. An object of any
other class becomes an `Inert` record of its state. So a RecBole `Config` can be read without
RecBole, and nothing from the file is executed.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from tim4rec_jax.errors import UserError

_STORAGE_DTYPES = {
    "torch.ComplexDoubleStorage": np.dtype(np.complex128),
    "torch.ComplexFloatStorage": np.dtype(np.complex64),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}


class Inert(dict):
    """The state of an object of an unknown class, as a dict."""

    origin = "?"

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {"state": state})

    def append(self, item):
        """Keeps the items that the pickle of a list appends."""
        self.setdefault("items", []).append(item)

    # Such objects also occur as keys of a dictionary.
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True)
class TensorRef:
    """The place of a tensor in the archive; the tensor is read later."""

    storage: tuple
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_):
    return TensorRef(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data, *_):
    return data


class _Unpickler(pickle._Unpickler):
    """Builds only containers, numbers, strings, tensor references and `Inert` records.

    It is based on the unpickler in Python. The one in C trusts the sizes that a damaged file
    states, and allocates gigabytes. The opcode for bytearrays does the same. torch does not use
    that opcode, so it is removed.
    """

    dispatch = {  # noqa: RUF012  (never changed)
        code: run
        for code, run in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }
    _KNOWN = {  # noqa: RUF012
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
        "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    }

    def find_class(self, module, name):
        origin = f"{module}.{name}"
        return self._KNOWN.get(origin) or type("Inert", (Inert,), {"origin": origin})

    def persistent_load(self, pid):
        return pid  # ("storage", class, key, device, number of elements)


def _read_tensor(archive: zipfile.ZipFile, root: str, ref: TensorRef) -> np.ndarray:
    _, kind, key, *_ = ref.storage
    dtype = _STORAGE_DTYPES[kind.origin]
    storage = np.frombuffer(archive.read(f"{root}data/{key}"), dtype)
    last = ref.offset + sum((n - 1) * s for n, s in zip(ref.shape, ref.strides, strict=True))
    if min(0, ref.offset, *ref.shape, *ref.strides) < 0:
        raise ValueError("it has a negative offset, size or stride")
    if (0 not in ref.shape and last >= storage.size) or math.prod(ref.shape) > storage.size:
        raise ValueError("it reaches beyond its storage")
    strides = [s * dtype.itemsize for s in ref.strides]
    view = np.lib.stride_tricks.as_strided(storage[ref.offset :], ref.shape, strides)
    return np.array(view, order="C")


def _read_parameter(archive: zipfile.ZipFile, root: str, name: str, ref: object) -> np.ndarray:
    if not isinstance(ref, TensorRef):
        kind = getattr(ref, "origin", type(ref).__name__)
        raise UserError(f"{name!r} is no tensor but {kind!r}")
    try:
        return _read_tensor(archive, root, ref)
    except Exception as error:  # reading a damaged file can fail in any way
        raise UserError(f"parameter {name!r} cannot be read: {str(error)!r}") from None


def _read_archive(archive: zipfile.ZipFile) -> tuple[dict, dict[str, np.ndarray]]:
    size = sum(member.compress_size for member in archive.infolist())
    for member in archive.infolist():
        # torch does not compress. What is unpacked here is no larger than the file.
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
            raise UserError(
                f"its part {member.filename!r} is compressed, which torch.save does not"
            )
    names = archive.namelist()
    root = next((n.removesuffix("data.pkl") for n in names if n.endswith("/data.pkl")), None)
    if root is None:
        raise UserError("it is a zip archive, but none that torch.save wrote")
    order = f"{root}byteorder"
    if order in names and archive.read(order) != b"little":
        raise UserError("it was written on a big-endian machine: save it again on another")
    saved, config = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl"))).load(), None
    if isinstance(saved, Mapping) and "state_dict" in saved:
        saved, config = saved["state_dict"], saved.get("config")
    if not (isinstance(saved, Mapping) and saved):
        raise UserError(
            "it holds no weights: expected a dict with 'state_dict' and 'config', as RecBole's "
            "trainer saves it, or a state dict alone"
        )
    config = config if isinstance(config, Mapping) else {}
    config = dict(config.get("final_config_dict", config))
    return config, {str(n): _read_parameter(archive, root, n, ref) for n, ref in saved.items()}


def _check_kind(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} is not a file: name a checkpoint (.pth)")
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80":  # a bare pickle
        raise UserError(
            f"{path} has the format torch wrote before version 1.6: load it in torch with "
            "torch.load(FILE, weights_only=False) and torch.save it again"
        )
    if start != b"PK\x03\x04":
        raise UserError(f"{path} is not a checkpoint: torch.save writes a zip archive")


def read_checkpoint(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Reads a checkpoint of the published code: a file of RecBole's trainer, or a state dict alone.

    Args:
      path: a file that `torch.save` wrote (zip format, torch 1.6 or later).

    Returns:
      The final configuration of RecBole, which is empty if the file holds none, and the array of
      each torch name. float16 and bfloat16 keep their dtype. Tensors of the optimizer are not
      read.

    Raises:
      UserError: the file is missing, damaged, without weights, or not written by `torch.save`.
    """
    path = Path(path)
    _check_kind(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # reading a damaged file can fail in any way
        raise UserError(
            f"{path} is damaged or incomplete ({str(error)!r}): copy it again"
        ) from None
