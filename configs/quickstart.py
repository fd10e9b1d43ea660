"""Synthetic data whose best possible scores are known: does time help, and by how much?

    python train.py --config configs/quickstart.py --workdir runs/quickstart

The first start generates the data, as this command does:

    python -m data_prep synthetic --out data/synthetic

`make quickstart` runs both. Expected (seed 2020): test NDCG@10 about .47, where a model blind to
time cannot exceed .345 and no model .497; 3 epochs, about 90 s on two CPU cores.

Variants:
    causal     causal time, trained at every position, a bias for items of the history: test Hit@10
               .862, NDCG@10 .496 (oracle .866, .497)
    official   the released ML-1M settings on this data

Every comparison model is a variant, too: `sasrec`, `gru4rec` and so on.
"""

from tim4rec_jax import config as config_lib
from tim4rec_jax import presets


def get_config(variant: str = "") -> config_lib.Config:
    """The settings of the run."""
    presets.check_variant(variant, "causal", "official")
    config = config_lib.default()
    config.dataset = "data/synthetic"
    config.prepare = "python -m data_prep synthetic --out data/synthetic"
    config.data.max_length = 32  # no history is longer
    # Two lengths, because on a CPU compiling a third costs more than it saves here.
    config.data.buckets = (12, 32)

    config.model.update(
        name="tim4rec",
        time_encoding="paper",
        hidden_size=64,
        num_layers=2,
        d_state=32,
        d_conv=4,
        expand=2,
        head_dim=32,
        dropout_prob=0.1,  # little, because the training is short
        time_drop_out=0.0,
        norm_eps=1e-12,
        is_time=True,
        p2p_residual=True,
        is_kai_ming_init=True,
        repeat_bias=False,
    )
    # Small batches and a high rate: a few epochs suffice.
    config.train.update(
        objective="prefix",
        loss="cross_entropy",
        batch_size=256,
        learning_rate=2e-3,
        schedule="constant",
        weight_decay=0.0,
        epochs=4,
        patience=20,
    )
    config.eval.batch_size = 512
    presets.use_baseline(config, variant)

    if not variant:
        config.train.epochs = 3  # the fourth is no better on validation
    if variant == "causal":
        config.model.update(time_encoding="causal", single_layer_residual=True, repeat_bias=True)
        # A row of 32 positions holds several histories. The last epochs are the best under the
        # cosine schedule, so nothing stops training before.
        config.train.update(
            objective="every_position", batch_size=32, schedule="cosine", epochs=12, patience=12
        )
    if variant == "official":
        config.data.buckets = None
        config.model.update(dropout_prob=0.2, time_drop_out=0.2, p2p_residual=False)
        config.train.update(batch_size=2048, learning_rate=1e-3, epochs=300)
        config.eval.batch_size = 4096
    return config
