"""A training that takes seconds: its settings, its parameters, its sudden end."""

from flax import nnx

from tim4rec_jax import config as config_lib
from tim4rec_jax.run import load_model
from tim4rec_jax.training import step as steps

MAX_LENGTH = 12
MODEL = dict(hidden_size=16, num_layers=1, head_dim=8, d_state=8)


def tiny_config(dataset, **train):
    """Settings for the prepared dataset in the directory `dataset`."""
    config = config_lib.default()
    config.dataset = str(dataset)
    config.data.update(max_length=MAX_LENGTH, buckets=(MAX_LENGTH,))
    config.model.update(MODEL)
    config.train.update({"batch_size": 16, "epochs": 2} | train)
    config.eval.batch_size = 16
    return config


def parameters(workdir):
    return nnx.to_pure_dict(nnx.state(load_model(workdir)[1], nnx.Param))


def die_at(call, monkeypatch):
    """Has the dispatch of steps fail once, at the given call."""
    calls = iter(range(1, 1000))

    for kind in (steps.HostSteps, steps.DeviceSteps):

        def dying(self, *args, run=kind.run):
            if next(calls) == call:
                raise RuntimeError("killed")
            return run(self, *args)

        monkeypatch.setattr(kind, "run", dying)
