"""Implementations that belong to another platform run in an interpreter on this one."""

import functools

import pytest
from jax.experimental import pallas

from tim4rec_jax.ssd import compile_for


@pytest.fixture
def tpu(monkeypatch):
    """Programs are traced as for a TPU, their kernels interpreted."""
    interpret = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(pallas, "pallas_call", interpret)
    with compile_for("tpu"):
        yield


@pytest.fixture(autouse=True)
def _own_platform(request):
    """Tests of an implementation run on its platform."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("implementation") == "tpu":
        request.getfixturevalue("tpu")
