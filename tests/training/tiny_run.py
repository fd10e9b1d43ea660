"""Settings of a training that takes seconds."""

from tim4rec_jax import config as config_lib

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
