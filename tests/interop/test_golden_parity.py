"""Our model against the published code: states, scores, loss and every gradient."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from tests.interop.golden_models import FOLDER, FULL, NAMES, read_golden
from tim4rec_jax.interop import to_torch
from tim4rec_jax.training.losses import cross_entropy

TOLERANCE = {"float32": 2e-5, "float64": 1e-11}
# Compiling is nearly all of the time here. Without the full set of files, it is done with little
# optimisation, which takes half the time.
COMPILER_OPTIONS = {} if FULL else {"xla_backend_optimization_level": 0}
SAMPLE = ("tiny_kaiming", "tiny_p2pT")
# Each setting has each of its values in one of the fast cases, but for the way the weights were
# drawn, of which these computations know nothing. The first three share a program.
FAST = [
    *((f"tiny_{name}", "float64") for name in ("p2pT", "fulllen", "smallts")),
    ("tiny_h8_silu_p2pT", "float64"),
    ("tiny_notime_1layer_noffn", "float64"),
    ("tiny_1layer_p2pT", "float32"),
]


def cases():
    """All files in float64; in float32 a sample of them, or all where the large files are."""
    found = [(name, "float64") for name in NAMES]
    found += [(name, "float32") for name in NAMES if FULL or name in (*SAMPLE, "tiny_1layer_p2pT")]
    for case in found:
        yield pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILER_OPTIONS)
def loss_and_gradients(graph, params, items, lengths, gaps, targets):
    def loss(params):
        model = nnx.merge(graph, params)
        state = model.encode(items, lengths, gaps)
        table = model.item_embedding.embedding[...]
        return cross_entropy(state, table, targets).mean(), (state, state @ table.T)

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILER_OPTIONS)
def streams(graph, params, items, lengths, gaps):
    """Item and time stream before the first layer and after each."""
    model = nnx.merge(graph, params)
    h, tau, real = model._embed(items, lengths, gaps, None)
    states = [(h, tau)]
    for block in model.blocks:
        h, tau = block(h, tau, real)
        states.append((h, tau))
    return states


def check(ours, reference, tolerance, what):
    if reference.dtype == np.float32:  # how the large files keep some of their arrays
        tolerance = max(tolerance, 1e-7)
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, what
    error = np.linalg.norm(ours - reference)
    assert error <= tolerance * np.linalg.norm(reference), f"{what}: {error}"


def check_gradient(ours, arrays, name, tolerance):
    if f"grad/{name}" in arrays:
        return check(ours, arrays[f"grad/{name}"], tolerance, f"gradient of {name}")
    # Kept as float32, beside four figures of full precision.
    check(ours, arrays[f"grad32/{name}"], tolerance, f"gradient of {name}")
    ours = np.asarray(ours, np.float64).ravel()
    norm = np.linalg.norm(ours)
    figures = [norm, ours.sum(), np.abs(ours).max(), ours @ np.cos(np.arange(ours.size))]
    scale = tolerance * norm * np.sqrt(ours.size)
    np.testing.assert_allclose(figures, arrays[f"gradstat/{name}"], rtol=0, atol=scale)


def test_there_are_golden_files():
    assert len(NAMES) >= 12, FOLDER


@pytest.mark.parametrize(("name", "dtype"), list(cases()))
def test_state_scores_loss_and_gradients(name, dtype):
    golden, tolerance = read_golden(name), TOLERANCE[dtype]
    with jax.enable_x64(dtype == "float64"):
        graph, params = nnx.split(golden.model(dtype))
        (loss, (state, scores)), gradients = loss_and_gradients(
            graph, params, golden.items, golden.lengths, golden.gaps, golden.targets
        )
        gradients = to_torch(nnx.merge(graph, gradients))

    check(loss, golden.arrays["out/loss"], tolerance, "loss")
    check(state, golden.arrays["out/seq_output"], tolerance, "state")
    check(scores, golden.arrays["out/scores"], tolerance, "scores")
    assert gradients.keys() == golden.state_dict.keys()
    for parameter, gradient in gradients.items():
        check_gradient(gradient, golden.arrays, parameter, tolerance)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "tiny_p2pT" else pytest.mark.slow)
        for name in (NAMES if FULL else SAMPLE)
    ],
)
def test_both_streams_after_every_layer(name, x64):
    golden = read_golden(name)
    graph, params = nnx.split(golden.model("float64"))
    states = streams(graph, params, golden.items, golden.lengths, golden.gaps)
    assert len(states) == golden.config["num_layers"] + 1
    for i, (h, tau) in enumerate(states):
        expected = golden.arrays[f"hidden/{i}"]
        rows = len(expected)  # the large files keep two
        check(h[:rows], expected, TOLERANCE["float64"], f"hidden/{i}")
        if golden.config["is_time"]:
            expected = golden.arrays[f"time_diff/{i}"]
            every_head = np.broadcast_to(tau[:rows], expected.shape)  # the first is shared
            check(every_head, expected, TOLERANCE["float64"], f"time_diff/{i}")


@pytest.mark.parametrize(
    "name", ["tiny_p2pT", pytest.param("tiny_h8_silu_notime", marks=pytest.mark.slow)]
)
def test_items_cut_to_a_shorter_bucket_change_nothing(name, x64):
    golden = read_golden(name)
    width = golden.config["MAX_ITEM_LIST_LENGTH"] // 2
    rows = golden.lengths <= width
    assert rows.sum() >= 2
    items, lengths = (
        jax.device_put(golden.items[rows, :width]),
        jax.device_put(golden.lengths[rows]),
    )
    gaps = jax.device_put(golden.gaps[rows])
    model = golden.model("float64")
    both = nnx.jit(lambda model, *inputs: (model.encode(*inputs), model(*inputs)))
    state, hidden = both(model, items, lengths, gaps)
    expected = golden.arrays["out/seq_output"][rows]
    check(state, expected, TOLERANCE["float64"], "encode")
    at_last = hidden[np.arange(len(lengths)), lengths - 1]
    check(at_last, expected, TOLERANCE["float64"], "hidden state at length - 1")
