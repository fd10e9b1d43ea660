"""Writes files as `torch.save` does, without torch: arrays stand for tensors."""

import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from unittest import mock

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}


def _module(name: str, *members) -> types.ModuleType:
    module = types.ModuleType(name)
    for member in members:
        member.__module__, member.__qualname__ = name, member.__name__
        setattr(module, member.__name__, member)
    return module


def _rebuild_tensor_v2(*_): ...


def _rebuild_parameter(*_): ...


class Config:
    """Stands for `recbole.config.configurator.Config`."""

    def __init__(self, final_config_dict: dict):
        self.final_config_dict = final_config_dict
        self.parameters = {"Training": ["epochs"]}
        self.model_class = ModelType


class ModelType:
    """Stands for an enumeration: pickled as a call of its class."""

    def __reduce__(self):
        return ModelType, (2,)


_STORAGE_CLASSES = {name: type(name, (), {}) for name in STORAGES.values()}
_MODULES = {
    "torch": _module("torch", *_STORAGE_CLASSES.values()),
    "torch._utils": _module("torch._utils", _rebuild_tensor_v2, _rebuild_parameter),
    "recbole": types.ModuleType("recbole"),
    "recbole.config": types.ModuleType("recbole.config"),
    "recbole.config.configurator": _module("recbole.config.configurator", Config),
    "recbole.utils": types.ModuleType("recbole.utils"),
    "recbole.utils.enum_type": _module("recbole.utils.enum_type", ModelType),
}


@dataclass
class Parameter:
    """An array saved as `torch.nn.Parameter`."""

    data: np.ndarray

    def __reduce__(self):
        return _rebuild_parameter, (self.data, True, OrderedDict())


@dataclass
class _Storage:
    array: np.ndarray  # owns its memory


class _Pickler(pickle.Pickler):
    def __init__(self, file):
        super().__init__(file, protocol=4)
        self.storages = []

    def persistent_id(self, obj):
        if not isinstance(obj, _Storage):
            return None
        self.storages.append(obj.array)
        kind = _STORAGE_CLASSES[STORAGES[obj.array.dtype.name]]
        return "storage", kind, str(len(self.storages) - 1), "cpu", obj.array.size

    def reducer_override(self, obj):
        if not isinstance(obj, np.ndarray):
            return NotImplemented
        base = obj if obj.base is None else obj.base
        offset = (obj.ctypes.data - base.ctypes.data) // obj.itemsize
        strides = tuple(s // obj.itemsize for s in obj.strides)
        args = _Storage(base), offset, obj.shape, strides, False, OrderedDict()
        return _rebuild_tensor_v2, args


def torch_save(obj: object, path: Path, byteorder: bytes = b"little") -> Path:
    """Saves `obj`; views of arrays become tensors on the storage they are views of."""
    with mock.patch.dict(sys.modules, _MODULES):
        buffer = BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump(obj)
    root = path.stem
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", buffer.getvalue())
        archive.writestr(f"{root}/byteorder", byteorder)
        for key, array in enumerate(pickler.storages):
            archive.writestr(f"{root}/data/{key}", array.tobytes())
        archive.writestr(f"{root}/version", b"3\n")
    return path


def recbole_checkpoint(state_dict: dict, config: dict) -> dict:
    """What RecBole's trainer saves."""
    return {
        "config": Config(config | {"MODEL_TYPE": ModelType()}),
        "epoch": 3,
        "cur_step": 0,
        "best_valid_score": 0.0598,
        "state_dict": OrderedDict(state_dict),
        "other_parameter": None,
        "optimizer": {"state": {0: {"exp_avg": np.zeros(3, np.float32)}}, "param_groups": []},
    }
