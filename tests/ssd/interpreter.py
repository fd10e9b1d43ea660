"""Runs Triton kernels on the CPU: Triton's interpreter as a `launch` of the JAX binding."""

import threading
from unittest import mock

import jax
import ml_dtypes
import numpy as np

# The interpreter keeps the place of the running program in a global, and devices call at once.
_one_at_a_time = threading.Lock()


class HostTensor:
    """As much of a torch tensor as the interpreter asks for, over memory of numpy."""

    def __init__(self, array=None):
        self.array = array

    @property
    def dtype(self):
        return self.array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    cpu = untyped_storage

    def new_empty(self, size, device):
        return HostTensor()

    def set_(self, storage, *view):
        self.array = storage.array

    def copy_(self, other):
        """Both are the same memory."""

    storage_offset = size = stride = lambda self: None


def _rounded(input, input_dtype, output_dtype, rounding_mode):
    """To bfloat16 and back as GPUs do: the interpreter's own conversion cuts digits off."""
    if input_dtype.is_bf16():
        return input.view(ml_dtypes.bfloat16).astype(np.float32).view(np.uint32)
    return input.astype(ml_dtypes.bfloat16).view(np.uint16)


def launch(kernel, inputs, outputs, *, programs, specialisation, tiles):
    """What `tim4rec_jax.ssd.triton.launch.launch` does, without a GPU."""
    numbers = {i: v for i, v in enumerate(inputs) if not isinstance(v, jax.Array)}
    arrays = [v for i, v in enumerate(inputs) if i not in numbers]

    def run(*arrays):
        arguments = [HostTensor(np.ascontiguousarray(v)) for v in arrays]
        for i, v in numbers.items():
            arguments.insert(i, v)
        # What a kernel leaves unwritten shows.
        results = [np.full(v.shape, np.nan, v.dtype) for v in outputs]
        with _one_at_a_time, mock.patch("triton.runtime.interpreter._convert_float", _rounded):
            kernel[(programs,)](*arguments, *map(HostTensor, results), S=specialisation)
        return results

    return jax.pure_callback(run, outputs, *arrays)
