"""The calculator against compiled programs, and its command line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.training.tiny_run import MAX_LENGTH, quick_config
from tim4rec_jax import config as config_lib
from tim4rec_jax import presets
from tim4rec_jax.errors import run_main
from tim4rec_jax.models import inputs
from tim4rec_jax.plan import formulas
from tim4rec_jax.plan.__main__ import main
from tim4rec_jax.plan.devices import DEVICES
from tim4rec_jax.plan.program import cost
from tim4rec_jax.training.losses import Loss
from tim4rec_jax.training.negatives import item_frequencies
from tim4rec_jax.training.state import init_state, make_optimizer
from tim4rec_jax.training.step import StepSettings, train_step

slow = pytest.mark.slow
CPU = formulas.Layout("cpu")


def compiled_step(config, found, rows, microbatches):
    """Today's training step, compiled for the arrays that the formulas assume."""
    graphdef, params = nnx.split(found.model)
    loss = Loss(config.train.loss, config.train.negatives, config.train.calibration)
    tx = make_optimizer(1e-3, 0.0)
    settings = StepSettings(graphdef, tx, config.train.objective, loss, 1, microbatches)
    state = jax.eval_shape(lambda params: init_state(params, tx, 0), params)
    shapes = formulas.batch_shapes(config, found.model, rows)
    batch = {
        name: shapes[name]
        for name in (*inputs(found.model), "targets", "weights")
        if name in shapes
    }
    frequencies = None
    if config.train.loss == "sampled_softmax":
        frequencies = item_frequencies(np.ones(found.rows - 1, np.int64))
    return train_step.lower(state, batch, settings, frequencies).compile()


def check(config, items, rows, microbatches=1):
    """Memory and operations within 10 % of the compiled program's, traffic within 15 %."""
    config = config_lib.resolve(config)
    found = formulas.structure(config, items)
    program = compiled_step(config, found, rows, microbatches)
    needed = formulas.step_memory(config, found, rows, microbatches, CPU)
    memory, compiler = program.memory_analysis(), program.cost_analysis()
    temporary = needed["activations"] + needed["loss"] + needed["gradients"]
    assert temporary == pytest.approx(memory.temp_size_in_bytes, rel=0.1)
    state = needed["item table"] + needed["other parameters"] + needed["optimizer"]
    assert state == pytest.approx(memory.alias_size_in_bytes, rel=0.01)
    if found.rows * rows * config.data.max_length > 2**23:
        return  # the compiler counts a single block of the loss
    part = rows // microbatches
    parts = (
        formulas.encoder_cost(config, found.model, part),
        formulas.loss_cost(config, found, part, found.rows),
    )
    parameters = found.rows * found.width + found.others
    # Adam has some fifteen operations for each parameter, and moves it as `step_seconds` says.
    operations = sum(part.operations for part in parts) + 15 * parameters
    assert operations == pytest.approx(compiler["flops"], rel=0.1)
    traffic = sum(part.traffic for part in parts) + 7 * 4 * parameters
    assert traffic == pytest.approx(compiler["bytes accessed"], rel=0.15)


def preset(name, **changes):
    config = presets.load_config(name)
    for key, value in changes.items():
        section, _, setting = key.partition("_")
        config[section][setting] = value
    return config


@slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_causal_step(microbatches):
    check(preset("beauty:causal"), 1000, 32, microbatches)


@slow
@pytest.mark.parametrize("changes", [{"model_num_layers": 3}, {"model_hidden_size": 128}])
def test_larger_models(changes):
    check(preset("beauty:causal", **changes), 1000, 64)


@slow
@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_loss_in_blocks(microbatches):
    check(preset("beauty:causal"), 50_000, 64, microbatches)


@slow
def test_a_sampled_loss():
    changes = {"model_repeat_bias": False, "train_loss": "sampled_softmax"}
    check(preset("beauty:causal", **changes), 50_000, 64)


@slow
def test_another_model():
    check(preset("beauty:sasrec"), 1000, 256)


def test_operations_and_memory_of_a_small_program():
    """Two products, whose first result both the second and the gradient read."""
    rows, width = 64, 32
    shape = jax.ShapeDtypeStruct

    def loss(weights, x):
        return jnp.sum(jnp.tanh(x @ weights) @ weights)

    inputs = shape((width, width), jnp.float32), shape((rows, width), jnp.float32)
    found = cost(jax.value_and_grad(loss), *inputs)
    products = 5 * 2 * rows * width**2  # two forward, and three for gradients
    assert products <= found.operations <= 1.1 * products
    array = 4 * rows * width
    assert 2 * array <= found.memory <= 5 * array


def test_loops_count_once_or_as_often_as_they_turn():
    def step(carry, x):
        return carry @ x, None

    def run(first, others):
        return jax.lax.scan(step, first, others)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 8), (10, 8, 8))]
    once, all_turns = cost(run, *shapes), cost(run, *shapes, turns=1)
    assert all_turns.operations == 10 * once.operations == 10 * 2 * 8**3


def test_a_quick_step_against_its_compiled_program():
    config = config_lib.resolve(quick_config("none"))
    found = formulas.structure(config, 30)
    program = compiled_step(config, found, 16, 1)
    needed = formulas.step_memory(config, found, 16, 1, CPU)
    state = needed["item table"] + needed["other parameters"] + needed["optimizer"]
    # The step, the sums of the epoch and so on take some bytes, too.
    assert state == pytest.approx(program.memory_analysis().alias_size_in_bytes, abs=64)
    parts = (
        formulas.encoder_cost(config, found.model, 16),
        formulas.loss_cost(config, found, 16, found.rows),
    )
    operations = sum(part.operations for part in parts) + 15 * found.rows * found.width
    assert operations == pytest.approx(program.cost_analysis()["flops"], rel=0.1)


def test_spreading_and_updates_of_rows():
    config = config_lib.resolve(quick_config("none", loss="sampled_softmax", batch_size=64))
    sizes = formulas.Sizes(10**8, 10**8, 10**9)
    one, spread, rows = (
        formulas.plan(config, sizes, formulas.Layout("v5e", 16, 1, spread, optimizer))
        for spread, optimizer in ((False, "adam"), (True, "adam"), (True, "lazy_adam"))
    )
    table = (10**8 + 1) * 8 * 4
    assert one.memory["item table"] == table == pytest.approx(16 * spread.memory["item table"])
    assert one.memory["optimizer"] == 2 * table
    assert one.network["sum of all gradients"] == pytest.approx(2 * 15 / 16 * table)
    assert rows.memory["gradients"] < 1e-3 * spread.memory["gradients"]
    assert rows.seconds["memory"] < 1e-2 * spread.seconds["memory"]
    # No message is larger than the rows of the batch: histories, targets and drawn items.
    asked = 64 * MAX_LENGTH + 64 + config.train.negatives
    assert max(rows.network.values()) <= 2 * asked * 8 * 4
    assert one.checkpoint == pytest.approx(3 * table)


def test_what_the_command_says(capsys):
    words = ["--items", "100e6", "--users", "1e6", "--events", "1e9"]
    words += [
        "--config.model.hidden_size=8",
        "--config.model.head_dim=8",
        "--config.model.num_layers=1",
    ]
    main([*words, "--devices", "h100"])
    said = " ".join(capsys.readouterr().out.split())
    assert "100,000,000 items, 1,000,000 users, 1,000,000,000 events; 1 x h100" in said
    assert "The step is bound by memory" in said and DEVICES["h100"].source in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--devices", "16xv9"], "kinds are v5e, v5p, v6e"),
        (["--devices", "0xv5e"], "kinds are v5e"),
        (["--config.mesh.data=2"], "are 2 devices, and --devices names 1; make them equal"),
        (["--config.train.item_optimizer=adagrad"], "config.train.item_optimizer"),
        (["--users", "1e6"], "less than 3 for each of 1,000,000 users"),
        (["--config.model.hiden_size=3"], "nearest: model.hidden_size"),
    ],
)
def test_mistakes(words, says, capsys):
    sizes = ["--items", "1000", "--users", "10", "--events", "1e3"]
    assert run_main(lambda: main([*sizes, *words])) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "1.5", "-1", "1e99", "nan", "ten", "1" * 40])
def test_numbers_that_are_none(number, capsys):
    assert run_main(lambda: main(["--users", "1", "--events", "9", f"--items={number}"])) == 2
    assert "is no" in capsys.readouterr().err
