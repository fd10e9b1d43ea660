"""Steam reviews, 5-core, first review of each user and game.

    python train.py --config configs/steam.py --workdir runs/steam

The first start downloads and prepares the data, as this command does:

    python -m data_prep steam --deduplicate first --order recbole --out data/steam

About 3.5 million events; meant for a GPU or TPU. Times are whole days, as in Beauty, whose
structure it shares. It has Beauty's settings with the dropout of the denser sets.

Variants:
    causal     causal time, trained at every position
    official   none were released for this set, so those released for Beauty to the letter

Every comparison model is a variant, too: `sasrec`, `gru4rec` and so on.
"""

from tim4rec_jax import config as config_lib
from tim4rec_jax import presets


def get_config(variant: str = "") -> config_lib.Config:
    """The settings of the run."""
    presets.check_variant(variant, "causal", "official")
    config = config_lib.default()
    config.dataset = "data/steam"
    config.prepare = (
        "python -m data_prep steam --deduplicate first --order recbole --out data/steam"
    )
    config.data.max_length = 50  # the paper's for sparse data

    # The released Beauty configuration, with less dropout.
    config.model.update(
        name="tim4rec",
        time_encoding="paper",
        hidden_size=64,
        num_layers=2,
        d_state=32,
        d_conv=4,
        expand=2,
        head_dim=32,
        dropout_prob=0.2,  # the paper's for the denser sets
        time_drop_out=0.0,
        norm_eps=1e-5,
        is_time=True,
        p2p_residual=True,
        is_kai_ming_init=False,
        repeat_bias=False,
    )
    # The protocol of the paper: Adam, full softmax, early stopping on validation NDCG@10.
    config.train.update(
        objective="prefix",
        loss="cross_entropy",
        batch_size=2048,
        learning_rate=1e-3,
        schedule="constant",
        weight_decay=0.0,
        epochs=300,
        patience=20,
    )
    config.eval.batch_size = 512
    presets.use_baseline(config, variant)

    if variant == "causal":
        config.model.update(time_encoding="causal", single_layer_residual=True, repeat_bias=True)
        # A row of 50 positions holds several histories. The last epochs are the best under the
        # cosine schedule, so nothing stops training before.
        config.train.update(
            objective="every_position", batch_size=256, schedule="cosine", epochs=20, patience=20
        )
    if variant == "official":
        config.model.dropout_prob = 0.4
        config.eval.batch_size = 4096
    return config
