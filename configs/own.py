"""Your own log: settings to begin with.

    python train.py --config configs/own.py --workdir runs/own

The first start prepares the log, as this command does. Prepare it yourself where its columns have
other names, and say where it is: `--config.dataset=data/shop`.

    python -m data_prep table events.csv --out data/own

Variants:
    causal     causal time, trained at every position, a bias for items of the history: the one to
               begin with, as it is the fastest and takes new events one by one
    official   the settings released for ML-1M to the letter

Every comparison model is a variant, too: `sasrec`, `gru4rec` and so on.
"""

from tim4rec_jax import config as config_lib
from tim4rec_jax import presets


def get_config(variant: str = "") -> config_lib.Config:
    """The settings of the run."""
    presets.check_variant(variant, "causal", "official")
    config = config_lib.default()
    config.dataset = "data/own"
    config.prepare = "python -m data_prep table events.csv --out data/own"
    config.data.max_length = 50

    # The model of the released ML-1M configuration.
    config.model.update(
        name="tim4rec",
        time_encoding="paper",
        hidden_size=64,
        num_layers=2,
        d_state=32,
        d_conv=4,
        expand=2,
        head_dim=32,
        dropout_prob=0.2,
        time_drop_out=0.2,
        norm_eps=1e-12,
        is_time=True,
        p2p_residual=False,
        is_kai_ming_init=True,
        repeat_bias=False,
    )
    # The protocol of the paper, with batches that suit small logs, too.
    config.train.update(
        objective="prefix",
        loss="cross_entropy",
        batch_size=512,
        learning_rate=1e-3,
        schedule="constant",
        weight_decay=0.0,
        epochs=300,
        patience=10,
    )
    config.eval.batch_size = 512
    presets.use_baseline(config, variant)

    if variant == "causal":
        config.model.update(time_encoding="causal", single_layer_residual=True, repeat_bias=True)
        # A row of 50 positions holds several histories. The last epochs are the best under the
        # cosine schedule, so nothing stops training before.
        config.train.update(
            objective="every_position", batch_size=32, schedule="cosine", epochs=30, patience=30
        )
    if variant == "official":
        config.data.max_length = 200
        config.train.update(batch_size=2048, patience=20)
        config.eval.batch_size = 4096
    return config
