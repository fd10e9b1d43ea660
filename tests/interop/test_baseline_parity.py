"""The comparison models against their published code: states, scores, loss, every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.interop.golden_baselines import FOLDER, NAMES, read_baseline
from tests.interop.golden_models import FULL
from tim4rec_jax.interop import to_torch
from tim4rec_jax.interop.formats import FORMATS
from tim4rec_jax.layers.attention import causal_mask
from tim4rec_jax.models import encode_batch
from tim4rec_jax.models.tisasrec import time_index
from tim4rec_jax.training.objectives import OBJECTIVES

TOLERANCE = {"float32": 2e-5, "float64": 1e-9}
COMPILER_OPTIONS = {} if FULL else {"xla_backend_optimization_level": 0}
NAMES = [name for name in NAMES if read_baseline(name).config["model"] in FORMATS]
# Once a model in float32, unless all of the files are there.
SAMPLE = {read_baseline(name).config["model"]: name for name in reversed(NAMES)}.values()
CASES = [(name, "float64") for name in NAMES]
# Slow except for one model: what differs from float64 is rounding.
FAST_FLOAT32 = ("gru4rec_tiny",)
CASES += [
    pytest.param(name, "float32", marks=[] if name in FAST_FLOAT32 else pytest.mark.slow)
    for name in NAMES
    if FULL or name in SAMPLE
]


def loss_and_gradients(graph, params, batch, objective):
    def mean_loss(params):
        model = nnx.merge(graph, params)
        return OBJECTIVES[objective].loss(model, batch, None) / batch["weights"].sum()

    return jax.value_and_grad(mean_loss)(params)


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=COMPILER_OPTIONS)
def all_results(graph, params, batch, rows, objective):
    """Loss and gradients of `rows`; of `batch`: what scores items, the scores, layers' states."""
    model = nnx.merge(graph, params)
    encoded = encode_batch(model, batch)
    states = STATES.get(type(model).__name__)
    layers = states(model, batch) if states else {}
    found = loss_and_gradients(graph, params, rows, objective)
    return found, encoded, encoded @ nnx.merge(graph, params).item_table().T, layers


def transformer(model, batch):
    states = [model.positions(model.item_embedding(batch["items"]))]
    mask = causal_mask(batch["items"].shape[1])
    for layer in model.layers:
        states.append(layer(states[-1], mask))
    return {f"hidden/{i}": state for i, state in enumerate(states)}


def recurrent(model, batch):
    h, states = model.item_embedding(batch["items"]).swapaxes(0, 1), {}
    for i, block in enumerate(model.blocks):
        h = block(h)
        states[f"hidden/{i + 1}"] = h.swapaxes(0, 1)
    return states


def after_blocks(model, batch):
    """Output of the model cut after each of its blocks."""
    blocks, states = list(model.blocks), {}
    for count in range(len(blocks) + 1):
        model.blocks = nnx.List(blocks[:count])
        hidden = model(batch["items"], batch["lengths"], batch["gaps"])
        states[f"hidden/{count}"] = hidden[..., : model.item_embedding.features]
    return states


def bert4rec(model, batch):
    """Behind the input that it makes of the history itself: the mask at its end, as encoded."""
    items, at_end = batch["items"], batch["lengths"][:, None] - 1
    index = np.arange(items.shape[1])
    later = jnp.roll(items, -1, axis=1)
    asked = jnp.where(index < at_end, later, jnp.where(index == at_end, model.mask_token, 0))
    states = [model.positions(model.item_embedding(asked))]
    for layer in model.layers:
        states.append(layer(states[-1], (asked > 0)[:, None, None]))
    filled = model(batch["masked"], batch["lengths"], batch["gaps"])[..., :-1]
    states = {f"test_hidden/{i}": state for i, state in enumerate(states)}
    return states | {"out/train_output": filled}


def tisasrec(model, batch):
    index = time_index(batch["gaps"], model.time_span)
    states = [model.positions(model.item_embedding(batch["items"]))]
    mask = causal_mask(batch["items"].shape[1])
    for layer in model.layers:
        states.append(layer(states[-1], mask, None, model._relation(index, None)))
    return {f"hidden/{i}": state for i, state in enumerate(states)}


# The states of a model's layers [B,L,...] by their names in the golden files.
STATES = {
    "GRU4Rec": recurrent,
    "SSD4Rec": after_blocks,
    "Mamba4Rec": after_blocks,
    "LRURec": after_blocks,
    "Caser": lambda model, batch: {},
    "SASRec": transformer,
    "BERT4Rec": bert4rec,
    "TiSASRec": tisasrec,
}


def check(ours, reference, tolerance, what, atol=0.0):
    if reference.dtype in (np.float32, np.complex64):  # how the large files keep some arrays
        tolerance = max(tolerance, 1e-7)
    kind = np.result_type(reference, np.float64)  # or complex
    ours, reference = np.asarray(ours, kind), np.asarray(reference, kind)
    assert ours.shape == reference.shape, what
    error = np.linalg.norm(ours - reference)
    assert error <= tolerance * np.linalg.norm(reference) + atol, f"{what}: {error}"


def figures(x):
    """Norm, sum, greatest and a projection, as the golden files keep them."""
    x = np.asarray(x, np.float64).ravel()
    return np.array([np.linalg.norm(x), x.sum(), np.abs(x).max(), x @ np.cos(np.arange(x.size))])


def check_gradient(ours, arrays, name, tolerance):
    # The same added to all scores of a query changes nothing: rounding is all that is there.
    atol = 1e-2 * tolerance if name.endswith("key.bias") else 0.0
    what = f"gradient of {name}"
    for kind in ("grad", "grad32"):
        if f"{kind}/{name}" in arrays:
            check(ours, arrays[f"{kind}/{name}"], tolerance, what, atol)
    if f"gradsample/{name}" in arrays:
        sample = ours.ravel()[:: int(arrays[f"gradstride/{name}"])]
        check(sample, arrays[f"gradsample/{name}"], tolerance, what, atol)
    expected = arrays[f"gradstat/{name}"]
    parts = figures(ours) if expected.ndim == 1 else [figures(ours.real), figures(ours.imag)]
    norm = np.linalg.norm(expected[..., 0])
    limit = tolerance * norm * np.sqrt(ours.size) + atol * np.sqrt(ours.size)
    np.testing.assert_allclose(parts, expected, rtol=0, atol=limit, err_msg=what)


def test_there_are_golden_files():
    assert len(NAMES) >= 1, FOLDER


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_states_scores_loss_and_gradients(name, dtype):
    golden, tolerance = read_baseline(name), TOLERANCE[dtype]
    arrays, batch = golden.arrays, golden.batch
    with jax.enable_x64(dtype == "float64"):
        graph, params = nnx.split(golden.model(dtype))
        cloze = golden.config["model"] == "BERT4Rec"
        rows, objective = (golden.masked("in/"), "cloze") if cloze else (batch, "prefix")
        found, encoded, scores, layers = all_results(graph, params, batch, rows, objective)
        loss, gradients = found
        gradients = to_torch(nnx.merge(graph, gradients))

    width = arrays["out/seq_output"].shape[1]  # ours may have a one behind, for the score bias
    check(encoded[:, :width], arrays["out/seq_output"], tolerance, "state")
    check(scores, arrays["out/scores"], tolerance, "scores")
    check(loss, arrays["out/loss"], tolerance, "loss")
    real = np.arange(batch["items"].shape[1]) < batch["lengths"][:, None]
    for layer in layers.keys() & arrays.keys():  # the large files do not keep all
        check(np.asarray(layers[layer])[real], arrays[layer][real], tolerance, layer)
    assert gradients.keys() == golden.state_dict.keys()
    for parameter, gradient in gradients.items():
        check_gradient(gradient, arrays, parameter, tolerance)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("bert4rec")])
def test_bert4rec_where_only_the_last_item_is_masked(name, x64):
    golden, tolerance = read_baseline(name), TOLERANCE["float64"]
    graph, params = nnx.split(golden.model("float64"))
    # The program of the test above.
    rows = golden.masked("in/ft_")
    (loss, gradients), *_ = all_results(graph, params, golden.batch, rows, "cloze")
    check(loss, golden.arrays["out_ft/loss"], tolerance, "loss")
    for parameter, gradient in to_torch(nnx.merge(graph, gradients)).items():
        expected = golden.arrays[f"gradstat_ft/{parameter}"]
        atol = tolerance * np.sqrt(gradient.size) * (expected[0] + 1e-2)
        np.testing.assert_allclose(figures(gradient), expected, rtol=0, atol=atol)
