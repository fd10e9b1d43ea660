"""Implementations that belong to another platform run in an interpreter on this one."""

import functools

import jax
import pytest
from jax.experimental import pallas

from tests.ssd import interpreter
from tim4rec_jax.ssd import compile_for
from tim4rec_jax.ssd.triton import launch as triton_launch


@pytest.fixture
def tpu(monkeypatch):
    """Programs are traced as for a TPU, their kernels interpreted."""
    interpret = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(pallas, "pallas_call", interpret)
    with compile_for("tpu"):
        yield


@pytest.fixture
def triton(monkeypatch):
    """Programs are traced as for an H100, their kernels run by Triton's interpreter.

    With JAX_PLATFORMS=cuda,cpu TRITON_INTERPRET=0 on a machine with a GPU they run there.
    """
    pytest.importorskip("triton", reason="the kernels need Triton: pip install '.[kernels]'")
    if jax.default_backend() == "gpu":
        yield
        return
    monkeypatch.setattr(triton_launch, "launch", interpreter.launch)
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: name)
    with compile_for("gpu", 90):
        yield


@pytest.fixture(autouse=True)
def _own_platform(request):
    """Tests of an implementation run on its platform."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if (name := parameters.get("implementation")) in ("tpu", "triton"):
        request.getfixturevalue(name)
